"""`vitreg look` beside vit-xray, on the same photos and model: how fast each is, and what each marks.

    python benchmarks/looks.py MODEL PHOTO... [--peers FOLDER]

MODEL is a folder in timm's format. FOLDER holds vit-xray (`pip install --no-deps --target FOLDER vit-xray`);
without it that row is left out. Seconds are the least of three runs of the whole command on the first photo,
as multiples of importing torch and timm, building the model and one forward pass. Run it on a quiet machine.

The second table asks each tool of every photo: how many patches it marks. vit-xray marks those beyond the
threshold of its mixture of two; where it fits none, no patch.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PASS = """
import sys, timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    model(torch.zeros(1, 3, 224, 224))
"""
RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--peers", type=Path)
    asked = parser.parse_args()
    commands = {"one forward pass": [sys.executable, "-c", PASS, asked.model]}
    commands["vitreg PHOTO -m MODEL"] = ours(asked.photos[0], asked.model)
    if asked.peers:
        commands["vit-xray PHOTO -m MODEL"] = vit_xray(asked.peers, asked.photos[0], asked.model)
    seconds = {name: min(timed(command) for _ in range(RUNS)) for name, command in commands.items()}
    print("| command | seconds | of one pass |\n|---|---:|---:|")
    base = seconds["one forward pass"]
    for name, taken in seconds.items():
        print(f"| `{name}` | {taken:.1f} | {taken / base:.2f}x |")
    print("\n| photo | patches that vitreg marks | vit-xray |\n|---|---:|---:|")
    for photo in asked.photos:
        theirs = marked_by_vit_xray(asked.peers, photo, asked.model) if asked.peers else "-"
        print(f"| {Path(photo).name} | {marked_by_us(photo, asked.model)} | {theirs} |", flush=True)


def ours(photo: str, model: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "vitreg", "look", photo, "-m", model, *more]


def vit_xray(peers: Path, photo: str, model: str) -> list[str]:
    return [sys.executable, str(peers / "bin" / "vit-xray"), photo, "-m", f"local-dir:{model}"]


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    ran(command)
    return time.perf_counter() - began


def ran(command: list[str]) -> str:
    """What a command prints, run in a folder of its own."""
    peers = [str(Path(part).parents[1]) for part in command if part.endswith("vit-xray")]
    own = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*peers, own]), "COLUMNS": "200"}
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        ).stdout


def marked_by_us(photo: str, model: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        ran(ours(photo, model, "--json", f"{folder}/look.json"))
        (version,) = json.loads(Path(folder, "look.json").read_text(encoding="utf-8"))["versions"]
    return version["photos"][0]["artifacts"]


def marked_by_vit_xray(peers: Path, photo: str, model: str) -> str:
    """Its score is a share of the patches of a grid, both in its table."""
    said = ran(vit_xray(peers, photo, model))
    grid, score = re.search(r"(\d+)\u00d7(\d+)", said), re.search(r"(\d+\.\d+)%", said)
    return str(round(int(grid[1]) * int(grid[2]) * float(score[1]) / 100)) if grid and score else "?"


if __name__ == "__main__":
    main()
