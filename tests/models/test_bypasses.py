"""Attentions that read the weight of their layer past it: timm's own switch covers them, plain at lambda 1.
And what finds all that is read past a layer, against closed forms."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from timm_nrpm import NRPMConfig, from_pretrained, plain_copy, reprogram_, restore_, save_pretrained
from timm_nrpm.models.bypasses import SWITCH, Reading, read_past
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


class Past(nn.Module):
    """Weights that are read outside of a layer, in several ways, and some that only seem so."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight, self.kernel = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6)), nn.Conv2d(1, 2, 3)
        self.table, self.query = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(1, 4))
        self.register_buffer("filter", torch.ones(1, 1, 2, 2))

    def forward(self, x):
        x = F.linear(self.layer(x), self.weight * 2)  # [B, N, 4], by a computed weight
        rows = self.table[torch.arange(5)]  # chosen by a constant
        x = x @ rows.t() @ rows  # read twice
        query = self.query @ torch.eye(4)  # a product of constants is no weight
        x = x + (query @ x.transpose(1, 2)).softmax(-1).sum()
        x = x @ x.transpose(1, 2)  # a product of two inputs
        x = F.conv2d(x.unsqueeze(1), self.kernel.weight[:1], padding=1)  # a part of a layer's weight
        return F.conv2d(x, self.filter)


def test_what_is_read_past_the_layers_has_its_closed_form():
    batch, tokens = 3, 7
    model = Past().train()
    for device in ("cpu", "meta"):
        read = read_past(model.to(device), torch.zeros(batch, tokens, 6, device=device))
        assert read == {
            "weight": Reading(1, batch * tokens * 6 * 4),
            "table": Reading(2, 2 * batch * tokens * 4 * 5),
            "kernel.weight": Reading(1, batch * tokens * tokens * 9),
            "filter": Reading(1, batch * (tokens - 1) ** 2 * 4),
        }
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sparse_tensors_are_left_out():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("chosen", torch.eye(4).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.chosen, x) @ self.weight

    assert read_past(Sparse(), torch.randn(4, 4)) == {"weight": Reading(1, 64)}


def test_a_weight_that_is_written_over_by_the_input_is_an_input():
    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            made = self.weight * 1
            made.copy_(x)
            return x @ made

    assert read_past(Overwritten(), torch.randn(4, 4)) == {}
