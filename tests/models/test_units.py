import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

import timm_nrpm
from timm_nrpm import NRPMConfig, calibrate_, from_pretrained, reprogram_, restore_, save_pretrained
from timm_nrpm.attacks.sources import SURROGATES, sources_of
from timm_nrpm.models import units as fitting

CONFIG = NRPMConfig(lam=0.3, eps=0.5, standardize=True)


def network():
    """Its layers have at most 512 sums for 32 images, which are all measured."""
    layers = nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def images():
    return torch.rand(32, 2, 6, 6)


def test_units_are_means_and_distances_in_the_plain_model(images):
    model = network()
    plain = copy.deepcopy(model)
    calibrate_(reprogram_(model, CONFIG), images.split(12))
    hidden = plain[:3](images).detach().double().numpy()
    linear, conv = model[3].units, model[0].units
    np.testing.assert_allclose(linear.centre, hidden.mean(0), rtol=1e-5)
    np.testing.assert_allclose(conv.centre, images.double().mean((0, 2, 3)), rtol=1e-5)
    # Sums are measured as they come, from the mean of the images until then: the last two batches are off by that.
    p = (hidden - hidden.mean(0))[:, None] * plain[3].weight.detach().double().numpy()
    np.testing.assert_allclose(linear.distance, np.abs(p - p.mean(-1, keepdims=True)).mean((0, 2)), rtol=0.05)
    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (3, 3), (2, 3))  # [n, C, 4, 4, 3, 3]
    for output, weight in enumerate(plain[0].weight.detach().double().numpy()):
        channel = output // 2
        p = (windows[:, channel] - images[:, channel].double().mean().item()) * weight[0]
        p = p.reshape(-1, 9)
        assert conv.distance[output] == pytest.approx(np.abs(p - p.mean(-1, keepdims=True)).mean(), rel=0.05)


def test_one_batch_is_exact(images):
    model = network()
    weight = model[3].weight.detach().double()
    hidden = model[:3](images).detach().double()
    calibrate_(reprogram_(model, CONFIG), [images])
    p = (hidden - hidden.mean(0)).unsqueeze(1) * weight
    want = (p - p.mean(-1, keepdim=True)).abs().mean((0, 2))
    torch.testing.assert_close(model[3].units.distance.double(), want, rtol=1e-5, atol=0)


def test_many_sums_are_drawn_from_without_a_bias(images, monkeypatch):
    exact = calibrate_(reprogram_(network(), CONFIG), [images])
    weights = exact.state_dict()
    for name, value in (("IMAGES", 8), ("POSITIONS", 4), ("KEPT", 64)):
        monkeypatch.setattr(fitting, name, value)
    drawn = network()
    drawn.load_state_dict({k: v for k, v in weights.items() if k.endswith(("weight", "bias"))})
    calibrate_(reprogram_(drawn, CONFIG), images.split(2))
    torch.testing.assert_close(drawn[0].units.distance, exact[0].units.distance, rtol=0.2, atol=0)


