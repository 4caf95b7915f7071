"""PEFT's low-rank adapters of reprogrammed layers, beside the estimate as PEFT has them, and within it."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

import timm_nrpm
from timm_nrpm import from_pretrained, lambdas, restore_, save_pretrained
from timm_nrpm.models.adapters import within
from timm_nrpm.nn.functional import nrpm_conv2d, nrpm_linear

try:
    import peft
except ImportError:
    peft = None

needs_peft = pytest.mark.skipif(peft is None, reason="PEFT is not installed: pip install 'timm_nrpm[lora]'")

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def vit(lam=0.8, **settings):
    torch.manual_seed(1)
    return timm_nrpm.create_model("vit_tiny_patch16_224", lam=lam, **VIT, **settings).eval()


def digits(lam=0.8):
    return timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=lam).eval()


def config(targets=("qkv", "fc1"), **settings):
    """Adapters that have an effect from the beginning."""
    return peft.LoraConfig(**{"r": 2, "target_modules": list(targets), "init_lora_weights": False, **settings})


@needs_peft
@torch.no_grad()
def test_an_adapter_of_peft_is_added_to_the_estimate():
    x, layer = torch.randn(5, 16), vit().blocks[0].mlp.fc1
    model = peft.get_peft_model(vit(), config())
    adapted = model.base_model.model.blocks[0].mlp.fc1
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    want = nrpm_linear(x, layer.weight, layer.bias, lam=0.8) + adapted.scaling["default"] * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(adapted(x), want)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), vit()(X))
    assert not torch.allclose(model(X), vit()(X), atol=1e-4)


@needs_peft
@torch.no_grad()
def test_an_adapter_of_a_convolution_is_a_plain_one():
    x, plain = torch.rand(2, 8, 5, 5), digits().layer1[0].conv1
    model = peft.get_peft_model(digits(), config(["layer1.0.conv1"]))
    adapted = model.base_model.model.layer1[0].conv1
    a, b = adapted.lora_A["default"], adapted.lora_B["default"]
    assert type(a) is type(b) is torch.nn.Conv2d
    want = nrpm_conv2d(x, plain.weight, None, stride=plain.stride, padding=plain.padding, lam=0.8)
    torch.testing.assert_close(adapted(x), want + adapted.scaling["default"] * b(a(x)))


@needs_peft
@torch.no_grad()
@pytest.mark.parametrize("inside", [False, True])
def test_at_lambda_one_it_is_peft_around_plain_timm(inside):
    torch.manual_seed(5)
    model = peft.get_peft_model(vit(1.0), within(config()) if inside else config())
    torch.manual_seed(5)
    plain = peft.get_peft_model(restore_(vit(1.0)), config())
    torch.testing.assert_close(model(X), plain(X))
    torch.testing.assert_close(model.merge_and_unload()(X), plain(X))


@needs_peft
@torch.no_grad()
def test_an_adapter_within_the_estimate_changes_its_weight():
    x, layer = torch.randn(5, 16), vit().blocks[0].mlp.fc1
    adapted = peft.get_peft_model(vit(), within(config())).base_model.model.blocks[0].mlp.fc1
    weight = layer.weight + adapted.get_delta_weight("default")
    torch.testing.assert_close(adapted(x), nrpm_linear(x, weight, layer.bias, lam=0.8))


@needs_peft
@torch.no_grad()
@pytest.mark.parametrize(("make", "targets", "shape"), [(vit, ("qkv", "fc1"), (3, 16)), (digits, ["conv1"], (1, 8))])
def test_merging_changes_nothing_within_the_estimate_and_something_beside_it(make, targets, shape):
    x = torch.rand(4, shape[0], shape[1], shape[1])
    for wrap, same in ((within, True), (lambda given: given, False)):
        model = peft.get_peft_model(make(), wrap(config(targets)))
        adapted = model(x)
        merged = model.merge_and_unload()
        assert lambdas(merged) == lambdas(make())
        assert torch.allclose(merged(x), adapted, atol=1e-5) == same
        assert not torch.allclose(adapted, make()(x), atol=1e-4)


@needs_peft
def test_merging_and_unmerging_gives_the_adapted_model_again():
    model = peft.get_peft_model(vit(), within(config())).eval()
    with torch.no_grad():
        adapted = model(X)
        model.merge_adapter()
        torch.testing.assert_close(model(X), adapted)
        with model.disable_adapter():
            torch.testing.assert_close(model(X), vit()(X), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(X), adapted, atol=1e-5, rtol=1e-4)


@needs_peft
def test_gradients_reach_adapters_alone_and_are_those_of_the_weight():
    model = peft.get_peft_model(vit(), within(config(["fc1"]))).train()
    model(X).square().sum().backward()
    adapted = model.base_model.model.blocks[1].mlp.fc1
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}
    merged = copy.deepcopy(model).merge_and_unload()
    merged.requires_grad_(False)
    merged.blocks[1].mlp.fc1.weight.requires_grad_(True)
    merged(X).square().sum().backward()
    slope = merged.blocks[1].mlp.fc1.weight.grad * adapted.scaling["default"]
    torch.testing.assert_close(adapted.lora_A["default"].weight.grad, adapted.lora_B["default"].weight.T @ slope)
    torch.testing.assert_close(adapted.lora_B["default"].weight.grad, slope @ adapted.lora_A["default"].weight.T)


@needs_peft
@torch.no_grad()
def test_saved_adapters_come_back_with_their_config(tmp_path):
    model = peft.get_peft_model(vit(), within(config()))
    model.save_pretrained(tmp_path)
    given = within(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(vit(), tmp_path, config=given)
    torch.testing.assert_close(again(X), model(X))
    beside = peft.PeftModel.from_pretrained(vit(), tmp_path)
    assert not torch.allclose(beside(X), model(X), atol=1e-5)


@needs_peft
@torch.no_grad()
def test_a_merged_model_is_saved_as_a_variant_and_an_adapted_one_is_not(tmp_path):
    model = peft.get_peft_model(digits(), within(config(["conv1"])))
    assert lambdas(model)["layer1.0.conv1.base_layer"] == 0.8
    with pytest.raises(ValueError, match="merge_and_unload"):
        save_pretrained(model, tmp_path / "v", full=True)
    merged, x = model.merge_and_unload(), torch.rand(2, 1, 8, 8)
    again = from_pretrained(save_pretrained(merged, tmp_path / "v", full=True))
    assert lambdas(again) == lambdas(merged)
    torch.testing.assert_close(again(x), merged(x))


@needs_peft
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 is more than a change of the weight"),
        ({"use_dora": True}, "use_dora=True is more than a change"),
        ({"lora_bias": True}, "lora_bias=True is more"),
    ],
)
def test_what_no_weight_expresses_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        within(config(**settings))


def test_without_peft_it_says_what_to_install(monkeypatch):
    for name in ("peft", "peft.tuners"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'timm_nrpm\[lora\]'"):
        within(None)
