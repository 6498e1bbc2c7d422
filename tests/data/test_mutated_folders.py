"""A short run of benchmarks/mutated_folders.py, and that it sees what it is there to see."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import mutated_folders
import mutated_formats

from vitreg.data.datasets import boxes
from vitreg.data.listing import LeftOut

FEW = range(2 * len(mutated_formats.FORMATS))


@pytest.fixture(autouse=True)
def everything_is_named(monkeypatch):
    monkeypatch.setattr("vitreg.data.listing.SHOWN", 3)  # put back after the run


def test_forty_mutated_folders_of_all_formats():
    outcomes, failures = mutated_folders.run(FEW)
    assert not failures
    assert set(outcomes) <= {"read", "said", "refused"}
    assert outcomes["read"] + outcomes["said"] > len(FEW) // 4


def test_a_sound_folder_of_every_format_is_read(monkeypatch):
    monkeypatch.setattr(mutated_folders, "mutated", sound)
    outcomes, failures = mutated_folders.run(range(len(mutated_formats.FORMATS)))
    assert not failures
    assert "refused" not in outcomes


def sound(kind, root, rng):
    kind.build(root, rng)
    if isinstance(kind, mutated_formats.Shards):
        kind.write(root)
    for path, text in kind.texts(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return []


def test_a_photo_that_is_lost_an_error_and_a_wrong_box_are_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(mutated_folders, "mutated", sound)
    coco = next(i for i, kind in enumerate(mutated_formats.FORMATS) if kind is mutated_formats.Coco)
    read = boxes.boxed_photos

    def wrongly(root):
        found = read(root)
        return boxes.Boxed(found.root, found.paths[1:], found.sizes[1:], found.boxes[:-1], left_out=())

    for broken in (wrongly, lambda root: 1 / 0):
        monkeypatch.setattr(boxes, "boxed_photos", broken)
        assert mutated_folders.run(range(coco, coco + 1))[1]


def test_what_is_left_out_counts_by_its_path_or_its_folders():
    said = "\n".join(
        f"{one.path}: {one.reason}" for one in [LeftOut("/r/a/b.png", "x"), LeftOut("/r/c", "x")]
    )
    for path, named in (
        ("/r/a/b.png", True),
        ("/r/c/d/e.png", True),
        ("/r/a/b", False),
        ("/r/a/x.png", False),
    ):
        assert mutated_folders.is_said(path, Path("/r"), said + "\n") is named
