"""The bounds of section 2.2, and Theorems 1 and 3 in the linear case, on random instances."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_nrpm.data.loaders import digits
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.bounds import weight_bound


class Small(nn.Module):
    """A network whose whole Hessian fits."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(64, 4), nn.Linear(4, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).tanh())


def images(count=60, size=25):
    pixels, labels = (part[:count] for part in digits("test"))
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def on_pixels(model):
    return PixelModel(model, mean=(0.0,), std=(1.0,)).eval()


def moved(model, size, seed=0):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in other.parameters():
            each += size * torch.randn(each.shape, generator=generator)
    return other


@pytest.mark.parametrize("seed", range(3))
def test_the_terms_are_those_of_the_whole_hessian(seed):
    model = Small(seed)
    other = moved(model, 0.01, seed)
    found = weight_bound(on_pixels(model), on_pixels(other), images(), iterations=200)
    pixels, labels = (torch.cat(part) for part in zip(*images(), strict=True))
    names, shapes = zip(*((name, each.shape) for name, each in model.named_parameters()), strict=True)
    start, end = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, other))

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        state = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (pixels,)), labels)

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, start))
    assert found.curvature == pytest.approx(abs(float(max(values, key=abs))), rel=1e-2)
    slope = torch.autograd.functional.jacobian(loss, start) @ (end - start)
    assert found.slope == pytest.approx(abs(float(slope)), rel=1e-3, abs=1e-7)
    assert found.distance == pytest.approx(float((end - start).norm()), rel=1e-5)
    assert found.difference == pytest.approx(float(loss(end) - loss(start)), abs=1e-6)


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), size=st.floats(1e-4, 0.02))
def test_near_networks_are_within_the_bound(seed, size):
    model = Small(seed % 7)
    found = weight_bound(on_pixels(model), on_pixels(moved(model, size, seed)), images(), iterations=60)
    assert found.holds or abs(found.difference) < 1.01 * found.bound  # to second order


def test_a_late_part_alone_counts_its_own_weights():
    model = timm.create_model("resnet8_digits", pretrained=True).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc.weight += 0.05
    found = weight_bound(PixelModel(model).eval(), PixelModel(other).eval(), images(), iterations=5)
    assert found.distance == pytest.approx(0.05 * model.fc.weight.numel() ** 0.5, rel=1e-4)
    assert found.curvature > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    model.fc.weight.requires_grad_(False)
    with torch.no_grad():
        assert weight_bound(PixelModel(model).eval(), PixelModel(other).eval(), images(), iterations=5) == found
    assert not model.fc.weight.requires_grad


def test_a_loss_that_does_not_depend_on_the_weights_has_no_curvature():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10))

        def forward(self, x):
            return 0 * self.weight.expand(len(x), 10)

    found = weight_bound(on_pixels(Dead()), on_pixels(moved(Dead(), 0.1)), images(), iterations=3)
    assert (found.curvature, found.slope, found.difference, found.holds) == (0, 0, 0, True)


def test_networks_that_cannot_be_compared_are_refused():
    small = on_pixels(Small(0))
    with pytest.raises(ValueError, match="two of one architecture"):
        weight_bound(small, PixelModel(timm.create_model("resnet8_digits")), images())
    with pytest.raises(ValueError, match="no images"):
        weight_bound(small, small, [])
    with pytest.raises(ValueError, match="iterations=0"):
        weight_bound(small, small, images(), iterations=0)


def semirobustness(maps, x, y, eps, reads):
    """Definition 1 for a chain of linear maps and labels of plus or minus 1: the mean over the samples of the smallest
    `y * reads(maps(x + change))` within Linf `eps`, in closed form."""
    whole = reads
    for each in reversed(maps):
        whole = whole @ each
    return float((y * (x @ whole) - eps * whole.abs().sum()).mean())


def instance(seed, depth):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 6, (depth + 1,), generator=generator).tolist()
    maps = [torch.randn(out, size, generator=generator, dtype=torch.float64) for size, out in pairwise(sizes)]
    x = torch.randn(50, sizes[0], generator=generator, dtype=torch.float64)
    reads = torch.randn(sizes[-1], generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(sizes[0], generator=generator, dtype=torch.float64)).sign()
    return maps, x, y, reads, generator


@settings(max_examples=50)
@given(seed=st.integers(0, 100_000), depth=st.integers(1, 5), eps=st.floats(0, 0.5))
def test_a_subnetwork_is_semirobust_if_and_only_if_its_layers_are(seed, depth, eps):
    """Theorem 1: what reads the last layer reads every layer, through the maps that follow, and the reverse."""
    maps, x, y, reads, _ = instance(seed, depth)
    whole = semirobustness(maps, x, y, eps, reads)
    for layer in range(1, depth + 1):
        through = reads
        for each in reversed(maps[layer:]):
            through = through @ each
        assert semirobustness(maps[:layer], x, y, eps, through) == pytest.approx(whole)


@settings(max_examples=50)
@given(seed=st.integers(0, 100_000), depth=st.integers(2, 5), eps=st.floats(0, 0.5))
def test_a_linear_combination_of_semirobust_layers_is_semirobust(seed, depth, eps):
    """Theorem 3: a last layer that is a combination, with weights of at least 0, of what all layers are read by keeps
    at least the combination of what they keep."""
    maps, x, y, _, generator = instance(seed, depth)
    kept, combined = 0.0, torch.zeros(x.shape[1], dtype=torch.float64)
    for layer in range(1, depth + 1):
        reads = torch.randn(len(maps[layer - 1]), generator=generator, dtype=torch.float64)
        share = float(torch.rand((), generator=generator))
        kept += share * semirobustness(maps[:layer], x, y, eps, reads)
        for each in reversed(maps[:layer]):
            reads = reads @ each
        combined += share * reads
    assert semirobustness([], x, y, eps, combined) >= kept - 1e-9
