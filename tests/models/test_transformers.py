"""transformers' wrapper of timm models around a reprogrammed one, from folders alone."""

import pytest
import torch

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, calibrate_, evaluate, from_pretrained, lambdas, plain_copy, reprogram_

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CONFIGS = {
    "resnet8_digits": ({}, (1, 8, 8)),
    "vit_tiny_patch16_224": (VIT, (3, 16, 16)),
}


def wrapped(name, prefix="nrpm_", **settings):
    """A wrapper of a reprogrammed model, or with another prefix of a plain one, with the same weights."""
    torch.manual_seed(1)
    config = transformers.TimmWrapperConfig(
        architecture=f"{prefix}{name}", num_labels=4, model_args={**CONFIGS[name][0], **settings}
    )
    return transformers.TimmWrapperForImageClassification(config).eval()


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def x(name):
    return torch.rand(4, *CONFIGS[name][1])


@torch.no_grad()
def test_the_wrapper_computes_what_the_model_does(name, x):
    robust, one, plain = wrapped(name, lam=0.8), wrapped(name, lam=1.0), wrapped(name, prefix="")
    for other in (robust, one):
        other.timm_model.load_state_dict(plain.timm_model.state_dict())
    assert torch.equal(one(x).logits, plain(x).logits)
    want = reprogram_(plain.timm_model, NRPMConfig(lam=0.8))(x)
    assert torch.equal(robust(x).logits, want)
    assert not torch.allclose(one(x).logits, want)
    labels = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(robust(x, labels=labels).loss, torch.nn.functional.cross_entropy(want, labels))


@torch.no_grad()
def test_it_is_saved_and_loaded_with_its_lambdas(name, x, tmp_path):
    model = wrapped(name, lam=0.8, iterations=2)
    for layer in timm_nrpm.reprogramming.reprogrammed_layers(model).values():
        layer.lam.fill_(0.6)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert set(lambdas(again).values()) == {0.6}
    assert torch.equal(again(x).logits, model(x).logits)


@torch.no_grad()
def test_what_calibration_fitted_is_reported_as_left_out_and_a_variant_has_it(tmp_path):
    x = torch.rand(4, 3, 16, 16)
    model = wrapped("vit_tiny_patch16_224", lam=0.8)
    calibrate_(model, [x])
    fitted = {key for key in model.state_dict() if ".correction." in key}
    assert fitted
    model.save_pretrained(tmp_path / "theirs")
    _, report = transformers.TimmWrapperForImageClassification.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert set(report["unexpected_keys"]) == fitted
    timm_nrpm.save_pretrained(model, tmp_path / "ours", full=True)
    again = wrapped("vit_tiny_patch16_224", prefix="")
    again.timm_model = from_pretrained(tmp_path / "ours")
    assert torch.equal(again(x).logits, model(x).logits)


@torch.no_grad()
def test_functions_of_this_package_take_the_wrapper(name, x, tmp_path):
    model = wrapped(name, prefix="")
    plain = model(x).logits
    assert reprogram_(model, NRPMConfig(lam=0.7)) is model
    assert lambdas(model) == lambdas(model.timm_model)
    assert not torch.allclose(model(x).logits, plain)
    assert torch.equal(plain_copy(model)(x), plain)
    again = from_pretrained(timm_nrpm.save_pretrained(model, tmp_path / "v", full=True))
    assert torch.equal(again(x), model(x).logits)


def test_an_evaluation_attacks_the_model_inside():
    model = wrapped("resnet8_digits", lam=0.8)
    loader = [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]
    threat = Threat("Linf", 0.1)
    assert (
        evaluate(model, loader, threat, "quick").survivors
        == evaluate(model.timm_model, loader, threat, "quick").survivors
    )
