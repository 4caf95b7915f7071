"""Attentions that read the weight of their layer past it: timm's own switch covers them, plain at lambda 1."""

import copy

import pytest
import timm
import torch

from timm_nrpm import NRPMConfig, from_pretrained, plain_copy, reprogram_, restore_, save_pretrained
from timm_nrpm.models.bypasses import SWITCH
from timm_nrpm.nn.reprogrammed import Reprogrammed

MADE = {
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1)},
}


@pytest.fixture(params=MADE, scope="module")
def plain(request):
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=5, **MADE[request.param]).eval()
    for name, parameter in model.named_parameters():  # the biases are zero in a new model
        if name.rpartition(".")[2] in ("q_bias", "v_bias"):
            parameter.data.normal_()
    return model


def pixels_of(model):
    size = model.pretrained_cfg["input_size"]
    side = {"beit": 32, "eva": 28, "swin": 64}
    return torch.randn(
        2, size[0], *2 * (next(v for k, v in side.items() if k in type(model).__module__.rsplit(".")[-1]),)
    )


@torch.no_grad()
def test_every_layer_is_called_and_lambda_one_is_the_plain_model_bit_for_bit(plain):
    model = copy.deepcopy(plain)
    images = pixels_of(model)
    before = model(images)
    reprogram_(model, NRPMConfig(lam=1.0))
    assert not model.nrpm.skipped
    assert any(name.endswith(".qkv") for name, m in model.named_modules() if isinstance(m, Reprogrammed))
    assert torch.equal(model(images), before)
    reprogram_(model, NRPMConfig(lam=0.5))
    after = model(images)
    assert after.isfinite().all()
    assert not torch.allclose(after, before)
    assert torch.equal(plain_copy(model)(images), before)
    restore_(model)
    assert torch.equal(model(images), before)
    assert not any(getattr(module, SWITCH, False) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_the_estimate_is_that_of_the_layer(plain):
    """lambda just below 1 gives nearly the plain model, so the biases are added once."""
    model, images = copy.deepcopy(plain).double(), pixels_of(plain).double()
    before = model(images)
    torch.testing.assert_close(reprogram_(model, NRPMConfig(lam=1 - 1e-7))(images), before, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_it_is_saved_and_loaded(plain, tmp_path):
    model, images = reprogram_(copy.deepcopy(plain), NRPMConfig(lam=0.5)).eval(), pixels_of(plain)
    again = from_pretrained(save_pretrained(model, tmp_path / "v"), base=copy.deepcopy(plain))
    assert torch.equal(again(images), model(images))
