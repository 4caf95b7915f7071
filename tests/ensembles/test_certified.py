"""Certificates of mixtures: on a half-space, where the true radius is known, against attacks, and by simulation."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import TuneConfig
from timm_nrpm.data.loaders import digits
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing, Gate
from timm_nrpm.ensembles.certified import certify_mixture, least_share, predict_mixture
from timm_nrpm.evaluation.certificates import CertificationReport, lower_bound
from timm_nrpm.models.registry import DIGITS

PHI = NormalDist()


def half_space(direction, offset):
    """Class 0 where the direction's product with the pixels is above the offset."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(direction.numel(), 2))
    model[1].weight.data = torch.stack([direction, -direction]) * 100
    model[1].bias.data = torch.tensor([-offset, offset]) * 100
    return model.eval()


@pytest.fixture
def opposed():
    """A robust half-space, an accurate model that is sure of class 1 everywhere, and an image at a distance."""
    direction = torch.zeros(16)
    direction[0] = 1.0
    always = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    always[1].weight.data.zero_()
    always[1].bias.data = torch.tensor([-50.0, 50.0])
    image = torch.full((1, 1, 4, 4), 0.5)
    image[0, 0, 0, 0] = 0.9
    return always, half_space(direction, 0.4), image


def test_the_radius_is_below_the_true_one_and_near_it(opposed):
    """The half-space is 0.5 away: its class has Phi(0.5 / sigma) under noise, and loses to the other model where that
    falls to 1 / (2a)."""
    always, robust, image = opposed
    sigma, share, votes = 0.25, 0.9, 10_000
    mixture = AdaptiveSmoothing(always, robust, share=share)
    report = certify_mixture(mixture, [(image, torch.tensor([0]))], sigma, n=10_000, votes=votes, batch_size=5000)
    (certificate,) = report.images
    true = 0.5 - sigma * PHI.inv_cdf(1 / (2 * share))
    assert certificate.predicted == 0
    assert true - 0.03 < certificate.radius < true
    bound = lower_bound(certificate.votes, 10_000, 1 - 0.001 / 2)
    least = 1 / (2 * share) + math.sqrt(math.log(2 / 0.001) / (2 * votes))
    assert report.least == pytest.approx(least, rel=1e-12)
    assert certificate.radius == pytest.approx(sigma * (PHI.inv_cdf(bound) - PHI.inv_cdf(least)), rel=1e-6)
    assert report.largest_radius >= certificate.radius
    assert CertificationReport.from_json(report.to_json()) == report
    at_the_edge, beyond = image.clone(), image.clone()
    at_the_edge[0, 0, 0, 0] -= certificate.radius
    beyond[0, 0, 0, 0] -= true + 0.05
    assert predict_mixture(mixture, at_the_edge, sigma, votes=votes, seed=5) == (0,)
    assert predict_mixture(mixture, beyond, sigma, votes=votes, seed=5) == (1,)


def test_the_count_of_a_prediction_is_seldom_below_what_is_assumed():
    votes, beta, probability = 200, 0.01, 0.8
    below = math.sqrt(math.log(1 / beta) / (2 * votes))
    counts = np.random.default_rng(0).binomial(votes, probability, 200_000) / votes
    assert (counts < probability - below).mean() <= beta


def test_no_attack_inside_the_radius_contradicts_a_certificate():
    plain = timm.create_model(DIGITS, pretrained=True).eval()
    robust = timm_nrpm.create_model(DIGITS, pretrained=True, lam=1.0)
    images = DataLoader(TensorDataset(*digits("train")), 64, shuffle=True)
    config = TuneConfig(paradigm="all", trainable=("*.weight", "*.bias"), eps=0.15, steps=2, epochs=2, lr=0.02)
    timm_nrpm.tune(robust, images, config)
    robust = timm_nrpm.restore_(robust).eval()
    mixture = AdaptiveSmoothing(plain, robust, share=0.9)
    pixels, labels = (part[:12] for part in digits("test"))
    sigma, votes = 0.3, 400
    report = certify_mixture(mixture, [(pixels, labels)], sigma, n=400, votes=votes)
    attacked = 0
    for number, certificate in enumerate(report.images):
        if certificate.predicted is None or certificate.radius < 0.05:
            continue
        image = pixels[number : number + 1].clone().requires_grad_()
        noisy = image + sigma * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(number))
        probability = robust(noisy).softmax(1)[:, certificate.predicted].mean()
        probability = probability + plain(image).softmax(1)[0, certificate.predicted]
        (slope,) = torch.autograd.grad(probability, image)
        moved = (image - 0.999 * certificate.radius * slope / slope.norm()).detach()
        assert (moved - image).norm() <= certificate.radius
        inside = moved.clamp(0, 1)  # which is no farther from the image
        assert predict_mixture(mixture, inside, sigma, votes=votes, seed=number + 7) == (certificate.predicted,)
        attacked += 1
    assert attacked >= 3


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_share_of_one_half_or_less_has_no_certificate(opposed, share):
    always, robust, image = opposed
    with pytest.raises(ValueError, match=r"has no certificate: at one half or less"):
        certify_mixture(AdaptiveSmoothing(always, robust, share=share), [(image, torch.tensor([0]))])


def test_what_is_too_little(opposed):
    always, robust, image = opposed
    mixture = AdaptiveSmoothing(always, robust, share=0.6)
    with pytest.raises(ValueError, match=r"votes=100 certify nothing at share 0.6 .*: give 137 votes or more"):
        least_share(mixture, 100, 0.999)
    assert least_share(mixture, 137, 0.999) < 1
    with pytest.raises(ValueError, match="sigma=0 is not allowed"):
        certify_mixture(mixture, [(image, torch.tensor([0]))], 0)
    with pytest.raises(ValueError, match="n=20 is not allowed"):
        certify_mixture(mixture, [(image, torch.tensor([0]))], 0.25, n=20)
    gated = AdaptiveSmoothing(always, robust, gate=Gate(0.4, 0.9, 1, 1, 1, 0))
    with pytest.raises(ValueError, match=r"share=0.4 has no certificate"):
        certify_mixture(gated, [(image, torch.tensor([0]))])
