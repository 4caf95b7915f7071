"""A licence is that of the weights that a name leads to, or one that was given; none is made up."""

import json

import pytest
import timm
import torch
from hub_cache import hub_cache
from huggingface_hub import ModelCard
from safetensors.torch import save_file

import timm_nrpm
from timm_nrpm import NRPMConfig, from_pretrained, push_to_hub, reprogram_, save_pretrained
from timm_nrpm.errors import WrongBase
from timm_nrpm.models.backbones import load_published_

DIGITS = "resnet8_digits"
CONFIG = NRPMConfig(lam=0.5, iterations=1, layers="layer1.*")
NAME, REPO = "resnet10t", "timm/resnet10t.c3_in1k"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Weights of a timm model in the Hub's own cache."""
    torch.manual_seed(3)
    weights = timm.create_model(NAME).state_dict()
    hub_cache(tmp_path / "cache", REPO, {"model.safetensors": weights})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return weights


def licence(model, folder, **given):
    """The licence of a card, and that of timm's config beside it."""
    push_to_hub(model, "me/v", dry_run=True, folder=folder, **given)
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"].get("license")
    return ModelCard((folder / "README.md").read_text()).data.license, config


def random_weights(tmp_path):
    return reprogram_(timm.create_model(DIGITS), CONFIG)


def random_weights_of_ours(tmp_path):
    return timm_nrpm.create_model(DIGITS, lam=0.5)


def loaded_by_hand(tmp_path):
    plain = timm.create_model(DIGITS, pretrained=True)
    plain.load_state_dict(timm.create_model(DIGITS).state_dict())
    return reprogram_(plain, CONFIG)


def loaded_by_us(tmp_path):
    save_file(timm.create_model(DIGITS).state_dict(), tmp_path / "w.safetensors")
    return reprogram_(load_published_(timm.create_model(DIGITS), tmp_path / "w.safetensors"), CONFIG)


def from_a_checkpoint(tmp_path):
    save_file(timm.create_model(DIGITS).state_dict(), tmp_path / "w.safetensors")
    return timm_nrpm.create_model(DIGITS, lam=0.5, checkpoint_path=str(tmp_path / "w.safetensors"))


def from_a_file(tmp_path):
    save_file(timm.create_model(DIGITS).state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    return reprogram_(timm.create_model(DIGITS, pretrained=True, pretrained_cfg_overlay=overlay), CONFIG)


def from_a_folder(tmp_path):
    timm.models.save_for_hf(timm.create_model(DIGITS), tmp_path / "saved", safe_serialization=True)
    return reprogram_(timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True), CONFIG)


def a_new_head(tmp_path):
    return reprogram_(timm.create_model(DIGITS, pretrained=True, num_classes=3), CONFIG)


def not_in_the_cache(tmp_path):
    return reprogram_(timm.create_model("resnet18"), CONFIG)


UNKNOWN = [
    *(random_weights, random_weights_of_ours, loaded_by_hand, loaded_by_us, from_a_checkpoint, from_a_file),
    *(from_a_folder, a_new_head, not_in_the_cache),
]


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", UNKNOWN)
def test_weights_of_unknown_origin_have_the_licence_that_is_given(tmp_path, make, full):
    model = make(tmp_path)
    with pytest.raises(ValueError, match=r"no licence is known.*give one as license="):
        push_to_hub(model, "me/v", dry_run=True, full=full)
    assert licence(model, tmp_path / "v", license="mit", full=full) == ("mit", None)
    folder = save_pretrained(model, tmp_path / "w", full=full)
    with pytest.raises(ValueError, match="no licence is known"):
        push_to_hub(folder, "me/v", dry_run=True)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("create", [timm.create_model, timm_nrpm.create_model])
def test_weights_that_came_through_a_name_have_the_licence_it_states(tmp_path, create, full):
    model = create(DIGITS, pretrained=True)
    model = reprogram_(model, CONFIG)
    assert licence(model, tmp_path / "v", full=full) == ("apache-2.0", "apache-2.0")
    again = from_pretrained(tmp_path / "v")
    assert licence(again, tmp_path / "again", full=full) == ("apache-2.0", "apache-2.0")


def test_timms_weights_in_the_cache(tmp_path, cached):
    model = reprogram_(timm.create_model(NAME, pretrained=True), CONFIG)
    assert licence(model, tmp_path / "v") == ("apache-2.0", "apache-2.0")
    assert from_pretrained(tmp_path / "v").nrpm.base.name == "resnet10t.c3_in1k"


def test_other_weights_than_those_in_the_cache(tmp_path, cached):
    """The cache has weights of that architecture, and the model has others."""
    model = reprogram_(timm.create_model(NAME), CONFIG)
    with pytest.raises(ValueError, match="no licence is known"):
        push_to_hub(model, "me/v", dry_run=True)
    with pytest.raises(WrongBase, match="give it as base="):
        from_pretrained(save_pretrained(model, tmp_path / "v"))


def test_weights_of_another_repository(tmp_path, cached):
    """The architecture's config says a licence, and nobody says one of what somebody else published."""
    hub_cache(tmp_path / "cache", "me/mine", {"model.safetensors": cached})
    overlay = {"hf_hub_id": "me/mine"}
    model = timm_nrpm.create_model(NAME, pretrained=True, layers="layer1.*", pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match="no licence is known"):
        push_to_hub(model, "me/v", dry_run=True)
    overlay |= {"license": "mit"}
    model = timm_nrpm.create_model(NAME, pretrained=True, layers="layer1.*", pretrained_cfg_overlay=overlay)
    assert licence(model, tmp_path / "v") == ("mit", "mit")


def test_a_licence_in_the_arguments_is_one_that_was_given(tmp_path):
    model = timm_nrpm.create_model(DIGITS, lam=0.5, pretrained_cfg_overlay={"license": "cc-by-4.0"})
    assert licence(model, tmp_path / "v") == ("cc-by-4.0", "cc-by-4.0")
    assert licence(model, tmp_path / "full", full=True) == ("cc-by-4.0", "cc-by-4.0")


def test_what_was_tuned_keeps_the_licence_of_where_it_started(tmp_path):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5)
    with torch.no_grad():
        model.fc.bias.add_(1)
    assert licence(model, tmp_path / "v") == ("apache-2.0", "apache-2.0")


def test_nothing_is_drawn_to_find_out(tmp_path):
    model = reprogram_(timm.create_model(DIGITS, pretrained=True), CONFIG)
    random = torch.get_rng_state()
    save_pretrained(model, tmp_path / "v")
    assert torch.equal(torch.get_rng_state(), random)
