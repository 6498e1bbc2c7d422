"""What the diagnosis says of each kind of artifact in the two real models, present or not.

python benchmarks/kinds.py ../shared --limit 250 --markdown docs/kinds.md
"""

import argparse
from pathlib import Path

from evidence import MODELS, PHOTOS

import vitreg

HEADER = """# Every kind of artifact in two real models

`python benchmarks/kinds.py ../shared --limit 250 --markdown docs/kinds.md`
"""


def section(report: vitreg.Diagnosis) -> str:
    """The verdict on norms, and each kind with whether it is there; layers are 0-based."""
    lines = [f"| high norms | {'**yes**' if report.has_artifacts else 'no'} | {report.reason} |"]
    for finding in report.kinds:
        present = "**yes**" if finding.present else "no"
        lines.append(f"| {finding.kind} | {present} | {str(finding).replace('|', '/')} |")
    head = f"## {Path(report.model).name}, {report.images} photos, {report.image_size[0]} px"
    return "\n".join([head, "", "| kind | there | what was measured |", "|---|---|---|", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path, help="the folder with models/ and data/")
    parser.add_argument("--limit", type=int, help="photos, of 1000")
    parser.add_argument("--markdown", type=Path, help="also write the page here")
    args = parser.parse_args()
    sections = [HEADER]
    for folder in MODELS.values():
        vit = vitreg.load(str(args.shared / "models" / folder))
        photos = vitreg.read_images(str(args.shared / PHOTOS), vit, limit=args.limit)
        sections.append(section(vitreg.diagnose(vit, photos, examples=0)))
    page = "\n".join(sections)
    print(page)
    if args.markdown:
        args.markdown.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
