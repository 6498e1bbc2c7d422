"""Several ranks find what one process finds, whatever their number, the batches and the bad files."""

import pickle
import tarfile
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phantoms import Planted, save_crops
from ranked import copied, differences, of_each

import vitreg
from vitreg.data.first_images import First, first_images
from vitreg.data.images import Images, read_images
from vitreg.diagnosis.diagnosing import diagnose
from vitreg.distributed import ALONE, Ranks, process_group
from vitreg.errors import DataError, ImageError, RankError
from vitreg.features import Config, extract_features
from vitreg.search.fix_search import find_fix
from vitreg.verification.measuring import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, with bad files here and there."""
    photos = save_crops(tmp_path_factory.mktemp("photos"), 44)
    for i in (0, 7, 8, 30):
        (photos / f"{i:03}.png").write_text("bad")
    return photos


@pytest.fixture(scope="module")
def planted(folder: Path) -> Planted:
    return Planted(folder)


def shade(image: PIL.Image.Image) -> torch.Tensor:
    return torch.full((3, 2, 2), float(image.getpixel((0, 0))[0]))


def save_shades(folder: Path, bad: list[bool]) -> Path:
    for i, is_bad in enumerate(bad):
        path = folder / f"{i:03}.png"
        path.write_text("bad") if is_bad else PIL.Image.new("RGB", (2, 2), (i, i, i)).save(path)
    return folder


def seen_by(images: Images) -> tuple[list[tuple[int, str, float]], list[str]]:
    """The place, name and shade of each image, and the names of those that failed."""
    found = []
    for batch in images:
        assert batch.places is not None
        found += [
            (place, Path(name).name, float(pixels[0, 0, 0]))
            for place, name, pixels in zip(batch.places, batch.names, batch.pixels, strict=True)
        ]
    return found, [Path(failed.path).name for failed in images.failed]


@settings(max_examples=40, deadline=None)
@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=24),
    size=st.integers(2, 5),
    batch=st.integers(1, 6),
    limit=st.none() | st.integers(1, 6),
)
@example(bad=[False] * 10, size=2, batch=6, limit=3)
@example(bad=[False, True] * 6, size=3, batch=2, limit=4)
@example(bad=[True] * 5, size=2, batch=2, limit=None)
def test_the_shares_make_up_what_one_process_reads(
    bad: list[bool], size: int, batch: int, limit: int | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = save_shades(Path(name), bad)

        def read(ranks: Ranks) -> Any:
            return seen_by(read_images(folder, shade, batch_size=batch, limit=limit, workers=0, ranks=ranks))

        shares = of_each(size, read)
        if all(bad):
            assert [type(share) for share in shares] == [ImageError] * size
            assert len({str(share) for share in shares}) == 1
            return
        whole, failed = read(ALONE)
        assert sorted(image for found, _ in shares for image in found) == whole
        assert [theirs for _, theirs in shares] == [failed] * size


def test_web_datasets_are_shared_too(tmp_path: Path) -> None:
    shades = save_shades(tmp_path, [i in (3, 11) for i in range(14)])
    for k in range(2):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as tar:
            for i in range(7 * k, 7 * k + 7):
                tar.add(shades / f"{i:03}.png", f"{i:03}.png")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    source = [str(tmp_path / name) for name in ("0.tar", "empty.tar", "1.tar")]

    def read(ranks: Ranks) -> Any:
        return seen_by(read_images(source, shade, batch_size=3, workers=0, ranks=ranks))

    shares = of_each(3, read)
    whole, failed = read(ALONE)
    assert sorted(image for found, _ in shares for image in found) == whole
    assert [theirs for _, theirs in shares] == [failed] * 3
    assert len(whole) == 12


def test_worker_processes_share_a_ranks_share(tmp_path: Path) -> None:
    folder = save_shades(tmp_path, [i % 9 == 4 for i in range(50)])
    for workers in (0, 2):
        images = read_images(folder, shade, batch_size=4, workers=workers, ranks=Ranks(1, 3))
        names = [outcome[0] if isinstance(outcome, tuple) else outcome.path for outcome in images._outcomes()]
        assert [int(Path(name).stem) for name in names] == [i for i in range(50) if i // 4 % 3 == 1]


def test_strict_stops_every_rank_at_the_same_file(tmp_path: Path) -> None:
    folder = save_shades(tmp_path, [i in (5, 6) for i in range(9)])
    found = of_each(
        3,
        lambda ranks: seen_by(read_images(folder, shade, batch_size=2, strict=True, workers=0, ranks=ranks)),
    )
    assert len({str(error) for error in found}) == 1
    assert "005.png" in str(found[0])


@pytest.mark.parametrize("count", [1, 5, 30, 100])
def test_the_first_images_are_the_same_on_every_rank(folder: Path, planted: Planted, count: int) -> None:
    def first(ranks: Ranks) -> torch.Tensor:
        return first_images(read_images(folder, planted.vit, batch_size=4, workers=0, ranks=ranks), count)

    whole = first(ALONE)
    assert len(whole) == min(count, 40)
    for found in of_each(3, first):
        assert torch.equal(found, whole)


def test_what_is_sent_of_a_batch_is_not_all_of_it() -> None:
    kept = First(2, [])
    kept.add(torch.zeros(64, 3, 8, 8))
    assert len(pickle.dumps(kept._kept)) < 6_000  # two images of 768 bytes; the batch has 49,152


def found_by(planted: Planted, folder: Path, work: Callable[[vitreg.Backbone, Images], Any]) -> Any:
    def run(ranks: Ranks) -> Any:
        vit = copied(planted.vit)
        batch = 32 if ranks is ALONE else 3
        return work(vit, read_images(folder, vit, batch_size=batch, workers=0, ranks=ranks)).to_json()

    return run


@pytest.mark.parametrize("size", [2, 3, 15])
def test_one_diagnosis(planted: Planted, folder: Path, size: int) -> None:
    """Of 15 ranks, the last has no image."""
    run = found_by(planted, folder, diagnose)
    whole = run(ALONE)
    assert (whole["images"], whole["verdict"], len(whole["failed_images"])) == (40, "artifacts", 4)
    for found in of_each(size, run):
        assert differences(found, whole) == []


def test_one_diagnosis_whatever_the_order(planted: Planted, folder: Path) -> None:
    paths = sorted(folder.iterdir())

    def run(ranks: Ranks) -> Any:
        vit = copied(planted.vit)
        order = paths if ranks is ALONE else sorted(paths, key=lambda path: path.name[::-1])
        photos = read_images(order, vit, batch_size=5, workers=0, ranks=ranks)
        found = diagnose(vit, photos).to_json()
        return found | {"failed_images": sorted(failed["path"] for failed in found["failed_images"])}

    whole = run(ALONE)
    for found in of_each(2, run):
        assert differences(found, whole) == []


def test_one_set_of_examples(planted: Planted, folder: Path) -> None:
    def run(ranks: Ranks) -> list[str]:
        vit = copied(planted.vit)
        photos = read_images(folder, vit, batch_size=3, workers=0, ranks=ranks)
        return [Path(example.name).name for example in diagnose(vit, photos, examples=9).examples]

    whole = run(ALONE)
    assert len(whole) == 9
    assert of_each(3, run) == [whole] * 3


@pytest.mark.parametrize("kind", ["auto", "registers", "splitting", "bias"])
def test_one_fix(planted: Planted, folder: Path, kind: Any) -> None:
    run = found_by(planted, folder, lambda vit, photos: find_fix(vit, photos, kind=kind))
    whole = run(ALONE)
    assert whole["neurons"]
    for found in of_each(2, run):
        assert differences(found, whole, 2e-6) == []


def test_one_verdict(planted: Planted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("vitreg.verification.measuring"), "CONTROL_IMAGES", 15)  # every third
    run = found_by(planted, folder, lambda vit, photos: verify(vit, planted.register, photos))
    whole = run(ALONE)
    assert (whole["images"], whole["control_images"]) == (40, 14)
    for found in of_each(3, run):
        assert differences(found, whole) == []


@pytest.mark.parametrize("cached", [False, True])
def test_one_set_of_features(folder: Path, planted: Planted, cached: bool, tmp_path: Path) -> None:
    """Each rank computes some of the files of 64 photos, and no other."""
    paths = sorted(folder.iterdir()) + sorted(save_crops(tmp_path / "more", 60, seed=1).iterdir())
    computed = []

    def run(ranks: Ranks) -> Any:
        vit = copied(planted.vit)
        cache = tmp_path / "cache" if cached and ranks is not ALONE else None
        config = Config(workers=0, batch_size=8, cache=cache, ranks=ranks)
        counted = vit.model.register_forward_hook(
            lambda _, given, __: computed.append((ranks.rank, len(given[0])))
        )
        found = extract_features(vit, paths, ["cls", "norms"], config)
        counted.remove()
        return found.index, found.failed, found["cls"], found["norms"]

    index, failed, cls, norms = run(ALONE)
    assert (len(index), len(failed)) == (100, 4)
    computed.clear()
    for theirs in of_each(2, run):
        assert theirs[:2] == (index, failed)
        assert torch.equal(theirs[2], cls)
        assert torch.equal(theirs[3], norms)
    batches = sorted(pair for pair in computed if pair[1] > 1)  # what is probed first is one image
    assert batches == [(0, 4), *[(0, 8)] * 7, *[(1, 8)] * 5]


def test_a_cache_that_is_not_shared_is_said_to_be(folder: Path, planted: Planted, tmp_path: Path) -> None:
    paths = sorted(save_crops(tmp_path / "photos", 70).iterdir())

    def run(ranks: Ranks) -> Any:
        config = Config(workers=0, cache=tmp_path / f"cache{ranks.rank}", ranks=ranks)
        return extract_features(copied(planted.vit), paths, ["cls"], config)

    found = of_each(2, run)
    assert [type(error) for error in found] == [DataError] * 2
    assert "a folder that all machines share" in str(found[0])


def test_one_that_fails_takes_the_others_along(folder: Path, planted: Planted) -> None:
    def run(ranks: Ranks) -> Any:
        vit = copied(planted.vit)
        if ranks.rank == 1:
            with torch.no_grad():
                vit.anatomy.down_projections(vit.model)[1].weight.fill_(float("nan"))
        return diagnose(vit, read_images(folder, vit, batch_size=4, workers=0, ranks=ranks))

    found = of_each(3, run)
    assert [type(error) for error in found] == [RankError, vitreg.NonFiniteError, RankError]


def test_without_torchrun_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as ranks:
        assert ranks is ALONE
    assert ranks.first
    assert ranks.gather(3) == [3]
