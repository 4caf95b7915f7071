"""What timm puts in the place of a reprogrammed layer is reprogrammed like it, in copies and saved models as well."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import timm_nrpm
from timm_nrpm import (
    NRPMConfig,
    calibrate_,
    from_pretrained,
    lambdas,
    plain_copy,
    reprogram_,
    restore_,
    save_pretrained,
)
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.reprogramming import is_settled
from timm_nrpm.nn.functional import nrpm_linear
from timm_nrpm.nn.layers import NRPMConv2d, NRPMLinear

DIGITS = "resnet8_digits"
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}


def digits(lam=0.8, **settings):
    return timm_nrpm.create_model(DIGITS, pretrained=True, lam=lam, **settings).eval()


def vit(lam=0.8, **settings):
    return timm_nrpm.create_model("vit_tiny_patch16_224", lam=lam, **VIT, **settings).eval()


@pytest.fixture
def x():
    return torch.rand(4, 1, 8, 8)


@torch.no_grad()
def test_a_new_classifier_estimates_like_the_one_before_it(x):
    model = digits({"fc": 0.6, "*": 0.8}, iterations=2, eps=0.1)
    names = list(lambdas(model))
    model.reset_classifier(3)
    assert type(model.fc) is NRPMLinear
    assert list(lambdas(model)) == names
    assert lambdas(model)["fc"] == 0.6
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    want = nrpm_linear(pooled, model.fc.weight, model.fc.bias, lam=0.6, iterations=2, eps=0.1)
    torch.testing.assert_close(model(x), want)
    assert not torch.allclose(model(x), nn.functional.linear(pooled, model.fc.weight, model.fc.bias))


@torch.no_grad()
def test_at_lambda_one_it_is_that_of_plain_timm(x):
    model, plain = digits(1.0), timm.create_model(DIGITS, pretrained=True).eval()
    for each in (model, plain):
        torch.manual_seed(1)
        each.reset_classifier(3)
    assert torch.equal(model(x), plain(x))
    restore_(model)
    assert type(model.fc) is nn.Linear
    assert "reset_classifier" not in vars(model)
    assert torch.equal(model(x), plain(x))


def test_a_classifier_that_stayed_plain_stays_plain():
    model = digits(layers="layer1.*")
    model.reset_classifier(3)
    assert type(model.fc) is nn.Linear
    assert "fc" not in lambdas(model)


def test_a_classifier_comes_back_after_there_was_none(x):
    model = digits(0.8, learnable=True)
    with torch.no_grad():
        model.fc.lam.fill_(0.3)
    model.reset_classifier(0)
    assert type(model.fc) is nn.Identity
    assert "fc" not in lambdas(model)
    assert model(x).shape == (4, 32)
    model.reset_classifier(7)
    assert lambdas(model)["fc"] == 0.3
    assert model.fc.lam.requires_grad
    model.fc.lam.requires_grad_(False)
    model.reset_classifier(8)
    assert not model.fc.lam.requires_grad


def test_a_layer_that_someone_put_there_stays_as_it_is():
    model = vit(0.8)
    model.set_input_size(img_size=32)
    model.head = nn.Linear(16, 4)
    model.set_input_size(img_size=16, patch_size=4)
    assert type(model.head) is nn.Linear
    assert lambdas(model)["patch_embed.proj"] == 0.8


def test_several_classifiers(x):
    model = reprogram_(timm.create_model("deit_tiny_distilled_patch16_224", **VIT), NRPMConfig(lam=0.7))
    model.reset_classifier(3)
    assert {name: lam for name, lam in lambdas(model).items() if name.startswith("head")} == {
        "head": 0.7,
        "head_dist": 0.7,
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_follows_its_own_classifier(copied):
    model = digits(0.6)
    other = copied(model)
    other.reset_classifier(3)
    assert (model.fc.out_features, other.fc.out_features) == (10, 3)
    assert lambdas(other) == lambdas(model)
    restore_(model)
    assert lambdas(other)["fc"] == 0.6


def test_reprogramming_again_follows_the_new_settings():
    model = reprogram_(digits(0.6), NRPMConfig(lam=0.9, iterations=1))
    model.reset_classifier(3)
    assert lambdas(model)["fc"] == 0.9
    assert model.fc.config.iterations == 1


def test_a_new_classifier_moves_no_statistics(x):
    model = digits(0.5)
    statistics = model.bn1.running_mean.clone()
    calibrate_(model, [x])
    assert not torch.equal(model.bn1.running_mean, statistics)
    model.reset_classifier(3)
    assert is_settled(model)
    assert torch.equal(plain_copy(model).bn1.running_mean, statistics)
    assert torch.equal(restore_(model).bn1.running_mean, statistics)


def test_trained_weights_are_not_taken_for_settled_ones(x):
    model = digits(0.5)
    calibrate_(model, [x])
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    model.reset_classifier(3)
    assert not is_settled(model)
    with pytest.warns(ReprogrammingWarning, match="The weights changed"):
        restore_(model)


def test_a_new_classifier_in_standard_units_asks_for_them(x):
    model = digits(0.5, standardize=True)
    calibrate_(model, [x])
    model.reset_classifier(3)
    with pytest.raises(ValueError, match=r"units are not known yet: call timm_nrpm.calibrate_\(model, images\)"):
        model(x)
    assert calibrate_(model, [x])(x).shape == (4, 3)


@torch.no_grad()
def test_it_is_saved_with_its_weights_or_not_at_all(x, tmp_path):
    model = digits(0.5)
    model.reset_classifier(3)
    with pytest.raises(ValueError, match="a lambda-only folder would lose them: save with full=True"):
        save_pretrained(model, tmp_path / "v")
    again = from_pretrained(save_pretrained(model, tmp_path / "v", full=True))
    assert lambdas(again) == lambdas(model)
    assert torch.equal(again(x), model(x))
    assert timm.create_model(f"local-dir:{tmp_path / 'v'}", pretrained=True).fc.out_features == 3


@torch.no_grad()
def test_another_patch_size_keeps_the_embedding_reprogrammed():
    model = vit(0.8)
    plain = plain_copy(model)
    model.set_input_size(img_size=24, patch_size=4)
    plain.set_input_size(img_size=24, patch_size=4)
    assert type(model.patch_embed.proj) is NRPMConv2d
    assert lambdas(model)["patch_embed.proj"] == 0.8
    images = torch.rand(2, 3, 24, 24)
    robust = model(images)
    for layer in timm_nrpm.reprogramming.reprogrammed_layers(model).values():
        layer.lam.fill_(1)
    assert torch.equal(model(images), plain(images))
    assert not torch.allclose(robust, plain(images))


@torch.no_grad()
def test_another_image_size_touches_no_layer():
    model = vit(0.8)
    layers = timm_nrpm.reprogramming.reprogrammed_layers(model)
    model.set_input_size(img_size=32)
    assert timm_nrpm.reprogramming.reprogrammed_layers(model) == layers
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)


@torch.no_grad()
def test_pruned_blocks_leave_the_others_as_they_were():
    model, images = vit(0.8), torch.rand(2, 3, 16, 16)
    _, (want,) = model.forward_intermediates(images, indices=[0], output_fmt="NLC")
    assert model.prune_intermediate_layers([0], prune_norm=True, prune_head=True) == [0]
    assert [name for name in lambdas(model) if name.startswith(("head", "blocks.1"))] == []
    assert torch.equal(model.forward_features(images)[:, 1:], want)


def test_a_model_inside_another_is_followed_too():
    whole = nn.Sequential(nn.Conv2d(3, 3, 1), timm.create_model("vit_tiny_patch16_224", **VIT))
    reprogram_(whole, NRPMConfig(lam=0.7), example=torch.rand(1, 3, 16, 16))
    whole[1].reset_classifier(9)
    assert lambdas(whole)["1.head"] == 0.7
