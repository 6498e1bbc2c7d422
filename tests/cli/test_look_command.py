"""`vitreg look`, from photo to picture."""

import json
from pathlib import Path

import pytest
from command_line import fails

import vitreg
from vitreg.data.images import demo_photos
from vitreg.viewing import at_hand

PHOTO = demo_photos()[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("html", b"<!DOCTYPE html>")],
)
def test_the_picture_has_the_form_of_its_name(run, model: Path, suffix: str, begins: bytes) -> None:
    code, out, _ = run("look", PHOTO, "--model", model, "-o", f"a.{suffix}")
    assert code == 0
    assert f"picture: a.{suffix}" in out
    first = Path(f"a.{suffix}").read_bytes()
    assert first.startswith(begins)
    run("look", PHOTO, "--model", model, "-o", f"b.{suffix}")
    assert Path(f"b.{suffix}").read_bytes() == first


def test_a_photo_is_command_enough(run, model: Path) -> None:
    code, out, _ = run(PHOTO, "-m", model)
    assert code == 0
    assert "picture: vitreg-look.png" in out
    assert Path("vitreg-look.png").stat().st_size > 10_000
    assert out == run("look", PHOTO, "-m", model)[1]


def test_what_is_neither_command_nor_photo_is_said(run) -> None:
    code, _, err = run("photo-that-is-not.jpg")
    assert code == 2
    assert "photo-that-is-not.jpg" in err


@pytest.mark.parametrize(
    "view", [["--layers"], ["--queries", "CLS", "--queries", "1,1"], ["--similar", "outlier"], ["--together"]]
)
def test_each_view_is_another_picture(run, model: Path, view: list[str]) -> None:
    run("look", PHOTO, demo_photos()[0], "-m", model, "-o", "plain.png")
    code, _, err = run("look", PHOTO, demo_photos()[0], "-m", model, "-o", "view.png", *view)
    assert code == 0, err
    assert Path("view.png").read_bytes() != Path("plain.png").read_bytes()
    assert ("the first of the photos" in err) == (view != ["--together"])


def test_models_side_by_side_and_json(run, model: Path) -> None:
    code, out, _ = run(
        "look", PHOTO, "-m", model, "-m", "timm:test_vit", "--random-weights", "--json", "a.json"
    )
    assert code == 0
    versions = json.loads(Path("a.json").read_text())["versions"]
    assert [version["name"] for version in versions] == [str(model), "timm:test_vit"]
    assert out.count("0 of ") == 2
    assert out.startswith("No artifacts: cat.jpg")


def test_a_saved_fix_is_shown(run, model: Path) -> None:
    vitreg.TestTimeRegisters({0: [0]}).save("fix")
    code, out, _ = run("look", PHOTO, "-m", model, "--fix", "fix")
    assert code == 0
    assert "fixed (registers)" in out
    assert "on former ones" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-o", "a.gif"], ["a.gif", ".png, .pdf, .svg, .html"]),
        (["-o", "there.png"], ["there.png", "--overwrite"]),
        (["-o", "nowhere/a.png"], ["nowhere"]),
        (["--fix", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_are_said_before_any_work(run, args: list[str], words: list[str]) -> None:
    Path("there.png").touch()
    fails(run("look", PHOTO, "-m", "no model is loaded", *args), *words)


@pytest.mark.parametrize(
    "view", [["--similar", "corner"], ["--queries", "99,99"], ["--layers", "--similar", "1,1"]]
)
def test_a_wrong_patch_or_two_views_are_wrong_usage(run, model: Path, view: list[str]) -> None:
    code, _, err = run("look", PHOTO, "-m", model, *view)
    assert code == 2
    assert any(word in err for word in ("expected", "outside", "one picture"))
    assert not Path("vitreg-look.png").exists()


def test_without_a_model_and_a_hub_the_example_stands_in_and_says_so(run) -> None:
    code, out, err = run(PHOTO)
    assert code == 0
    assert "bundled example" in err
    assert at_hand.DEFAULT in err
    assert "A phantom: its artifacts were planted." in out


def test_without_a_model_that_of_the_cache_is_taken(run, monkeypatch, model: Path) -> None:
    monkeypatch.setattr(at_hand, "_cached", lambda name: model)
    code, out, err = run(PHOTO)
    assert code == 0
    assert f"this is {at_hand.DEFAULT}" in err
    assert "timm:vit_tiny" in out


def test_a_model_in_the_hubs_cache_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = at_hand.DEFAULT.removeprefix("timm:")
    folder = tmp_path / f"models--timm--{name}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert at_hand._cached(at_hand.DEFAULT) is None
    (snapshot / "config.json").write_text("{}")
    assert at_hand._cached(at_hand.DEFAULT) is None  # a download that did not end
    (snapshot / "model.safetensors").write_bytes(b"")
    assert at_hand._cached(at_hand.DEFAULT) == snapshot
