"""Image-text shards: read by number as webdataset reads them in a row, and refused where they are damaged."""

import gzip
import io
import os
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch

from vitreg.errors import DataError, OutputError
from vitreg.training import pairs as pairs
from vitreg.training.pairs import CAPTIONS, ImageTextShards, class_name, find_shards, write_pairs

Member = tuple[str, bytes]


def photo(number: int) -> bytes:
    """A PNG of one colour, which tells the number."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (number, 2 * number, 0)).save(file, "PNG")
    return file.getvalue()


def sample(number: int, caption: str | None = None) -> list[Member]:
    text = f"picture {number}" if caption is None else caption
    return [(f"{number:04d}.png", photo(number)), (f"{number:04d}.txt", text.encode())]


def write(path, members: list[Member]):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards of 4, 1 and 5 pairs, numbered in order."""
    for shard, numbers in enumerate((range(4), range(4, 5), range(5, 10))):
        write(tmp_path / f"{shard:03d}.tar", [member for i in numbers for member in sample(i)])
    return tmp_path


def numbers(dataset) -> list[int]:
    return [int(dataset[i][1].split()[1]) for i in range(len(dataset))]


# -- reading -----------------------------------------------------------------------------------------


def streamed(folder):
    """webdataset's own way of reading shards."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


def test_every_pair_by_number_is_webdatasets_own(folder):
    samples = list(streamed(folder))
    dataset = ImageTextShards(folder)
    assert len(dataset) == len(samples) == 10
    for i, expected in enumerate(samples):
        image, text, replaced = dataset[i]
        assert (text, replaced) == (expected["txt"].decode(), 0.0) == (f"picture {i}", 0.0)
        assert image.tobytes() == PIL.Image.open(io.BytesIO(expected["png"])).tobytes()
        assert dataset.name(i) == f"{expected['__url__']}/{expected['__key__']}.png"
    with pytest.raises(IndexError, match="index 10: expected 0 to 9"):
        dataset[10]


def test_sources(folder):
    third = folder / "002.tar"
    for source, expected in (
        (folder, range(10)),
        (str(third), range(5, 10)),
        (f"{folder}/{{000..001}}.tar", range(5)),
        (f"{folder}/00[02].tar", [*range(4), *range(5, 10)]),
        (f"{folder}/{{002,000}}.tar", [*range(5, 10), *range(4)]),
        (f"{third}::{folder}/001.tar", [*range(5, 10), 4]),
    ):
        assert numbers(ImageTextShards(source)) == list(expected)


@pytest.mark.parametrize("missing", ["nowhere", "{000..003}.tar", "*.zip", "empty"])
def test_a_missing_shard_is_named(folder, missing):
    (folder / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"there is no shard .*(nowhere|003\.tar|zip|empty/\*\.tar)\. Expected"
    ):
        find_shards(f"{folder}/{missing}")


def test_no_data_at_all():
    with pytest.raises(DataError, match=r"no shard \(no data was given\).*write_pairs"):
        ImageTextShards("")


def test_captions_in_json_and_other_files_beside(tmp_path):
    members = [
        ("__meta__", b"{}"),
        ("a/1.JPG", photo(1)),
        ("a/1.json", '{"caption": " ein M\u00e4dchen ", "url": "x"}'.encode()),
        ("a/2.png", photo(2)),
        ("a/2.json", b'{"caption": "unused"}'),
        ("a/2.txt", b"the text\n"),
        ("a/2.seg.png", photo(9)),
    ]
    dataset = ImageTextShards(write(tmp_path / "x.tar", members))
    assert [dataset[i][1] for i in range(len(dataset))] == ["ein M\u00e4dchen", "the text"]
    assert np.asarray(dataset[1][0])[0, 0, 0] == 2
    assert dataset.name(0) == f"{tmp_path}/x.tar/a/1.JPG"


def test_transform_and_tokenizer(folder):
    image, tokens, _ = ImageTextShards(folder, lambda image: image.size, len)[0]
    assert (image, tokens) == ((6, 4), len("picture 0"))


def test_the_index_is_kept_beside_the_shard_until_it_changes(folder, monkeypatch):
    before = numbers(ImageTextShards(folder))
    scanned = []
    scan = pairs._index
    monkeypatch.setattr(pairs, "_index", lambda shard: scanned.append(shard.name) or scan(shard))
    assert numbers(ImageTextShards(folder)) == before
    assert not scanned
    write(folder / "001.tar", sample(20) + sample(21))
    assert numbers(ImageTextShards(folder)) == [0, 1, 2, 3, 20, 21, *range(5, 10)]
    assert scanned == ["001.tar"]
    for kept in folder.glob(".*.npy"):
        kept.write_bytes(b"damaged")
    assert len(ImageTextShards(folder)) == 11


# -- the order of an epoch ---------------------------------------------------------------------------


def test_an_epoch_holds_every_pair_once_in_a_new_order(folder):
    dataset = ImageTextShards(folder)
    first, again, other = (dataset.order(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == list(range(10)) != first


def test_a_large_data_set_is_read_shard_by_shard(tmp_path):
    for shard in range(6):
        write(tmp_path / f"{shard}.tar", [member for i in range(4) for member in sample(4 * shard + i)])
    dataset = ImageTextShards(tmp_path, window=8)
    first, other = (dataset.order(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert sorted(first) == list(range(24))
    windows = [[i // 4 for i in first[start : start + 8]] for start in (0, 8, 16)]
    assert all(len(set(window)) == 2 for window in windows)  # two shards at a time, of the six
    assert any(window != sorted(window) and window != sorted(window)[::-1] for window in windows)
    assert [i // 4 for i in first] != [i // 4 for i in other]


# -- damaged pictures --------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_decoded_is_replaced_named_and_counted(tmp_path):
    members = [*sample(0), ("0001.png", photo(1)[:40]), ("0001.txt", b"lost"), *sample(2)]
    dataset = ImageTextShards(write(tmp_path / "x.tar", members))
    with pytest.warns(UserWarning, match=r"x\.tar/0001\.png is left out: \w+"):
        image, caption, replaced = dataset[1]
    assert (caption, replaced) == ("picture 2", 1.0)
    assert np.asarray(image)[0, 0, 0] == 2
    assert dataset[2][2] == 0.0


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_many_in_a_row_are_no_accident(tmp_path):
    bad = [member for i in range(30) for member in ((f"{i}.png", b"nothing"), (f"{i}.txt", b"a word"))]
    dataset = ImageTextShards(write(tmp_path / "x.tar", bad + sample(77)))
    with pytest.raises(DataError, match=r"10 pictures in a row cannot be decoded, from .*/5\.png on"):
        dataset[5]
    assert dataset[25][1] == "picture 77"


# -- bad shards are refused before training ----------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("7.png", photo(7))], "of 3 samples, 1 have no caption; the first is 7. Expected for each KEY"),
        ([("7.png", photo(7)), ("7.txt", b" \n")], "of 3 samples, 1 have no caption; the first is 7"),
        ([("7.png", photo(7)), ("7.json", b'{"text": "x"}')], "of 3 samples, 1 have no caption"),
        ([("7.png", photo(7)), ("7.json", b'{"caption": 3}')], "of 3 samples, 1 have no caption"),
        ([("7.png", photo(7)), ("7.json", b"no json")], "of 3 samples, 1 have no caption"),
        ([("7.txt", b"alone"), ("8.png", b""), ("8.txt", b"b")], "of 4 samples, 2 have no image"),
        ([("7.mp4", b"x"), ("7.txt", b"b")], "of 3 samples, 1 have no image; the first is 7"),
        ([("7.png", photo(7)), ("7.txt", "é".encode("latin1"))], "1 have a caption that is not UTF-8"),
        ([("7.png", photo(7)), ("8.txt", b"b")], "1 have no caption, 1 have no image"),
        ([*sample(7), ("0007.jpg", photo(8))], "of 3 samples, 1 have several images; the first is 0007"),
        ([("7.png", photo(7)), ("7.png", photo(7))], "is not a complete tar.*duplicate"),
    ],
)  # fmt: skip
def test_samples_without_image_or_caption(tmp_path, members, expected):
    shard = write(tmp_path / "bad.tar", sample(1) + members + sample(2))
    write(tmp_path / "a-good.tar", sample(3))
    with pytest.raises(DataError, match=rf"/bad\.tar.*{expected}"):
        ImageTextShards(tmp_path)
    assert not list(tmp_path.glob(".bad*"))
    assert shard.exists()


@pytest.mark.parametrize(
    "end",
    [
        512 + 20,  # inside the first member
        2 * 512 + 100,  # inside a header
        2 * 512,  # between members
        4 * 512,  # all members, but without the end of the archive
    ],
)
def test_a_shard_that_was_cut_off(tmp_path, end):
    whole = write(tmp_path / "x.tar", sample(1)).read_bytes()
    assert whole[4 * 512 :].count(0) == len(whole) - 4 * 512  # two members of header and one block each
    (tmp_path / "x.tar").write_bytes(whole[:end])
    with pytest.raises(
        DataError, match=r"x\.tar is not a complete tar file without compression: .*Get it anew"
    ):
        ImageTextShards(tmp_path)


def test_a_shard_with_a_damaged_header(tmp_path):
    content = bytearray(write(tmp_path / "x.tar", sample(1) + sample(2)).read_bytes())
    content[4 * 512 : 4 * 512 + 50] = os.urandom(50)
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar is not a complete tar .*damaged, at byte 2048"):
        ImageTextShards(tmp_path)


def test_compressed_shards_and_other_files(tmp_path):
    shard = write(tmp_path / "x.tar", sample(1))
    for content in (gzip.compress(shard.read_bytes()), b"", photo(1)):
        shard.write_bytes(content)
        with pytest.raises(
            DataError, match=r"x\.tar is not a complete tar file without compression.*or unpack it"
        ):
            ImageTextShards(shard)


def test_an_empty_shard(tmp_path):
    with pytest.raises(DataError, match=r"x\.tar holds no sample\. Expected KEY\.jpg and KEY\.txt"):
        ImageTextShards(write(tmp_path / "x.tar", []))


def test_hidden_members_and_links_are_named(tmp_path):
    members = [*sample(1), (".7.png", photo(7)), ("a/._8.png", b"of a Mac"), *sample(2)]
    shard = write(tmp_path / "x.tar", members)
    with tarfile.open(shard, "a") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo(f"9-{kind.decode()}.png")
            link.type, link.linkname = kind, "0001.png"
            tar.addfile(link)
    with pytest.warns(UserWarning, match="left out") as caught:
        assert numbers(ImageTextShards(shard)) == [1, 2]
    assert [str(one.message) for one in caught] == [
        f"1 left out (a hidden file): {shard}/.7.png",
        f"2 left out (a link): {shard}/9-1.png, {shard}/9-2.png",
    ]


def test_shards_that_a_folder_holds_besides_are_named(folder):
    (folder / "deep").mkdir()
    write(folder / "deep/9.tar", sample(9))
    (folder / "8.tar.gz").write_bytes(b"")
    with pytest.warns(
        UserWarning, match=r"2 left out \(a shard that is compressed or in a folder below.*8.tar.gz"
    ):
        assert len(ImageTextShards(folder)) == 10


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"x\.tar cannot be read: (is|No such)"):
        ImageTextShards(tmp_path)


def test_a_captions_byte_order_mark_is_no_part_of_it(tmp_path):
    members = [("1.png", photo(1)), ("1.txt", "a word".encode("utf-8-sig"))]
    assert ImageTextShards(write(tmp_path / "x.tar", members)).caption(0) == "a word"


def test_braces_that_do_not_close(tmp_path):
    with pytest.raises(DataError, match="is not a list of shards"):
        find_shards(f"{tmp_path}/{{00..01.tar")


# -- shards from labelled photos ---------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(("n01440764", "garbage_truck")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for j in range(4):
            (tmp_path / "photos" / name / f"{j}.png").write_bytes(photo(100 * i + j))
    return tmp_path / "photos"


def test_write_pairs(photos, tmp_path):
    shards = write_pairs(photos, tmp_path / "50% off", per_shard=3)
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    dataset = ImageTextShards(tmp_path / "50% off")
    assert dataset.shards == shards
    found = [
        (int(np.asarray(image)[0, 0, 0]), caption) for image, caption, _ in map(dataset.__getitem__, range(8))
    ]
    assert sorted(red for red, _ in found) == [0, 1, 2, 3, 100, 101, 102, 103]
    assert [red < 100 for red, _ in found] != sorted(red < 100 for red, _ in found)  # mixed
    for i, (red, caption) in enumerate(found):
        assert caption == CAPTIONS[i % len(CAPTIONS)].format("tench" if red < 100 else "garbage truck")
    again = write_pairs(photos, tmp_path / "again", per_shard=3)
    assert [a.read_bytes() for a in again] == [b.read_bytes() for b in shards]


def test_write_pairs_with_templates_of_ones_own(photos, tmp_path):
    (shard,) = write_pairs(photos, tmp_path / "out", ["one {}"])
    dataset = ImageTextShards(shard)
    assert {dataset.caption(i) for i in range(8)} == {"one tench", "one garbage truck"}


def test_write_pairs_refuses_what_it_cannot_do(photos, tmp_path):
    (photos / "loose.png").write_bytes(photo(1))
    with pytest.raises(DataError, match=r"loose\.png lies in no class's folder"):
        write_pairs(photos, tmp_path / "out")
    (photos / "loose.png").unlink()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write shards into .*file: "):
        write_pairs(photos, tmp_path / "file")
    with pytest.raises(DataError, match="there is no folder"):
        write_pairs(tmp_path / "nowhere", tmp_path / "out")


def test_class_names():
    assert class_name("n02979186") == "cassette player"
    assert class_name("golden_retriever-dog") == "golden retriever dog"
    assert class_name("n99999999") == "n99999999"