def test_the_estimate_no_longer_depends_on_the_size_of_weights(images):
    """That of an output with ten times the weights is ten times as large, at the same eps."""
    small, large = network(), network()
    large.load_state_dict(small.state_dict())
    large[3].weight.data[1] *= 10
    small[3].bias.data.zero_()
    large[3].bias.data.zero_()
    ours, theirs = (
        calibrate_(reprogram_(model, NRPMConfig(lam=0.0, eps=0.5, standardize=True)), [images])(images)
        for model in (small, large)
    )
    torch.testing.assert_close(theirs[:, 1], 10 * ours[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs[:, 0], ours[:, 0])


def test_outputs_without_a_distance_keep_their_products_unit(images):
    model = network()
    model[3].weight.data[1] = 0
    calibrate_(reprogram_(model, CONFIG), [images])
    assert float(model[3].units.distance[1]) == 1
    assert bool(model(images).isfinite().all())


def test_they_are_those_of_the_config(images):
    model = network()
    plain = copy.deepcopy(model)(images)
    calibrate_(reprogram_(model, CONFIG), iter([images]))  # a loader that gives its images once
    ours = model(images)
    assert torch.equal(calibrate_(model, [images])(images), ours)
    reprogram_(model, replace(CONFIG, standardize=False))
    assert not torch.allclose(calibrate_(model, [images])(images), ours, atol=1e-3)
    reprogram_(model, replace(CONFIG, lam=1.0))
    assert torch.equal(model(images), plain)  # which needs no units
    assert torch.equal(calibrate_(model, [images])(images), plain)
    assert torch.equal(restore_(model)(images), plain)
    assert not hasattr(model[0], "units")


def test_without_a_calibration_there_is_no_answer(images):
    """After an error, after other lambdas, and in a copy without a calibration: never one in other units."""

    def loader():
        yield images
        raise OSError("the disk is gone")

    model = reprogram_(network(), CONFIG)
    with pytest.raises(ValueError, match=r"units are not known yet: call timm_nrpm\.calibrate_"):
        model(images)
    with pytest.raises(OSError, match="gone"):
        calibrate_(model, loader())
    with pytest.raises(ValueError, match="units are not known"):
        model(images)
    calibrate_(model, [images])
    reprogram_(model, replace(CONFIG, lam=0.9))
    with pytest.raises(ValueError, match="units are not known"):
        model(images)


def test_all_images_count_alike_in_any_order():
    """A folder sorted by classes: one fifth has a tenth of the contrast."""
    images = torch.rand(320, 2, 12, 12)
    images[:64] = 0.5 + (images[:64] - 0.5) / 10
    found = []
    for order in (torch.arange(320), torch.arange(320).flip(0), torch.randperm(320)):
        model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(400, 3))
        torch.nn.init.uniform_(model[0].weight, -1, 1, generator=torch.Generator().manual_seed(0))
        calibrate_(reprogram_(model, CONFIG), images[order].split(32))
        found.append(model[0].units.distance.mean())
    torch.testing.assert_close(torch.stack(found), found[2].expand(3), rtol=0.1, atol=0)


def test_layers_called_by_keyword_and_pruned_layers():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x.flatten(1))

    images = torch.rand(8, 1, 2, 2)
    model = Named()
    prune.l1_unstructured(model.fc, "weight", 0.5)
    calibrate_(reprogram_(model, CONFIG), [images])
    assert bool(model(images).isfinite().all())


def test_a_variant_has_them(images, tmp_path):
    model, plain = network(), network()
    plain.load_state_dict(model.state_dict())
    calibrate_(reprogram_(model, CONFIG), [images])
    loaded = from_pretrained(save_pretrained(model, tmp_path / "v", full=False), base=plain)
    assert torch.equal(loaded(images), model(images))
    assert loaded.nrpm.config == replace(model.nrpm.config, lam={"0": 0.3, "3": 0.3}, layers=("0", "3"))


@pytest.mark.parametrize(
    "name", ["resnet10t", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "nf_resnet26"]
)
def test_timm_models_of_each_kind(name):
    kwargs = {"img_size": 32, "patch_size": 16} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, **kwargs).eval()
    images = torch.rand(4, 3, 32, 32)
    plain = model(images)
    reprogram_(model, NRPMConfig(lam=0.9, eps=1.0, iterations=1, standardize=True))
    calibrate_(model, [images])
    ours = model(images)
    assert bool(ours.isfinite().all())
    assert 0 < (ours - plain).detach().abs().max() < 100 * plain.detach().abs().max()


def test_an_attack_follows_surrogates_in_the_same_units():
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5, eps=0.5, standardize=True).eval()
    images = torch.rand(16, 1, 8, 8)
    calibrate_(model, [images])
    sources = sources_of(model, [images])
    for name in SURROGATES:
        units = sources[name].net.model.conv1.units
        assert torch.equal(units.centre, model.conv1.units.centre)
