"""Splits of networks: the paper's count, what belongs to the late part, and networks without one order."""

import pytest
import timm
import torch
from torch import nn

import timm_nrpm
from timm_nrpm.subnetworks.splitting import layer_parameters, split


def test_a_resnet_18_has_the_layers_of_the_paper():
    model = timm.create_model("resnet18_cifar_narrow")
    parts = split(model, 4)
    assert len(parts.layers) == 18
    assert parts.late == ("layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "fc")
    assert not any("downsample" in name for name in parts.layers)
    # What a forward calls after the first layer of the late part belongs to it, and so does the shortcut.
    assert {"layer4.0.bn2.running_mean", "layer4.0.downsample.0.weight", "fc.bias"} <= set(parts.late_state)
    assert not {"layer4.0.conv1.weight", "layer4.0.bn1.weight", "conv1.weight"} & set(parts.late_state)


@pytest.mark.parametrize(
    ("name", "late", "first"),
    [
        ("vit_tiny_patch16_224", 5, "blocks.11.attn.qkv"),
        ("convnext_atto", 3, "stages.3.blocks.1.mlp.fc1"),
        ("mobilenetv3_small_050", 2, "conv_head"),
        ("mlp3_mnist", 1, "fc3"),
        ("mixer2_cifar", 3, "blocks.1.mlp_channels.fc1"),
        ("resnet8_digits", 2, "layer3.0.conv2"),
    ],
)
def test_other_architectures_are_split_in_the_order_of_a_forward(name, late, first):
    model = timm.create_model(name)
    parts = split(model, late)
    assert len(parts.late) == late
    assert parts.late[0] == first
    state = model.state_dict()
    assert set(parts.late_state) <= set(state)
    assert all(f"{layer}.weight" in parts.late_state for layer in parts.late)
    assert not any(f"{layer}.weight" in parts.late_state for layer in parts.early)


@pytest.mark.parametrize(
    "name", ["resnet18_cifar_narrow", "vit_tiny_patch16_224", "mobilenetv3_small_050", "mlp3_mnist"]
)
def test_the_parameters_of_the_last_layers_are_those_of_the_late_part(name):
    model = timm_nrpm.reprogram_(timm.create_model(name), timm_nrpm.NRPMConfig(lam=0.5))
    owned = layer_parameters(model)
    assert tuple(owned) == split(model, 1).layers
    every = [each for names in owned.values() for each in names]
    assert sorted(every) == sorted(n for n, _ in model.named_parameters() if not n.endswith(".lam"))
    for late in (1, 2, len(owned) - 1):
        last = [each for layer in list(owned)[-late:] for each in owned[layer]]
        assert sorted(last) == sorted(split(model, late).trainable(model))


def test_a_stage_that_begins_with_a_downsampling_counts_it():
    layers = split(timm.create_model("convnext_atto"), 1).layers
    assert "stages.1.downsample.1" in layers


def test_parts_are_composed_and_named_alike_when_reprogrammed():
    first, second = (timm.create_model("resnet8_digits") for _ in range(2))
    parts = split(first, 3)
    mixed = parts.composed(first.state_dict(), second.state_dict())
    for name, value in mixed.items():
        origin = second if name in parts.late_state else first
        assert torch.equal(value, origin.state_dict()[name])
    reprogrammed = timm_nrpm.reprogram_(timm.create_model("resnet8_digits"), timm_nrpm.NRPMConfig(lam=0.5))
    assert split(reprogrammed, 3).layers == parts.layers
    assert split(reprogrammed, 3).trainable(reprogrammed) == parts.trainable(first)
    assert parts.trainable(reprogrammed) == parts.trainable(first)
    assert not any(name.endswith(".lam") for name in parts.trainable(reprogrammed))


def test_the_model_is_as_it_was():
    model = timm.create_model("resnet8_digits").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split(model, 2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "regnetx_002"])
def test_shortcuts_are_not_counted_wherever_they_are_called(name):
    layers = split(timm.create_model(name), 1, example=torch.zeros(1, 3, 64, 64)).layers
    assert not any("downsample" in layer for layer in layers)


def test_a_late_part_has_only_what_a_state_dict_has():
    model = timm.create_model("swin_tiny_patch4_window7_224")
    state = model.state_dict()
    parts = split(model, 20)
    assert set(parts.composed(state, state)) == set(state)


def test_weights_that_are_read_without_a_call_belong_to_the_module_around():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 4)).train()  # in training, nothing is fused
    parts = split(model, 3, example=torch.zeros(2, 5, 8))
    assert parts.late == ("1.linear1", "1.linear2", "2")
    assert "1.self_attn.out_proj.weight" not in parts.late_state
    assert {"", "0", "1", "1.self_attn"} <= set(parts.early_modules)
    assert "1.norm2" not in parts.early_modules


class Again(nn.Module):
    """Calls its first layer again after another one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.one(self.two(self.one(x)))


@pytest.mark.parametrize("late", [0, 18, 19, -1, 1.5, True])
def test_a_part_without_layers_is_refused(late):
    with pytest.raises(ValueError, match=r"late=.*from 1 to 17.*18 convolutional and linear layers"):
        split(timm.create_model("resnet18_cifar_narrow"), late)


def test_a_network_without_one_order_is_refused():
    with pytest.raises(ValueError, match="calls one again after two"):
        split(Again(), 1, example=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="give an input as example="):
        split(Again(), 1)
    with pytest.raises(ValueError, match="1 convolutional or linear layer"):
        split(nn.Sequential(nn.Linear(4, 2)), 1, example=torch.zeros(1, 4))
