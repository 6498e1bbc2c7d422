"""What lies in an archive is found, cut the same way every time, and read; what is wrong is said."""

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from archives import BAD, parquet, photos, png, tar

from vitreg.archive.sources import Shard, find_archive, image_column, items
from vitreg.archive.storage import Storage
from vitreg.data.listing import FailedImage
from vitreg.errors import DataError, OutputError


def read(archive, images=10, column=None):
    """All items of all shards, in order."""
    found = [items(archive.place, archive.kind, shard, column) for shard in archive.shards(images)]
    return [item for shard in found for item in shard]


def test_photos_of_a_tree_are_cut_in_sorted_order(tmp_path):
    archive = find_archive(str(photos(tmp_path, 7, bad=True)))
    assert archive.kind == "images"
    shards = list(archive.shards(4))
    assert [len(shard.files) for shard in shards] == [4, 4, 1]
    names = [name for shard in shards for name in shard.files]
    assert names == sorted(names)
    assert set(BAD) < set(names)
    assert names[0] == "a/0000.png"


def test_hidden_files_and_what_is_no_photo_are_left_out(tmp_path):
    photos(tmp_path, 2)
    (tmp_path / "a/.hidden.png").write_bytes(png(0))
    (tmp_path / "notes.md").write_text("")
    with pytest.warns(UserWarning, match=r"1 left out \(a hidden file\): .*/a/\.hidden\.png"):
        found = find_archive(str(tmp_path))
    assert list(found.files) == ["a/0000.png", "b/0001.png"]
    assert [Path(one.path).name for one in found.left_out] == [".hidden.png"]


def test_links_are_followed(tmp_path):
    photos(tmp_path / "far", 2)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/linked").symlink_to(tmp_path / "far")
    assert list(find_archive(str(tmp_path / "here")).files) == ["linked/a/0000.png", "linked/b/0001.png"]


@pytest.mark.parametrize("pattern", ["", "a", "a/*.png", "a/0000.png"])
def test_a_folder_a_glob_and_a_file(tmp_path, pattern):
    archive = find_archive(str(photos(tmp_path, 4) / pattern))
    assert len(archive.files) == {"": 4, "a": 2, "a/*.png": 2, "a/0000.png": 1}[pattern]
    for name, content in read(archive):
        assert os.path.isfile(archive.place.child(content)), name


def test_every_tar_is_a_shard(tmp_path):
    for number in range(2):
        tar(tmp_path / f"{number}.tar", {f"{i}.png": png(i) for i in range(3)} | {"0.txt": b"a caption"})
    archive = find_archive(str(tmp_path))
    assert [shard.files for shard in archive.shards(2)] == [("0.tar",), ("1.tar",)]
    found = read(archive)
    assert [name for name, _ in found] == [f"{n}.tar/{i}.png" for n in range(2) for i in range(3)]
    assert found[4][1] == png(1)


def test_a_truncated_tar_gives_what_it_holds_and_says_so(tmp_path):
    path = tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(4)})
    path.write_bytes(path.read_bytes()[:9000])
    *good, last = read(find_archive(str(path)))
    assert [name for name, _ in good] == ["x.tar/0.png"]
    assert isinstance(last, FailedImage)
    assert last.path == "x.tar"
    assert "cannot be read any further" in last.reason


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_is_cut_at_row_groups(tmp_path, struct):
    parquet(tmp_path / "x.parquet", [png(i) for i in range(9)], group=2, struct=struct)
    archive = find_archive(str(tmp_path))
    shards = list(archive.shards(4))
    assert [(s.first, s.groups, s.row) for s in shards] == [(0, 2, 0), (2, 2, 4), (4, 1, 8)]
    assert read(archive, 4) == [(f"x.parquet#{i}", png(i)) for i in range(9)]


def test_a_row_group_larger_than_a_shard_is_one(tmp_path):
    parquet(tmp_path / "x.parquet", [png(i) for i in range(6)], group=3)
    assert [s.groups for s in find_archive(str(tmp_path)).shards(2)] == [1, 1]


def test_parquet_without_an_image_in_a_row(tmp_path):
    parquet(tmp_path / "x.parquet", [png(0), None, png(2)], group=3)
    assert read(find_archive(str(tmp_path)))[1] == FailedImage("x.parquet#1", "no image bytes")


def test_damaged_parquet_is_found_out_when_it_is_read(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    [failed] = read(find_archive(str(tmp_path)))
    assert "cannot be read any further" in failed.reason


def test_the_column_with_images():
    def column(**kinds):
        return image_column(pa.schema(kinds.items()), "x.parquet")

    assert column(id=pa.int64(), picture=pa.binary()) == "picture"
    assert column(image=pa.struct({"bytes": pa.binary(), "path": pa.string()}), mask=pa.binary()) == "image"
    with pytest.raises(DataError, match=r"left, right all hold bytes. Expected one .*--column"):
        column(left=pa.binary(), right=pa.large_binary())
    with pytest.raises(DataError, match=r"columns are .*'id'"):
        column(id=pa.int64())


def test_an_archive_behind_fsspec():
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe_file(f"/far/{number}.png", png(number))
    archive = find_archive("memory://far")
    [shard] = archive.shards(10)
    assert shard == Shard(0, ("0.png", "1.png", "2.png"))
    assert archive.place.read("1.png") == png(1)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"is empty or not there.*Expected photos .*\.tar.*\.parquet"):
        find_archive(str(tmp_path / "nowhere"))
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match="has 1 files, but none named like an image archive"):
        find_archive(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_cannot_be_read_is_no_archive(tmp_path):
    closed = photos(tmp_path, 2) / "b"
    closed.chmod(0)
    with pytest.raises(DataError, match=r"/b cannot be listed: Permission denied. See to its permissions"):
        find_archive(str(tmp_path))
    closed.chmod(0o755)


def test_a_remote_place_without_its_driver_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(DataError, match=r"s3://bucket/photos cannot be reached: Install s3fs"):
        find_archive("s3://bucket/photos")


def test_an_unknown_protocol():
    with pytest.raises(DataError, match=r"nosuch://x cannot be reached: .*nosuch.*Expected a path or a URL"):
        Storage.at("nosuch://x")


def test_a_place_is_written_whole_or_not_at_all(tmp_path):
    place = Storage.at(tmp_path / "out")
    place.make("done")
    place.write("done/1.json", b"{}")
    assert place.names("done") == ["1.json"]
    assert place.names("nowhere") == []
    (tmp_path / "out/.vitreg-0123.tmp").write_bytes(b"half")
    place.remove_partial()
    assert place.names() == ["done"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/out: .*Choose another place"):
        Storage.at(tmp_path / "file/out").make("done")


def test_many_files_of_a_remote_place_come_in_order():
    place = Storage.at("memory://many")
    for number in range(7):
        place.write(f"{number}", str(number).encode())
    assert list(place.read_all([f"{n}" for n in (3, 1, 6, 0, 2)], at_once=2)) == [
        b"3",
        b"1",
        b"6",
        b"0",
        b"2",
    ]
