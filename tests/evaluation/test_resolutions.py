"""Low resolution: the formulas of LR0.FM by hand, the reduction, and what is refused."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.resolutions import ResolutionReport, aggregate, evaluate_resolutions, reduce
from timm_nrpm.evaluation.trials import Effect
from timm_nrpm.nn.pixel_model import PixelModel


def right(count, of=20):
    return "1" * count + "0" * (of - count)


def report(full, classes=10, alpha=200.0, **counts):
    return ResolutionReport(right(full), {int(k[1:]): right(n) for k, n in counts.items()}, classes, alpha)


def test_the_numbers_by_hand():
    found = report(16, n16=4, n32=12)
    assert found.sizes == (16, 32)
    assert (found.accuracy, found.accuracy_at(16), found.relative(16)) == (0.8, 0.2, 0.25)
    assert found.trust == pytest.approx(1 - math.exp(-200 * 0.7**2))
    assert found.weighted(32) == pytest.approx(0.75 * found.trust)
    assert found.effect(16) == Effect.of(right(4), right(16))
    lines = str(found).splitlines()
    assert lines[0] == "20 images, at full size 80.0 % (56.3 to 94.3)"
    assert lines[2].split() == ["16", "20.0", "(5.7", "to", "43.7)", *str(found.effect(16)).split(), "0.250", "0.250"]


@given(st.integers(0, 20), st.integers(0, 20), st.integers(2, 10), st.floats(0.1, 500))
def test_robustness_near_chance_counts_for_nothing(full, low, classes, alpha):
    found = report(full, classes, alpha, n8=low)
    if full == 0:
        assert found.relative(8) is None
        assert found.weighted(8) is None
        return
    excess = max(0.0, full / 20 - 1 / classes)
    assert found.weighted(8) == pytest.approx(low / full * (1 - math.exp(-alpha * excess**2)))
    if full / 20 <= 1 / classes:
        assert found.weighted(8) == 0


def test_the_aggregate_is_the_weighted_mean_of_the_sets():
    reports = [report(20, n8=10, n16=15), report(10, n8=1, n16=5)]
    weights = (0.2, 0.6)
    for size in (8, 16):
        values = [each.weighted(size) for each in reports]
        assert aggregate(reports, weights)[size] == pytest.approx((0.2 * values[0] + 0.6 * values[1]) / 0.8)
        assert aggregate(reports)[size] == pytest.approx(sum(values) / 2)
    assert aggregate([*reports, report(0, n8=1, n16=1)]) == {8: None, 16: None}
    for wrong in ((1.0,), (0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="weight"):
            aggregate(reports, wrong)
    with pytest.raises(ValueError, match="all with the same sizes"):
        aggregate([reports[0], report(10, n8=1)])
    with pytest.raises(ValueError, match="The sizes of the 0 reports"):
        aggregate([])


def test_the_reduction_is_pillows():
    """As in LR0.FM: bicubic to the size and back. Pillow rounds to 8 bits in between, which costs a little."""
    pixels = torch.rand(1, 1, 24, 36, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((pixels[0, 0] * 255).round().byte().numpy())
    expected = image.resize((18, 12), Image.BICUBIC).resize((36, 24), Image.BICUBIC)
    theirs = torch.from_numpy(np.array(expected)) / 255
    ours = reduce(pixels, 12)[0, 0]
    assert (ours - theirs).abs().max() < 3 / 255
    assert ours.std() < 0.7 * pixels.std()


def test_the_reduction_keeps_what_is_smooth_and_stays_in_bounds():
    grey = torch.full((2, 3, 16, 16), 0.3)
    assert torch.allclose(reduce(grey, 4), grey, atol=1e-6)
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float().expand(1, 1, 16, 16)
    assert reduce(board, 8).std() < 0.1 < board.std()
    assert float(reduce(board, 15).min()) >= 0
    assert float(reduce(board, 15).max()) <= 1


def test_a_model_of_a_fine_pattern_loses_it_at_half_the_size():
    """Class 1 has stripes of one pixel, which half the size cannot hold; class 0 stripes of four, which it can."""

    class Stripes(nn.Module):
        def forward(self, x):
            fine = (x[:, 0, :, 1:] - x[:, 0, :, :-1]).abs().mean((1, 2))
            return torch.stack([0.5 - fine, fine - 0.5], 1)

    columns = torch.arange(16)
    fine, coarse = (columns // width % 2 for width in (1, 4))
    pixels = torch.stack([coarse, fine, fine, coarse]).float()[:, None, None].expand(4, 1, 16, 16)
    labels = torch.tensor([0, 1, 1, 0])
    found = evaluate_resolutions(Stripes(), [(pixels, labels)], (8, 4))
    assert (found.correct, found.reduced[8], found.reduced[4]) == ("1111", "1001", "1001")
    assert found.classes == 2


def test_the_evaluation_by_batches_and_its_json():
    model = timm.create_model("resnet8_digits", pretrained=True).train()
    pixels, labels = (part[:50] for part in digits("test"))
    found = evaluate_resolutions(model, zip(pixels.split(20), labels.split(20), strict=True), (2, 4, 6))
    assert model.training
    with torch.no_grad():
        logits = PixelModel(model).eval()(reduce(pixels, 4))
    assert found.reduced[4] == "".join(str(int(each)) for each in logits.argmax(1) == labels)
    assert found.accuracy_at(2) < found.accuracy_at(4) < found.accuracy_at(6)
    assert found.classes == 10
    again = ResolutionReport.from_json(found.to_json())
    assert again == found
    assert json.loads(found.to_json())["numbers"]["relative"]["4"] == found.relative(4)


def test_by_default_the_sizes_are_those_below_the_images():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    found = evaluate_resolutions(model, [(torch.rand(2, 3, 33, 40), torch.tensor([0, 1]))])
    assert found.sizes == (16, 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "have 8 pixels on their shorter side, and sizes=.16, 32, 64, 128.: give sizes below 8"),
        ({"sizes": (4, 8)}, "sizes=.4, 8.: give sizes below 8"),
        ({"sizes": ()}, "give at least one number of pixels, each once"),
        ({"sizes": (4, 4)}, "each once"),
        ({"sizes": (0,)}, "size=0 is not allowed"),
        ({"sizes": (4,), "alpha": 0}, "alpha=0 is not allowed"),
    ],
)
def test_what_is_refused(given, said):
    model = timm.create_model("resnet8_digits", pretrained=True)
    pixels, labels = (part[:4] for part in digits("test"))
    with pytest.raises(ValueError, match=said):
        evaluate_resolutions(model, [(pixels, labels)], **given)
    with pytest.raises(ValueError, match="no images"):
        evaluate_resolutions(model, [], (4,))
