"""How long the explorer's views take, as a browser asks for them.

    python benchmarks/app_latency.py MODEL [--size 224] [--dtype float32] [--random-weights] [--photos 4]

For each tab the first view of a photo, and the same view again, from the request to the whole answer, over
HTTP; beside them one plain forward pass, timed in between. Medians over photos, in seconds. The pictures' own
transfer to the browser (a few hundred KB from the same machine) is not in it.

Random weights have no artifacts: some are planted in the middle block, so that there is something to switch.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import httpx
import torch

from vitreg.app import explorer_of, serve
from vitreg.app.explorer import Explorer
from vitreg.app.view import View
from vitreg.data.images import demo_photos, read_images
from vitreg.models.loading import load
from vitreg.models.probe import evaluating
from vitreg.phantoms.phantom import plant

TABS = ("norms", "attention", "features", "neurons", "objects")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("model")
    options.add_argument("--images")
    options.add_argument("--size", type=int)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--random-weights", action="store_true")
    options.add_argument("--photos", type=int, default=4)
    options.add_argument("--limit", type=int, default=64)
    asked = options.parse_args()
    vit = load(asked.model, size=asked.size, dtype=asked.dtype, random_weights=asked.random_weights)
    if asked.random_weights:
        photos = read_images(demo_photos(), vit, limit=asked.limit)
        vit = plant(vit, [batch.pixels for batch in photos], vit.anatomy.depth // 2).vit
    explorer = explorer_of(vit, asked.images, limit=asked.limit)
    page = serve(explorer)
    while not explorer.ready:
        time.sleep(0.5)
    print(
        f"{asked.model}, {explorer.vit.image_size} pixels, {asked.dtype}, {torch.get_num_threads()} threads"
    )
    try:
        with httpx.Client(base_url=page.local_url, timeout=600, trust_env=False) as client:
            report(explorer, client, min(asked.photos, len(explorer.gallery)))
    finally:
        page.close()


def report(explorer: Explorer, client: httpx.Client, photos: int) -> None:
    load, draws, opens, pick = events(client)
    print(f"{'view':12}{'first':>8}{'again':>8}{'plain forward':>15}")
    for tab, draw in draws.items():
        first, again, plain = [], [], []
        for i in range(photos):
            explorer._kept.clear()
            session = f"{random.getrandbits(64):x}"
            ask(client, session, load, [])
            ask(client, session, opens[tab], [])
            ask(client, session, pick, [], {"index": i, "value": None})
            view = replace(View.first(explorer), tab=tab, photo=str(i))
            values = [list(v) if isinstance(v, tuple) else v for v in vars(view).values()]
            first.append(timed(lambda s=session, d=draw, v=values: ask(client, s, d, v)))
            again.append(timed(lambda s=session, d=draw, v=values: ask(client, s, d, v)))
            plain.append(timed(lambda i=i: forward(explorer, i)))
        row = [statistics.median(times) for times in (first, again, plain)]
        print(f"{tab:12}{row[0]:8.2f}{row[1]:8.2f}{row[2]:15.2f}", flush=True)


def forward(explorer: Explorer, photo: int) -> None:
    with evaluating(explorer.vit.model):
        explorer.vit(explorer.gallery[photo].pixels)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def events(client: httpx.Client) -> tuple[int, dict[str, int], dict[str, int], int]:
    """The numbers of the events that fill a page, that draw each tab, that open it, and that pick a photo."""
    config = client.get("/config").json()
    known = {component["id"]: component["props"] for component in config["components"]}
    load, draws, opens, pick = -1, {}, {}, -1
    for event in config["dependencies"]:
        written = [known.get(i, {}).get("elem_id") for i in event["outputs"]]
        for target, trigger in event["targets"]:
            props = known.get(target, {})
            if trigger == "load" and len(event["outputs"]) > 2:
                load = event["id"]
            if props.get("elem_id") == "gallery" and trigger == "select":
                pick = event["id"]
            if props.get("id") in TABS and trigger == "select":
                opens[props["id"]] = event["id"]
        for tab in TABS:
            if f"{tab}-text" in written and len(event["inputs"]) == len(fields(View)):
                draws[tab] = event["id"]
    return load, draws, opens, pick


def ask(
    client: httpx.Client, session: str, event: int, data: list[Any], chosen: dict[str, Any] | None = None
) -> None:
    """Send an event and read the answer to its end."""
    asked = {"data": data, "fn_index": event, "session_hash": session, "event_data": chosen}
    client.post("/gradio_api/queue/join", json=asked).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                assert message["success"], message
                return


if __name__ == "__main__":
    main()
