import json

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from scipy import stats

import timm_nrpm
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.conformal import SetPredictor, conformal
from timm_nrpm.evaluation.sets import METHODS
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

SETTINGS = {"alpha": 0.2, "sigma": 0.25, "radius": 0.125, "n": 20}


@pytest.fixture(scope="module")
def model():
    return timm.create_model(DIGITS, pretrained=True).eval()


@pytest.fixture(scope="module")
def images():
    """Of the digits that the model was not trained on, in random order."""
    pixels, labels = digits("test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return pixels[order], labels[order]


def part(images, *bounds):
    return tuple(each[slice(*bounds)] for each in images)


class Shown(nn.Module):
    """Logits that are the first pixels of an image; keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.tensor(4.0)), []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.scale * x.flatten(1)[:, :3]


def shown_images(count, seed=0):
    pixels = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return pixels, pixels.flatten(1)[:, :3].argmax(1)


# --- what it sees, and what follows --------------------------------------------------------------------------------


def test_vanilla_is_split_conformal_prediction():
    pixels, labels = shown_images(50)
    predictor = conformal(Shown(), [(pixels, labels)], alpha=0.2, method="vanilla")
    softmax = torch.softmax(4 * pixels.flatten(1)[:, :3].double(), 1)
    own = np.sort(1 - softmax[torch.arange(50), labels])
    assert predictor.calibration.limit == pytest.approx(own[41 - 1], rel=1e-6)  # of 51 * 0.8
    others, _ = shown_images(20, seed=1)
    scores = 1 - torch.softmax(4 * others.flatten(1)[:, :3].double(), 1)
    want = tuple(tuple(np.flatnonzero(row <= own[40] * (1 + 1e-6)).tolist()) for row in scores.numpy())
    assert predictor.sets(others) == predictor.sets(others, seed=5) == want


@pytest.mark.parametrize(("method", "copies"), [("vanilla", 1), ("one-sample", 1), ("rscp+", 20), ("rscp+ptt", 20)])
def test_each_image_takes_as_many_forwards(method, copies):
    model = Shown()
    predictor = conformal(model, [shown_images(60)], **SETTINGS, method=method, batch_size=7)
    assert sum(map(len, model.seen)) == 1 + 60 * copies
    assert max(map(len, model.seen)) <= 7
    model.seen.clear()
    predictor.sets(shown_images(9, seed=1)[0])
    assert sum(map(len, model.seen)) == 9 * copies


def test_noise_is_normal_and_never_that_of_the_calibration():
    model, (pixels, labels) = Shown(), shown_images(40)
    predictor = conformal(model, [(pixels, labels)], **{**SETTINGS, "n": 200}, method="rscp+", seed=3)
    seen = torch.cat(model.seen[1:]).view(40, 200, 4)
    noise = (seen - pixels.view(40, 1, 4)).flatten()
    assert stats.kstest(noise.numpy(), stats.norm(0, 0.25).cdf).pvalue > 0.001
    model.seen.clear()
    predictor.sets(pixels, seed=3)
    again = torch.cat(model.seen).view(40, 200, 4)
    both = torch.stack(((seen - pixels.view(40, 1, 4))[:, :, 0], (again - pixels.view(40, 1, 4))[:, :, 0]))
    assert abs(np.corrcoef(both.flatten(1).numpy())[0, 1]) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_seeds_batches_and_wrappers(model, images, method):
    calibration, pixels = part(images, 80), part(images, 80, 90)[0]
    want = conformal(model, [calibration], **SETTINGS, method=method)
    batches = list(zip(calibration[0].split(30), calibration[1].split(30), strict=True))
    for same in (
        conformal(model, batches, **SETTINGS, method=method),
        conformal(PixelModel(model), [calibration], **SETTINGS, method=method),
        conformal(nn.DataParallel(model), [calibration], **SETTINGS, method=method),
    ):
        assert same == want
        assert same.sets(pixels, seed=1) == want.sets(pixels, seed=1)
    other = conformal(model, [calibration], **SETTINGS, method=method, seed=1)
    assert (other == want) == (method == "vanilla")


def test_sets_are_drawn_anew_unless_a_seed_is_given(model, images):
    predictor = conformal(model, [part(images, 80)], **{**SETTINGS, "sigma": 0.5})
    pixels = images[0][80:160]
    assert predictor.sets(pixels) != predictor.sets(pixels)
    assert predictor.sets(pixels, seed=1) == predictor.sets(pixels, seed=1) != predictor.sets(pixels, seed=2)


def test_model_and_generators_are_left_as_they_were(images):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9).train()
    trained = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    conformal(model, [part(images, 40)], **SETTINGS).sets(images[0][:2])
    assert torch.equal(torch.rand(3), want)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())


# --- coverage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vanilla", "one-sample", pytest.param("rscp+ptt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("score", ["hps", "aps"])
def test_clean_sets_cover_over_20_splits(model, images, method, score):
    """The mean over splits is at least 1 - alpha, but for what so few images leave to chance."""
    shares = []
    for split in range(20):
        order = torch.randperm(360, generator=torch.Generator().manual_seed(split))
        shuffled = tuple(each[order] for each in images)
        settings = {**SETTINGS, "n": 10, "score": score, "method": method}
        predictor = conformal(model, [part(shuffled, 100)], **settings, seed=split)
        pixels, labels = part(shuffled, 100, 180 if method == "rscp+ptt" else None)
        sets = predictor.sets(pixels, seed=split)
        shares.append(np.mean([label in each for label, each in zip(labels.tolist(), sets, strict=True)]))
    assert np.mean(shares) >= 0.8 - 2 * np.std(shares) / np.sqrt(20)
    if (method, score) == ("vanilla", "hps"):  # which promises no more than that, unless scores are alike
        assert np.mean(shares) <= 0.8 + 1 / 101 + 3 * np.std(shares) / np.sqrt(20) + 0.01


# --- JSON and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_json_both_ways(model, images, method):
    predictor = conformal(model, [part(images, 80)], **SETTINGS, method=method, score="aps")
    text = predictor.to_json()
    again = SetPredictor.from_json(text, timm.create_model(DIGITS, pretrained=True))
    assert again == predictor
    assert again.sets(images[0][:9], seed=1) == predictor.sets(images[0][:9], seed=1)
    assert json.loads(text)["guarantee"] == predictor.guarantee
    other = timm.create_model(DIGITS, pretrained=True)
    with torch.no_grad():
        other.fc.bias += 1
    with pytest.raises(ValueError, match="has other weights than the one that was calibrated: calibrate it anew"):
        SetPredictor.from_json(text, other)


def test_in_words(model, images):
    robust = conformal(model, [part(images, 80)], 0.1, 0.25, 0.125)
    assert str(robust).startswith("one-sample, score hps, 80 calibration images: The set of an image holds its class ")
    assert "with probability 0.9 or more, even if the image was changed by up to L2 0.125" in robust.guarantee
    assert "all classes" not in str(robust)
    trivial = conformal(model, [part(images, 80)], 0.1, 0.25, 0.125, "rscp+", n=2)
    assert str(trivial).endswith("Each set holds all classes, whatever the image.")
    assert trivial.sets(images[0][:2]) == (tuple(range(10)),) * 2
    assert "net" not in repr(robust)


# --- what else one may give ----------------------------------------------------------------------------------------


def test_too_few_images_are_refused_before_any_noise():
    model = Shown()
    refused = r"^40 calibration images are too few: alpha=0.1 with one-sample at radius 0.25 .* takes 88 or more"
    with pytest.raises(ValueError, match=refused):
        conformal(model, [shown_images(40)], 0.1, 0.25, 0.25)
    with pytest.raises(ValueError, match=r"^8 calibration images beside the share of 0.2 .* takes 10 or more"):
        conformal(model, [shown_images(10)], 0.1, 0.25, 0.25, "rscp+ptt")
    assert sum(map(len, model.seen)) == 2  # which tell the number of classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0}, "alpha=0 is not allowed"),
        ({"alpha": 1.5}, "alpha=1.5 is not allowed"),
        ({"sigma": 0}, "sigma=0 is not allowed"),
        ({"radius": -1}, "radius=-1 is not allowed"),
        ({"method": "magic"}, "method='magic' is not known"),
        ({"score": "magic"}, "score='magic' is not known"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"calibration": []}, "gave no images: there is nothing to calibrate on"),
        ({"calibration": [torch.rand(2, 1, 2, 2)]}, "gives Tensor: give pairs"),
        ({"calibration": [(torch.rand(1, 1, 2, 2), torch.tensor([3]))]}, "3 classes: give .* from 0 to 2"),
        ({"calibration": [(torch.rand(1, 1, 2, 2) + 2, torch.tensor([0]))]}, r"pixels in \[0, 1\]"),
        ({"mean": (0.5, 0.5)}, "have 1 channels, and the model's normalisation has 2"),
        ({"model": lambda x: x}, "The model is a function"),
    ],
)
def test_bad_calls(change, message):
    with pytest.raises(ValueError, match=message):
        conformal(**{"model": Shown(), "calibration": [shown_images(60)], **SETTINGS, **change})


def test_bad_images():
    predictor = conformal(Shown(), [shown_images(60)], **SETTINGS)
    for pixels, message in ((torch.rand(1, 2, 2), "give images"), (torch.rand(1, 1, 2, 2) + 2, r"pixels in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            predictor.sets(pixels)
    with pytest.raises(ValueError, match="seed=-1 is not allowed"):
        predictor.sets(torch.rand(1, 1, 2, 2), seed=-1)
