"""Classes of photos from their names, and of a model's head."""

import pytest
import torch
from catalog import CATALOG, images

import vitreg
from vitreg.data.imagenet import class_of, wordnet_classes, wordnet_id
from vitreg.models.head import find_readout, logits_of


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("val/n01440764/ILSVRC2012_val_00009191.JPEG", "n01440764"),
        ("n01440764_tench.jpg", "n01440764"),
        ("photo_n01440764.jpg", "n01440764"),
        ("val/n01440764/images/0.png", "n01440764"),
        ("shards/val-000.tar/n01440764/x.jpg", "n01440764"),
        (r"C:\photos\n01440764\x.jpg", "n01440764"),
        ("n01443537/n01440764_10040.JPEG", "n01440764"),  # the file's own comes first
        ("n01440764_n01440764.jpg", "n01440764"),
        ("n01440764_or_n01443537.jpg", None),  # two compete
        ("n014407640.jpg", None),
        ("run01440764.jpg", None),
        ("n0144076.jpg", None),
        ("cat.jpg", None),
        ("", None),
    ],
)
def test_wordnet_ids_are_read_off_paths(name, found):
    assert wordnet_id(name) == found


def test_imagenet_heads_know_their_classes():
    classes = wordnet_classes(1000)
    assert (len(classes), classes["n01440764"], classes["n15075141"]) == (1000, 0, 999)
    assert len(wordnet_classes(21843)) == 21843
    assert wordnet_classes(37) == {}


def test_a_class_that_the_head_does_not_know_is_none():
    assert class_of("n01440764/x.jpg", wordnet_classes(1000)) == 0
    assert class_of("n00004475/x.jpg", wordnet_classes(1000)) is None
    assert class_of("x.jpg", wordnet_classes(1000)) is None


def test_photos_in_order_are_the_classes_in_order(shared):
    names = sorted(path.name for path in (shared / "data/imagenet-sample-1000").iterdir())
    assert [class_of(name, wordnet_classes(1000)) for name in names] == list(range(1000))


def test_folders_of_imagenette_are_classes(shared):
    paths = sorted((shared / "data/imagenette/val").rglob("*.JPEG"))
    found = {path.parent.name: class_of(str(path), wordnet_classes(1000)) for path in paths}
    assert sorted(found.values()) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("timm vit", 5),
        ("timm siglip", 5),
        ("hf vit classifier", 2),
        ("torchvision vit", 5),
        ("hf clip", None),
        ("open_clip vit", None),
    ],
)
def test_heads_are_told_from_features(name, classes):
    assert find_readout(CATALOG[name].backbone()).classes == classes


@pytest.mark.parametrize("name", ["timm vit", "timm siglip", "timm dinov2 registers"])
def test_pooled_features_are_no_logits(name):
    entry = CATALOG[name]
    model = entry.module()
    model.reset_classifier(0)
    vit = vitreg.wrap(model, image_size=entry.image_size)
    assert logits_of(vit(images(vit))) is not None  # (b, width): by its shape alone it could be
    assert find_readout(vit).classes is None


@pytest.mark.parametrize("name", ["timm vit", "torchvision vit", "hf vit classifier"])
def test_what_the_head_reads_is_what_it_makes_of_the_stream(name):
    """Logits are read @ the normalised CLS token, but for what does not depend on the image."""
    vit = CATALOG[name].backbone()
    readout, photos = find_readout(vit), images(vit, 6)
    with vitreg.trace(vit, residuals=True) as t, torch.no_grad():
        logits = logits_of(vit(photos))
    cls = torch.nn.functional.layer_norm(t.residuals[-1][:, 0], (vit.anatomy.width,), eps=readout.norm.eps)
    offset = logits - cls @ readout.read.T
    assert torch.allclose(offset, offset[:1].expand_as(offset), atol=1e-4)
    assert logits.std(0).min() > 0.01
