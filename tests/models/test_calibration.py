import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

from timm_nrpm import NRPMConfig, calibrate_, plain_copy, reprogram_
from timm_nrpm.models.calibration import Moments
from timm_nrpm.models.plain_statistics import moved

pytestmark = pytest.mark.filterwarnings("ignore::timm_nrpm.errors.ReprogrammingWarning")


def mixer():
    """A network without BatchNorm."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 10)).eval()


def test_moments_are_exact_over_any_batches():
    x = torch.randn(57, 5, 3, 3) * torch.arange(1, 6).view(5, 1, 1) + 100
    parts = [Moments.of(part, 1) for part in x.split([1, 30, 7, 19])]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    flat = x.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(total.mean, flat.mean(1))
    np.testing.assert_allclose(total.var, flat.var(1, ddof=1))


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_lambda_one_moves_nothing(net, batch):
    images = torch.rand(64, 3, 8, 8)
    want = net(images)
    reprogram_(net, NRPMConfig(lam=1.0), example=images)
    calibrate_(net, images.split(batch))
    torch.testing.assert_close(net(images), want, atol=1e-5, rtol=1e-5)
    plain = mixer()
    x = torch.rand(64, 3, 4, 4)
    want = plain(x)
    torch.testing.assert_close(calibrate_(reprogram_(plain, NRPMConfig(lam=1.0)), x.split(batch))(x), want)


def inputs_of(model, name, images):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    return seen[0]


def test_relative_is_the_formula(net):
    images = torch.rand(64, 3, 8, 8)
    mean, var = net.norm.running_mean.clone(), net.norm.running_var.clone()
    reprogram_(net, NRPMConfig(lam=0.4, layers="stem"), example=images)
    before, after = (inputs_of(m, "norm", images).transpose(0, 1).flatten(1) for m in (plain_copy(net), net))
    calibrate_(net, images.split(16))
    growth = after.var(1) / before.var(1)
    torch.testing.assert_close(net.norm.running_var, var * growth)
    torch.testing.assert_close(net.norm.running_mean, (mean - before.mean(1)) * growth.sqrt() + after.mean(1))


def test_scratch_is_the_moments_of_the_images(net):
    images = torch.rand(64, 3, 8, 8)
    reprogram_(net, NRPMConfig(lam=0.4), example=images)
    seen = inputs_of(net, "norm", images).transpose(0, 1).flatten(1)
    calibrate_(net, images.split(16), mode="scratch")
    torch.testing.assert_close(net.norm.running_mean, seen.mean(1))
    torch.testing.assert_close(net.norm.running_var, seen.var(1))


def test_without_batchnorm_the_sums_keep_their_moments():
    model, images = mixer(), torch.rand(256, 3, 4, 4)
    plain = copy.deepcopy(model)
    reprogram_(model, NRPMConfig(lam=0.2))
    apart = [(model[i](x) - plain[i](x)).abs().mean() for i, x in ((1, images.flatten(1)),)]
    calibrate_(model, [images])
    for i in (1, 4):
        ours, theirs = inputs_of(model, f"{i + 1}", images) if i == 1 else model(images), plain[: i + 1](images)
        torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.std(0), theirs.std(0), atol=1e-4, rtol=1e-4)
    assert (model[1](images.flatten(1)) - plain[1](images.flatten(1))).abs().mean() < apart[0]
    assert "1.correction.gain" in model.state_dict()


def test_modes_gradients_and_counters_are_kept(net, images):
    net.train()
    net.head.eval()
    reprogram_(net, NRPMConfig(lam=0.4), example=images)
    counter = int(net.norm.num_batches_tracked)
    momentum = net.norm.momentum
    calibrate_(net, [(images, torch.zeros(6))])
    assert net.training
    assert net.norm.training
    assert not net.head.training
    assert (int(net.norm.num_batches_tracked), net.norm.momentum) == (counter, momentum)
    assert not net.norm._forward_pre_hooks
    assert all(p.grad is None for p in net.parameters())


def test_calling_it_again_starts_over(net):
    images = torch.rand(32, 3, 8, 8)
    reprogram_(net, NRPMConfig(lam=0.4), example=images)
    once = calibrate_(net, [images])(images)
    assert torch.equal(calibrate_(net, [images])(images), once)


def test_timm_models_of_each_kind():
    for name in ("resnet10t", "efficientnet_b0", "convnext_atto"):
        model = reprogram_(timm.create_model(name, num_classes=4).eval(), NRPMConfig(lam=0.7, iterations=1))
        calibrate_(model, [torch.rand(4, 3, 32, 32)])
        assert model(torch.rand(2, 3, 32, 32)).isfinite().all()
        assert bool(moved(model)) == (name != "convnext_atto")


def failing(images):
    yield images
    raise OSError("the disk is gone")


@pytest.mark.parametrize("make", [None, mixer])
def test_an_error_leaves_the_model_as_it_was(net, make):
    model = make() if make else net
    images = torch.rand(8, 3, 4, 4) if make else torch.rand(8, 3, 8, 8)
    reprogram_(model, NRPMConfig(lam=0.4), example=images)
    want = model(images)
    with pytest.raises(OSError, match="disk is gone"):
        calibrate_(model, failing(images))
    assert torch.equal(model(images), want)
    assert not moved(model)


@pytest.mark.parametrize(
    ("prepare", "loader", "mode", "message"),
    [
        (lambda m: m, [torch.rand(2, 3, 4, 4)], "relative", "not reprogrammed: call"),
        (reprogram_, [], "relative", "gave no images"),
        (reprogram_, [torch.rand(2, 3, 4, 4)], "scratch", "this model has none"),
        (reprogram_, [{"image": 1}], "relative", "The loader gives dict"),
        (reprogram_, [torch.rand(2, 3, 4, 4)], "nope", 'choose "relative" or "scratch"'),
    ],
)
def test_bad_calls(prepare, loader, mode, message):
    with pytest.raises(ValueError, match=message):
        calibrate_(prepare(mixer()), loader, mode=mode)
