"""The plan is written once; a run that would not do the same is refused, and what differs is named."""

import json

import pytest
import torch
from archives import photos, png, tiny, worker

import vitreg
from vitreg.archive.plan import read_shard
from vitreg.archive.run import features_of
from vitreg.archive.storage import Storage
from vitreg.errors import ArchiveError, DataError, UnsupportedModelError


def test_a_shard_is_found_behind_the_first_group(tmp_path):
    worker(tiny(), photos(tmp_path / "in", 70), tmp_path / "out", shard_images=1)
    place = Storage.at(tmp_path / "out")
    for index in (0, 63, 64, 69):
        shard = read_shard(place, index)
        assert (shard.index, len(shard.files)) == (index, 1)
    assert read_shard(place, 69).files == ("b/0069.png",)
    assert json.loads((tmp_path / "out/plan.json").read_text())["shards"] == 70


def test_the_same_settings_are_welcome_again(tmp_path):
    photos(tmp_path / "in", 3)
    for _ in range(2):
        worker(tiny(), tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float16"}, "dtype was float32, is float16"),
        ({"batch_size": 5}, "batch_size was 4, is 5"),
        ({"shard_images": 11}, "shard_images was 10, is 11"),
        ({"tokens": ["mean"]}, r"features was .*cls.*, is .*mean"),
        ({"layers": [0]}, "features was .*, is .*cls@0"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, named):
    photos(tmp_path / "in", 3)
    worker(tiny(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(ArchiveError, match=rf"made with other settings: {named}.*Choose another folder"):
        worker(tiny(), tmp_path / "in", tmp_path / "out", **changes)


def test_other_weights_another_fix_and_another_preprocess_are_refused(tmp_path):
    photos(tmp_path / "in", 3)
    vit = tiny()
    worker(vit, tmp_path / "in", tmp_path / "out")
    with (
        vitreg.TestTimeRegisters({1: [3]}).applied_to(vit),
        pytest.raises(ArchiveError, match=r"other settings: fix was none, is registers [0-9a-f]{32}. Choose"),
    ):
        worker(vit, tmp_path / "in", tmp_path / "out")
    other = vitreg.wrap(vit.model, lambda image: vit.preprocess(image) + 1, image_size=vit.image_size)
    with pytest.raises(
        ArchiveError, match=r"other settings: preprocess was [0-9a-f]{32}, is [0-9a-f]{32}. C"
    ):
        worker(other, tmp_path / "in", tmp_path / "out")
    with torch.no_grad():
        vit.model.cls_token += 1
    with pytest.raises(ArchiveError, match=r"other settings: weights was [0-9a-f]{32}, is [0-9a-f]{32}. C"):
        worker(vit, tmp_path / "in", tmp_path / "out")


def test_an_archive_that_has_changed_is_refused(tmp_path):
    photos(tmp_path / "in", 5)
    worker(tiny(), tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/a/0000.png").unlink()
    (tmp_path / "in/a/0002.png").write_bytes(png(2) + b"more")
    (tmp_path / "in/new.png").write_bytes(png(9))
    expected = r"1 new \(new.png\); 1 gone \(a/0000.png\); 1 of another size \(a/0002.png\)"
    with pytest.raises(ArchiveError, match=f"is not the archive that .* was begun with: {expected}"):
        worker(tiny(), tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is damaged"), ("{}", "is damaged"), ('{"format": 9}', "damaged|format 9")]
)
def test_a_plan_that_cannot_be_read(tmp_path, text, message):
    photos(tmp_path / "in", 3)
    worker(tiny(), tmp_path / "in", tmp_path / "out")
    (tmp_path / "out/plan.json").write_text(text)
    with pytest.raises(ArchiveError, match=message):
        worker(tiny(), tmp_path / "in", tmp_path / "out")


def test_a_folder_of_another_format(tmp_path):
    photos(tmp_path / "in", 3)
    worker(tiny(), tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out/plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 9}))
    with pytest.raises(ArchiveError, match="has format 9, this version writes 1"):
        worker(tiny(), tmp_path / "in", tmp_path / "out")


# -- which features ------------------------------------------------------------------------------------


def test_tokens_and_layers_become_features_with_shapes():
    vit = tiny()  # 32 px, patches of 8
    assert features_of(vit) == {"cls": (32,), "mean": (32,)}
    assert features_of(vit, ["patches", "output"], [0, -1]) == {
        "patches@0": (4, 4, 32), "patches@1": (4, 4, 32), "output": (3,),
    }  # fmt: skip


def test_registers_are_those_of_the_fix():
    vit = tiny()
    with vitreg.TestTimeRegisters({1: [3]}, registers=2).applied_to(vit):
        assert features_of(vit, ["registers"]) == {"test_registers": (2, 32)}
    with pytest.raises(UnsupportedModelError, match="neither trained ones nor a fix that adds some"):
        features_of(vit, ["registers"])


def test_unknown_tokens_and_layers():
    with pytest.raises(
        DataError, match="no token 'pooled': expected some of cls, mean, output, registers, p"
    ):
        features_of(tiny(), ["cls", "pooled"])
    with pytest.raises(DataError, match="no layer 2: expected numbers from 0 to 1"):
        features_of(tiny(), layers=[2])
