"""Names with typos, names without their library, arguments in another order."""

import shlex
from itertools import permutations

import pytest
from command_line import fails

from vitreg.cli.roles import check_order
from vitreg.errors import VitregError

NEVER = "timm:never-loaded"


# -- names ----------------------------------------------------------------------------------------------

WORDS = {"TASK": "knn", "MODEL": "timm:x", "FIX": "saved", "IMAGES": "photos", "DATA": "photos"}
ROLES = [("MODEL", "IMAGES"), ("MODEL", "FIX", "IMAGES"), ("TASK", "MODEL", "DATA")]


@pytest.mark.parametrize(
    ("roles", "order"), [(roles, order) for roles in ROLES for order in permutations(range(len(roles)))]
)
@pytest.mark.parametrize("model", ["timm:x", "vit_tiny_patch16_224", "folder"])
def test_arguments_in_another_order_are_understood(here, roles, order, model):
    (here / "folder").mkdir()
    (here / "folder" / "config.json").write_text("{}")
    words = [{**WORDS, "MODEL": model}[role] for role in roles]
    given = dict(zip(roles, [words[i] for i in order], strict=True))
    if list(order) == sorted(order):
        check_order("command", given)
        return
    with pytest.raises(VitregError, match=shlex.join(["vitreg", "command", *words]).replace("\\", "")):
        check_order("command", given)


def test_arguments_that_cannot_be_told_apart_are_left_to_those_who_read_them(here):
    for given in ({"MODEL": "a", "IMAGES": "b"}, {"MODEL": "photos", "IMAGES": "photos"}):
        check_order("diagnose", given)


def test_swapped_arguments_are_one_line(run, here):
    fails(run("diagnose", "photos", NEVER), f"vitreg diagnose {NEVER} photos")


TYPOS = {
    ("fix", "m", "photos", "-o", "x", "--type", "spliting"): "splitting?",
    ("fix", "m", "photos", "-o", "x", "--method", "contast"): "contrast?",
    ("diagnos", "m", "photos"): "'diagnose'?",
    ("eval", "discovry", NEVER, "photos"): "discovery?",
    ("eval", "knn", NEVER, "photos", "--set", "seeed=1"): "seed?",
    ("eval", "discovery", NEVER, "photos", "--set", "method=tokencutt"): "tokencut?",
    ("papers", "test-time-cuont"): "test-time-count?",
    ("train", "emergense"): "emergence?",
    ("diagnose", "vit_tiny_patch16_24", "photos"): "timm:vit_tiny_patch16_224",
    ("diagnose", "tim:vit_tiny_patch16_224", "photos"): "timm:vit_tiny_patch16_224?",
    ("diagnose", "facebook/dinov2-base", "photos"): "hf:facebook/dinov2-base?",
    ("diagnose", "ViT-B-32/openai", "photos"): "open_clip:ViT-B-32/openai?",
    ("diagnose", "vit_tiny_patch16_224.augreg_in21k_ft", "photos"): "timm:vit_tiny_patch16_224.augreg_in21k",
    ("diagnose", "hf:dinov", "photos", "--random-weights"): "hf:dinov2",
    ("diagnose", "timm:test_vit", "photos", "--random-weights", "--dtype", "bfloat61"): "bfloat16?",
}


@pytest.mark.parametrize(("line", "says"), list(TYPOS.items()), ids=list(TYPOS.values()))
def test_did_you_mean_wherever_a_name_is_chosen(run, here, line, says):
    code, out, err = run(*line)
    assert code in (1, 2)
    assert out == ""
    assert f"Did you mean {says}" in " ".join(err.replace("│", " ").split())


def test_a_bare_name_of_timms_is_tried_as_timms(run, here):
    code, said, _ = run("diagnose", "vit_tiny_patch16_224", "photos", "--random-weights", "--limit", 1)
    assert code == 0
    assert said.startswith("No artifacts: timm:vit_tiny_patch16_224\n")
    (here / "vit_tiny_patch16_224").mkdir()  # a folder goes before
    fails(run("diagnose", "vit_tiny_patch16_224", "photos"), "holds no model")
