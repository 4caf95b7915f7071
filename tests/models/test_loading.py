"""Folders through timm's own factory, and folders that anyone can load, in one process."""

import pytest
import timm
import torch

import timm_nrpm
from timm_nrpm import NRPMConfig, from_pretrained, lambdas, reprogram_, save_pretrained
from timm_nrpm.errors import BrokenVariant
from timm_nrpm.models.loading import from_timm, is_variant, with_random_weights
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.models.saving import complete, needs_weights, save_loadable

PIXELS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def digits(**settings):
    return timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7, **settings).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(PIXELS)


def test_timm_builds_what_was_saved(tmp_path):
    model = digits(layers="layer*")
    folder = save_pretrained(model, tmp_path / "v")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(again), logits(model))
    assert lambdas(again) == lambdas(model)


def test_timm_builds_it_with_random_weights(tmp_path):
    model = digits(layers="layer*")
    folder = save_pretrained(model, tmp_path / "v")
    torch.manual_seed(1)
    first, second = (timm.create_model(f"local-dir:{folder}", pretrained=False) for _ in range(2))
    assert lambdas(first) == lambdas(second) == lambdas(model)
    assert not torch.equal(logits(first), logits(second))
    assert not torch.equal(first.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


@pytest.mark.parametrize("pretrained", [False, True])
def test_timms_arguments_that_a_variant_refuses(tmp_path, pretrained):
    folder = save_pretrained(digits(), tmp_path / "v")
    with pytest.raises(ValueError, match=r"^.*/v is a variant, and is loaded as it was saved: without num_classes, dr"):
        timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=3, drop_rate=0.1)
    made = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=None, cache_dir=tmp_path)
    assert lambdas(made) == lambdas(digits())


def test_where_timms_config_says_that_a_variant_is(tmp_path, monkeypatch):
    """A folder, or a repository with the revision behind the at sign, and the cache that was asked for."""
    asked = []
    monkeypatch.setattr("timm_nrpm.models.loading.load_variant", lambda source, **rest: asked.append((source, rest)))
    from_timm({"source": "local-dir", "file": str(tmp_path)}, True, {})
    from_timm({"source": "hf-hub", "hf_hub_id": "me/x"}, True, {"cache_dir": "there", "pretrained_model_args": {}})
    from_timm({"source": "hf-hub", "hf_hub_id": "me/x@v1"}, True, {"num_classes": None})
    assert asked == [
        (tmp_path, {"revision": None, "cache_dir": None}),
        ("hf-hub:me/x", {"revision": None, "cache_dir": "there"}),
        ("hf-hub:me/x", {"revision": "v1", "cache_dir": None}),
    ]
    with pytest.raises(
        ValueError, match=r"^me/x is a variant, and is loaded as it was saved: without in_chans\. Change"
    ):
        from_timm({"source": "hf-hub", "hf_hub_id": "me/x@v1"}, True, {"in_chans": 1})


@pytest.mark.parametrize(
    ("cfg", "is_one"),
    [
        ({"source": "hf-hub"}, True),
        ({"source": "local-dir"}, True),
        ({"source": "timm"}, False),
        ({}, False),
        (None, False),
        ("hf-hub", False),
    ],
)
def test_what_timm_read_from_a_variant(cfg, is_one):
    assert is_variant(cfg) is is_one


def test_a_variant_that_timm_cannot_build(tmp_path, monkeypatch):
    from timm_nrpm.models.loading import find_variant

    found = find_variant(save_pretrained(digits(), tmp_path / "v"))
    monkeypatch.setitem(found.variant.base.kwargs, "no_such_argument", 1)
    with pytest.raises(BrokenVariant, match=r"^here holds no model that timm can build: TypeError\(.*no_such_argument"):
        with_random_weights(found.variant, "here")


def named():
    return digits()


def trained():
    model = digits()
    with torch.no_grad():
        model.fc.weight.add_(0.1)
    return model


def unnamed():
    torch.manual_seed(0)
    return reprogram_(timm.create_model(DIGITS), NRPMConfig(lam=0.7))


@pytest.mark.parametrize(
    ("make", "changed", "holds"), [(named, False, False), (trained, True, True), (unnamed, False, True)]
)
def test_a_folder_that_can_be_loaded_anywhere(tmp_path, make, changed, holds):
    """It holds the weights where no public name leads to them: they were trained, or are of the user's own."""
    model = make()
    assert needs_weights(model) is changed
    folder = tmp_path / "v"
    assert save_loadable(model, folder) is holds
    assert (folder / "model.safetensors").exists() is holds
    assert complete(model, folder) is holds  # and a second time
    assert torch.equal(logits(from_pretrained(folder)), logits(model))


def test_weights_are_added_to_a_folder_that_lacks_them(tmp_path):
    model = unnamed()
    folder = save_pretrained(model, tmp_path / "v")
    assert not (folder / "model.safetensors").exists()
    assert complete(model, folder) is True
    assert torch.equal(logits(from_pretrained(folder)), logits(model))


def test_a_model_without_a_base_needs_no_weights():
    from timm_nrpm.models.reprogramming import record_of

    model = unnamed()
    assert record_of(model).base is None or not needs_weights(model)
