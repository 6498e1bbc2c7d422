"""One worker, one shard: the features of plain passes in files that others can read, and an honest entry."""

import json
import os
import time

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from archives import contents, parquet, photos, png, rows, tar, tiny, worker
from safetensors.torch import load_file
from training_runs import full_disk

import vitreg
from vitreg.archive import shard_files as parts_module
from vitreg.archive import worker as worker_module
from vitreg.data.decoding import decode
from vitreg.errors import ArchiveError, DataError, OutputError
from vitreg.fixes.neurons import RegisterNeuron, RegisterNeurons
from vitreg.tracing.records import trace


def plain(vit, numbers) -> torch.Tensor:
    """All tokens after the norm (n, t, d), by the model's own means."""
    pixels = torch.stack([vit.preprocess(decode(png(number))) for number in numbers])
    with torch.no_grad():
        return vit.model.forward_features(pixels)


def test_the_files_hold_what_plain_passes_give(tmp_path):
    vit, out = tiny(), tmp_path / "out"
    entry = worker(vit, photos(tmp_path / "in", 6, bad=True), out, tokens=["cls", "mean", "patches"]).run(0)
    order = [0, 2, 4, 1, 3, 5]  # a/, then b/
    expected = plain(vit, order)
    table = rows(out)
    assert table["name"] == [f"{'ab'[n % 2]}/{n:04d}.png" for n in order]
    torch.testing.assert_close(torch.tensor(table["cls"]), expected[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(table["mean"]), expected[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
    maps = load_file(out / "patches/000000-000.safetensors")["patches"]
    torch.testing.assert_close(maps, expected[:, 1:].unflatten(1, (4, 4)), atol=1e-5, rtol=1e-5)
    assert entry["images"] == 6
    assert {image["name"]: image["reason"] for image in entry["failed"]} == {
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image, or in a format that Pillow does not know",
    }
    assert {"decode", "forward", "write", "all"} <= entry["seconds"].keys()


def test_tar_and_parquet_give_the_same_features(tmp_path):
    tar(tmp_path / "tar/x.tar", {f"{i}.png": png(i) for i in range(6)})
    parquet(tmp_path / "parquet/x.parquet", [png(i) for i in range(6)], group=4)
    expected = plain(tiny(), range(6))[:, 0]
    for kind, shards in (("tar", 1), ("parquet", 2)):
        a_worker = worker(tiny(), tmp_path / kind, tmp_path / f"out-{kind}", shard_images=4)
        for index in range(shards):
            a_worker.run(index)
        table = rows(tmp_path / f"out-{kind}")
        torch.testing.assert_close(torch.tensor(table["cls"]), expected, atol=1e-5, rtol=1e-5)
    assert len([*(tmp_path / "out-tar/vectors").iterdir()]) == 2  # a tar of six photos, four to a file


def test_features_are_those_of_the_fixed_model(tmp_path):
    vit = tiny()
    photos(tmp_path / "in", 3)
    fix = vitreg.TestTimeRegisters({0: [3], 1: [5]}, registers=2)
    with fix.applied_to(vit):
        worker(vit, tmp_path / "in", tmp_path / "out", tokens=["cls", "registers"]).run(0)
        expected = plain(vit, [0, 2, 1])
    table = rows(tmp_path / "out")
    torch.testing.assert_close(torch.tensor(table["cls"]), expected[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[:, 0], plain(vit, [0, 2, 1])[:, 0], atol=1e-4)
    assert torch.tensor(table["test_registers"]).shape == (3, 2, 32)


def test_originals_of_split_tokens_are_lists_of_any_length(tmp_path):
    vit = tiny()
    photos(tmp_path / "in", 6)
    pixels = torch.stack([vit.preprocess(decode(png(n))) for n in (0, 2, 4, 1, 3, 5)])
    with trace(vit, neurons=True) as t:
        vit(pixels)
    level = float(t.neurons[0, :, 1:, 3].flatten().quantile(0.8))
    neurons = RegisterNeurons((RegisterNeuron(0, 3, threshold=level),))
    with vitreg.TokenSplitting(neurons, capacity=0.9).applied_to(vit) as handle:
        worker(vit, tmp_path / "in", tmp_path / "out", tokens=["registers"]).run(0)
        with torch.no_grad():
            vit(pixels)
        expected = handle.carried.valid.sum(1).tolist()
    lengths = [len(tokens) for tokens in rows(tmp_path / "out")["test_registers"]]
    assert lengths == expected
    assert len(set(lengths)) > 1


def test_stored_as_float16(tmp_path):
    worker(
        tiny(), photos(tmp_path / "in", 2), tmp_path / "out", tokens=["cls", "patches"], dtype="float16"
    ).run(0)
    kind = pq.read_schema(tmp_path / "out/vectors/000000-000.parquet").field("cls").type
    assert str(kind) == "fixed_size_list<element: halffloat>[32]"
    assert load_file(tmp_path / "out/patches/000000-000.safetensors")["patches"].dtype == torch.float16


def test_layers_have_columns_of_their_own(tmp_path):
    worker(tiny(), photos(tmp_path / "in", 2), tmp_path / "out", layers=[0, 1]).run(0)
    assert list(rows(tmp_path / "out")) == ["name", "cls@0", "cls@1", "mean@0", "mean@1"]


def test_a_file_is_closed_at_so_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_MOST_BYTES", 5000)
    tokens = ["cls", "patches"]
    entry = worker(tiny(), photos(tmp_path / "in", 8), tmp_path / "out", tokens=tokens).run(0)
    assert [file["rows"] for file in entry["files"] if "vectors" in file["file"]] == [3, 3, 2]
    assert all(file["bytes"] == os.path.getsize(tmp_path / "out" / file["file"]) for file in entry["files"])
    assert len(rows(tmp_path / "out")["name"]) == 8


def test_a_finished_shard_is_not_made_again(tmp_path, monkeypatch):
    photos(tmp_path / "in", 3)
    first = worker(tiny(), tmp_path / "in", tmp_path / "out").run(0)
    monkeypatch.setattr(worker_module.ShardWorker, "_make", lambda *_: pytest.fail("made again"))
    assert worker(tiny(), tmp_path / "in", tmp_path / "out").run(0) == first


def test_another_worker_writes_the_same_bytes(tmp_path):
    photos(tmp_path / "in", 9, bad=True)
    for name in ("one", "two"):
        worker(tiny(), tmp_path / "in", tmp_path / name, tokens=["cls", "patches"]).run(0)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != {}


def test_a_photo_whose_features_are_no_numbers_is_a_failure(tmp_path):
    a_worker = worker(tiny(), photos(tmp_path / "in", 3), tmp_path / "out")
    preprocess, bad = a_worker._job.vit.preprocess, decode(png(2))

    def poisoned(image):
        return preprocess(image) * (float("nan") if image == bad else 1)

    object.__setattr__(a_worker._job.vit, "preprocess", poisoned)
    entry = a_worker.run(0)
    assert entry["failed"] == [{"name": "a/0002.png", "reason": "its features are not finite in float32"}]
    assert rows(tmp_path / "out")["name"] == ["a/0000.png", "b/0001.png"]


def test_what_float16_cannot_hold_is_a_failure(tmp_path):
    vit = tiny()
    with torch.no_grad():
        vit.model.norm.weight.fill_(1e6)
    entry = worker(vit, photos(tmp_path / "in", 3), tmp_path / "out", dtype="float16").run(0)
    assert (entry["images"], entry["files"]) == (0, [])
    assert {image["reason"] for image in entry["failed"]} == {"its features are not finite in float16"}


def test_a_full_disk_leaves_no_entry_and_no_part_of_a_file(tmp_path):
    a_worker = worker(tiny(), photos(tmp_path / "in", 10), tmp_path / "out", tokens=["cls", "patches"])
    with full_disk(10_000), pytest.raises(OutputError, match=r"cannot write .*safetensors: File too large"):
        a_worker.run(0)
    assert not [*(tmp_path / "out/done").iterdir()]
    assert not [*(tmp_path / "out").rglob("*.tmp")]
    assert contents(tmp_path / "out") == {}
    assert a_worker.run(0)["images"] == 10  # there is room again


def test_no_space_left_is_said(tmp_path, monkeypatch):
    a_worker = worker(tiny(), photos(tmp_path / "in", 3), tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device. Choose another place, or see to space"):
        a_worker._make(0)


def test_a_shard_that_kills_its_workers_is_given_up(tmp_path, monkeypatch):
    photos(tmp_path / "in", 3)
    a_worker = worker(tiny(), tmp_path / "in", tmp_path / "out")

    def dies(*_):
        raise SystemError("as good as a SIGKILL")

    with monkeypatch.context() as context:
        context.setattr(worker_module.ShardWorker, "_make", dies)
        for _ in range(4):
            with pytest.raises(SystemError):
                a_worker.run(0)
    with pytest.raises(ArchiveError, match=r"shard 0 has been begun 4 times.*starts with a/0000.png"):
        a_worker.run(0)


@pytest.mark.parametrize("place", ["in", "out"])
def test_a_place_that_a_workers_machine_does_not_see(tmp_path, place):
    a_worker = worker(tiny(), photos(tmp_path / "in", 3), tmp_path / "out")
    (tmp_path / place).rename(tmp_path / "elsewhere")
    with pytest.raises(
        ArchiveError, match=rf"/{place} is not there on .*, where a worker runs. Expected a p"
    ):
        a_worker.run(0)


def test_the_count_of_tries_goes_with_success(tmp_path):
    a_worker = worker(tiny(), photos(tmp_path / "in", 3), tmp_path / "out")
    a_worker.run(0)
    assert not [*(tmp_path / "out/trying").iterdir()]


def test_a_photo_that_has_gone_meanwhile_is_a_failure(tmp_path):
    a_worker = worker(tiny(), photos(tmp_path / "in", 3), tmp_path / "out")
    (tmp_path / "in/a/0002.png").unlink()
    entry = a_worker.run(0)
    assert entry["failed"] == [{"name": "a/0002.png", "reason": "No such file or directory"}]


def test_a_parquet_file_without_images_stops_the_run(tmp_path):
    parquet(tmp_path / "in/x.parquet", [png(0)], group=1)
    a_worker = worker(tiny(), tmp_path / "in", tmp_path / "out", column="nosuch")
    with pytest.raises(DataError, match="has no column 'nosuch', but label, image"):
        a_worker.run(0)


@pytest.mark.parametrize("remote", [False, True])
def test_photos_are_read_ahead_where_that_gains(tmp_path, monkeypatch, remote):
    """Beside a forward pass that has all cores busy they would only hold it up."""
    data = photos(tmp_path / "in", 20)
    if remote:
        fsspec.filesystem("memory").put(str(data), "/ahead", recursive=True)
    read, seen = [], []
    read_item = worker_module.read_item
    monkeypatch.setattr(
        worker_module, "read_item", lambda item, preprocess: read.append(item) or read_item(item, preprocess)
    )
    a_worker = worker(tiny(), "memory://ahead" if remote else data, tmp_path / "out", shard_images=20)

    def observe(pixels):
        last = time.monotonic() + (5 if remote else 0.3)
        while not seen and len(read) < 8 and time.monotonic() < last:
            time.sleep(0.01)
        seen.append(len(read))
        return the_rest(pixels)

    the_rest = a_worker._observe
    a_worker._observe = observe
    assert a_worker.run(0)["images"] == 20
    batch, threads = 4, 1
    assert seen[0] >= 2 * batch if remote else seen[0] <= batch + 2 * threads


def test_from_memory_to_memory():
    for number in range(3):
        fsspec.filesystem("memory").pipe_file(f"/photos/{number}.png", png(number))
    a_worker = worker(tiny(), "memory://photos", "memory://features-out")
    assert a_worker.run(0)["images"] == 3
    out = a_worker._job.out
    with out.open("vectors/000000-000.parquet") as file:
        found = np.array(pq.read_table(file)["cls"].to_pylist())
    np.testing.assert_allclose(found, plain(tiny(), range(3))[:, 0], atol=1e-5)
    assert json.loads(out.read("done/000000.json"))["shard"] == 0
