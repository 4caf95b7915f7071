"""What people do with a timm model has the same results with a reprogrammed one at lambda 1, and right ones below."""

import copy

import pytest
import timm
import timm.optim
import torch
from small_timm_models import DIGITS, SMALL, images, small
from timm.data import create_transform, resolve_data_config
from timm.models import create_feature_extractor, load_checkpoint, save_for_hf
from timm.utils import AttentionExtract

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
from timm_nrpm.models.reprogramming import reprogrammed_layers


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@torch.no_grad()
def test_features_only(name):
    x = images(name)
    plain, one, robust = (
        timm.create_model(prefix + name, features_only=True, out_indices=(0, 1), **SMALL[name][0], **given).eval()
        for prefix, given in (("", {}), ("nrpm_", {"lam": 1.0}), ("nrpm_", {"lam": 0.8}))
    )
    for other in (one, robust):
        kept = {key: value for key, value in other.state_dict().items() if not key.endswith(".lam")}
        other.load_state_dict({**kept, **plain.state_dict()})
    features = [model(x) for model in (plain, one, robust)]
    assert len(lambdas(robust)) > 2
    assert all(torch.equal(a, b) for a, b in zip(features[0], features[1], strict=True))
    assert [f.shape for f in features[2]] == [f.shape for f in features[0]]
    assert not any(torch.allclose(a, b) for a, b in zip(features[0], features[2], strict=True))
    assert robust.feature_info.channels() == plain.feature_info.channels()


@torch.no_grad()
def test_features_are_those_of_the_model(name):
    x, model = images(name), small(name, 0.8).eval()
    last, between = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert torch.equal(model.forward_head(last), model(x))
    _, plain = plain_copy(model).forward_intermediates(x)
    assert not any(torch.allclose(a, b) for a, b in zip(between, plain, strict=True))
    _, (chosen,) = model.forward_intermediates(x, indices=[1])
    assert torch.equal(chosen, between[1])


@torch.no_grad()
def test_features_by_a_symbolic_trace():
    x, model = images(DIGITS), small(DIGITS, {"*": 0.8}).eval()
    traced = create_feature_extractor(model, {"layer2": "features", "fc": "logits"})
    got = traced(x)
    assert lambdas(traced) == lambdas(model)
    assert torch.equal(got["logits"], model(x))
    assert torch.equal(got["features"], model.forward_intermediates(x, indices=[2], intermediates_only=True)[0])


@torch.no_grad()
@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_attention_maps(lam):
    """The map that follows from what the reprogrammed projection gives, for queries and keys of each head."""
    name = "vit_tiny_patch16_224"
    x, model = images(name), small(name, lam).eval()
    model.blocks[1].attn.fused_attn = False  # a fused one computes no map
    seen = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda _, __, given: seen.append(given))
    maps = AttentionExtract(model, method="fx", names=["blocks.1.attn.softmax"])(x)
    query, key, _ = seen[0].reshape(4, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    want = (query * 8**-0.5 @ key.transpose(-2, -1)).softmax(-1)
    torch.testing.assert_close(maps["blocks.1.attn.softmax"], want)


def test_the_classifier_and_what_images_are_like_are_timms(name):
    plain, model = small(name), small(name, 0.8)
    head = model.get_classifier()
    assert head is model.get_submodule(str(model.default_cfg["classifier"]))
    assert head in reprogrammed_layers(model).values()
    config = resolve_data_config({}, model=model)
    assert config == resolve_data_config({}, model=plain)
    assert str(create_transform(**config)) == str(create_transform(**resolve_data_config(model=plain)))


@torch.no_grad()
@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_channels_last(name, lam):
    x, model = images(name), small(name, lam).eval()
    want = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert next(p for p in last.parameters() if p.ndim == 4 and p.shape[1] > 1).is_contiguous(
        memory_format=torch.channels_last
    )
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), want, atol=1e-5, rtol=1e-4)
    assert lambdas(last) == lambdas(model)


@torch.no_grad()
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_checkpoint_of_either_model_loads(name, calibrated, tmp_path):
    x, source = images(name), small(name, {"*": 0.6}).eval()
    if calibrated:
        calibrate_(source, [x])
    torch.save({"state_dict": source.state_dict()}, tmp_path / "reprogrammed.pth")
    torch.save({"state_dict": plain_copy(source).state_dict()}, tmp_path / "plain.pth")
    model = reprogram_(timm.create_model(name, **SMALL[name][0]), NRPMConfig(lam=0.8)).eval()
    load_checkpoint(model, tmp_path / "plain.pth")
    assert set(lambdas(model).values()) == {0.8}
    assert torch.equal(plain_copy(model)(x), plain_copy(source)(x))
    load_checkpoint(model, tmp_path / "reprogrammed.pth")
    assert lambdas(model) == lambdas(source)
    assert torch.equal(model(x), source(x))
    again = timm.create_model(
        f"nrpm_{name}", checkpoint_path=tmp_path / "reprogrammed.pth", lam=0.8, **SMALL[name][0]
    ).eval()
    assert torch.equal(again(x), source(x))


@torch.no_grad()
def test_a_checkpoint_becomes_a_variant(tmp_path):
    x, source = images(DIGITS), small(DIGITS, 0.6).eval()
    calibrate_(source, [x])
    torch.save(source.state_dict(), tmp_path / "last.pth")
    model = timm.create_model(f"nrpm_{DIGITS}", checkpoint_path=tmp_path / "last.pth").eval()
    with pytest.raises(ValueError, match="save with full=True"):
        save_pretrained(model, tmp_path / "v")
    again = from_pretrained(save_pretrained(model, tmp_path / "v", full=True))
    assert lambdas(again) == lambdas(source)
    assert torch.equal(again(x), source(x))
    assert torch.equal(restore_(again)(x), plain_copy(source)(x))


@pytest.mark.parametrize("create", [lambda: small(DIGITS, 0.6), lambda: timm.create_model(f"nrpm_{DIGITS}", lam=0.6)])
def test_what_timm_publishes_itself_is_never_taken_for_the_plain_model(create, tmp_path):
    save_for_hf(create(), tmp_path)
    with pytest.raises((RuntimeError, TypeError), match=r"conv1\.lam|argument 'lam'"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_checkpoint_of_a_reprogrammed_model_is_no_plain_models(tmp_path):
    torch.save(small(DIGITS, 0.6).state_dict(), tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"load it by timm.create_model\('nrpm_resnet8_digits', checkpoint_path="):
        timm_nrpm.create_model(DIGITS, checkpoint_path=str(tmp_path / "last.pth"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_compiled(lam):
    x, model = images(DIGITS), small(DIGITS, lam).eval()
    torch.testing.assert_close(torch.compile(model)(x), model(x), atol=1e-5, rtol=1e-4)
