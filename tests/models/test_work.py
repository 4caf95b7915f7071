"""The work of a forward against closed forms: products, kinds of layers, numbers moved, memory held."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import nn

from timm_nrpm.models.work import LAYER_KINDS, LayerWork, products, work_of

SIZE = 12


def convolution(channels, outputs, kernel, **options):
    return nn.Conv2d(channels, outputs, kernel, **options), (2, channels, SIZE, SIZE)


# Layer and input shape, and the products of two images by hand.
CLOSED = {
    "convolution": (*convolution(4, 6, 3), 2 * 6 * 10 * 10 * 4 * 9),
    "padded, strided": (*convolution(4, 6, 3, padding=1, stride=2), 2 * 6 * 6 * 6 * 4 * 9),
    "pointwise": (*convolution(4, 6, 1, bias=False), 2 * 6 * 12 * 12 * 4),
    "grouped": (*convolution(8, 16, 3, groups=2, padding=1), 2 * 16 * 12 * 12 * 4 * 9),
    "depthwise": (*convolution(8, 8, 5, groups=8, padding=2), 2 * 8 * 12 * 12 * 25),
    "dilated": (*convolution(2, 3, 3, dilation=2), 2 * 3 * 8 * 8 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, SIZE, SIZE), 2 * 4 * 12 * 12 * 6 * 9),
    "linear": (nn.Linear(7, 5), (2, 7), 2 * 7 * 5),
    "tokens": (nn.Linear(7, 5), (2, 11, 7), 2 * 11 * 7 * 5),
}


@pytest.mark.parametrize("name", CLOSED)
def test_products_of_a_layer_have_their_closed_form(name):
    layer, shape, expected = CLOSED[name]
    work = work_of(nn.Sequential(layer), torch.zeros(shape))
    assert [(each.name, each.products, each.weights) for each in work.layers] == [("0", expected, layer.weight.numel())]
    assert (work.calls, work.products) == (0, 0)


class Routed(nn.Module):
    """A convolution whose weight is a mix of three experts, another one for each image."""

    def __init__(self):
        super().__init__()
        self.mixed = CondConv2d(4, 16, 3, padding=1, groups=2, num_experts=3)

    def forward(self, x):
        return self.mixed(x, x.new_ones(len(x), 3))


def test_products_of_a_conditional_convolution_are_those_of_one_kernel():
    (work,) = work_of(Routed(), torch.zeros(2, 4, SIZE, SIZE)).layers
    assert (work.name, work.kind, work.products) == ("mixed", "grouped", 2 * 16 * SIZE * SIZE * 2 * 9)
    assert work.weights == 3 * 16 * 2 * 9


class Attention(nn.Module):
    """Two heads, fused or written out."""

    def __init__(self, fused):
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # each [B, 2, N, 4]
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_products_of_attention_have_their_closed_form(fused):
    batch, tokens, width = 3, 20, 8
    work = work_of(Attention(fused), torch.zeros(batch, tokens, width))
    assert [each.products for each in work.layers] == [batch * tokens * width * 3 * width, batch * tokens * width**2]
    assert work.products == 2 * batch * tokens * tokens * width  # of queries and keys, and of shares and values
    assert work.curved == (0 if fused else batch * 2 * tokens * tokens)


class TorchsAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


def test_products_of_torchs_attention_are_counted_outside_of_layers_that_it_never_calls():
    tokens, width = 5, 8
    work = work_of(TorchsAttention(), torch.zeros(1, tokens, width))
    assert work.layers == ()
    assert work.products == tokens * width * 3 * width + 2 * tokens**2 * width + tokens * width**2
    assert torch.backends.mha.get_fastpath_enabled()


KINDS = {
    "convolution": convolution(4, 8, 3),
    "grouped": convolution(8, 16, 3, groups=2),
    "pointwise": convolution(4, 8, 1),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 14, 14)),
    "narrow depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 7, 7)),
    "linear": (nn.Linear(7, 5), (16, 7)),
    "few positions": (nn.Linear(7, 5), (15, 7)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers(kind):
    layer, shape = KINDS[kind]
    assert work_of(layer, torch.zeros(shape)).layers[0].kind == kind


def test_a_depthwise_layer_of_pixels_that_are_apart_is_a_kind_of_its_own():
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.zeros(1, 8, 14, 14).to(memory_format=torch.channels_last)
    assert work_of(layer, x).layers[0].kind == "channels-last depthwise"
    assert {*KINDS, "channels-last depthwise"} == set(LAYER_KINDS)


def test_a_layer_that_is_called_twice_counts_twice():
    layer = nn.Linear(4, 4)
    work = work_of(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 4))
    assert work.layers == (LayerWork("0", "few positions", products=2 * 3 * 16, outputs=2 * 3 * 4, weights=16),)


class Moves(nn.Module):
    def forward(self, x):
        y = x + 1  # reads and writes 1000 numbers each
        y = y.view(10, 100).t().reshape(-1)  # copies as many, but for the views
        return F.max_pool2d(y.view(1, 1, 10, 100), 2).exp()


def test_numbers_that_are_moved_and_held():
    work = work_of(Moves(), torch.zeros(1000))
    assert work.calls == 4
    assert work.moved >= 2000 + 2000 + 1000 + 250 + 250 + 250
    assert work.curved == 250
    assert work.pooled == 4 * 250
    assert work.peak == 4 * 3000  # the input, the sum and its copy


def test_a_model_is_left_as_it_was():
    model = timm.create_model("resnet8_digits", pretrained=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = products(model, torch.zeros(1, 1, 8, 8))
    assert counted["conv1"] == 64 * model.conv1.weight.numel()
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
