"""Change of the embedding: against the largest that a linear one allows, and on a real model."""

import json
import math

import pytest
import timm
import torch
from torch import nn

import timm_nrpm
from timm_nrpm import Threat
from timm_nrpm.attacks.sources import sources_of
from timm_nrpm.data.loaders import digits
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation import embedding as room
from timm_nrpm.evaluation.embedding import EmbeddingReport, embedding_change, embedding_of
from timm_nrpm.nn.pixel_model import PixelModel


class Linear(nn.Module):
    """An embedding that is a linear map of the pixels, and a last layer on it."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.tensor(weight), torch.tensor(bias)
        self.head = nn.Linear(len(bias), 2)

    def forward_features(self, x):
        return x.flatten(1) @ self.weight.T + self.bias

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


WEIGHT, BIAS = [[2.0, -1.0, 0.5], [1.5, -1.0, 1.0]], [1.0, 2.0]


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.1), ("L1", 0.1)])
def test_the_change_of_a_linear_embedding_is_the_largest_there_is(norm, eps):
    """The distance is convex, so it is largest at a corner of the ball, or along the first singular vector. The rows of
    the map are nearly parallel, so that no other corner holds an ascent."""
    model = Linear(WEIGHT, BIAS)
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    pixels = torch.tensor([[0.5, 0.5, 0.5], [0.3, 0.6, 0.4]]).view(2, 3, 1, 1)
    if norm == "Linf":
        corners = torch.cartesian_prod(*[torch.tensor([-eps, eps], dtype=torch.float64)] * 3)
        largest = float((corners @ weight.T).norm(dim=1).max())
    elif norm == "L1":
        largest = eps * float(weight.norm(dim=0).max())
    else:
        largest = eps * float(torch.linalg.svdvals(weight)[0])
    clean = pixels.view(2, 3).double() @ weight.T + torch.tensor(BIAS)
    report = embedding_change(model, [pixels], Threat(norm, eps), steps=40)
    assert report.change == pytest.approx((largest / clean.norm(dim=1)).tolist(), rel=0.01)
    assert all(random <= change for random, change in zip(report.random, report.change, strict=True))
    assert report.sources == ("own",)


@pytest.fixture(scope="module")
def images():
    return tuple(part[:40] for part in digits("test"))


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet8_digits", pretrained=True).eval()


def test_labels_are_not_used_and_batches_do_not_matter(model, images):
    pixels, labels = images
    threat = Threat("Linf", 0.1)
    whole = embedding_change(model, [pixels], threat, steps=5)
    parts = embedding_change(model, zip(pixels.split(16), labels.split(16), strict=True), threat, steps=5)
    assert parts.change == pytest.approx(whole.change, rel=1e-3)
    assert parts.random == pytest.approx(whole.random, rel=1e-3)
    assert whole.mean_random < whole.mean_change / 2
    other = embedding_change(model, [pixels], threat, steps=5, seed=1)
    assert other.random != whole.random


def test_a_larger_threat_and_more_steps_find_more(model, images):
    found = {
        (eps, steps): embedding_change(model, [images[0]], Threat("Linf", eps), steps=steps)
        for eps, steps in ((0.02, 10), (0.2, 1), (0.2, 10))
    }
    assert found[0.02, 10].mean_change < found[0.2, 1].mean_change < found[0.2, 10].mean_change
    assert found[0.02, 10].agreement == 1.0
    assert found[0.2, 10].agreement < 0.9


def test_the_images_are_within_the_threat_and_the_model_is_left_as_it_was(model, images, monkeypatch):
    """What is reported is measured again, on the images that every ascent returned."""
    seen = []
    climb = room.climb
    monkeypatch.setattr(room, "climb", lambda *args, **more: seen.append(climb(*args, **more)) or seen[-1])
    threat = Threat("Linf", 0.1)
    trained = timm.create_model("resnet8_digits", pretrained=True).train()
    report = embedding_change(trained, [images[0]], threat, steps=3)
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())
    ((attacked, _),) = seen
    assert threat.allows(images[0], attacked).all()
    with torch.no_grad():
        clean, moved = (embedding_of(PixelModel(model), x).double() for x in (images[0], attacked))
    assert report.change == pytest.approx(((moved - clean).norm(dim=1) / clean.norm(dim=1)).tolist(), rel=1e-4)


def test_of_a_reprogrammed_model_no_one_gradient_is_trusted(images):
    reprogrammed = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    timm_nrpm.calibrate_(reprogrammed, [digits("train")[0][:200]])
    threat = Threat("Linf", 0.1)
    report = embedding_change(reprogrammed, [images[0][:16]], threat, steps=5)
    assert report.sources == ("own", "bpda", "plain")
    layers = timm_nrpm.reprogramming.reprogrammed_layers(reprogrammed).values()
    assert not any(layer.linear_backward for layer in layers)
    sources = sources_of(reprogrammed)
    seeds = [seed_of(0, place) for place in range(16)]
    with timm_nrpm.modes.attackable(reprogrammed):
        own = sources["own"]
        pixels = images[0][:16]
        alone = [room._farthest({"own": own, "by": each}, pixels, threat, seeds, 5)[1] for each in sources.values()]
    assert report.change == pytest.approx(torch.stack(alone).amax(0).tolist(), rel=1e-4)


def test_the_embedding_is_what_the_last_layer_takes(model, images):
    net = PixelModel(model)
    with torch.no_grad():
        logits = model.get_classifier()(embedding_of(net, images[0]))
        assert torch.allclose(logits, net(images[0]), atol=1e-5)


def test_the_report_by_hand():
    report = EmbeddingReport(Threat("L2", 0.5), 20, 3, (0.2, 0.4, 0.9), (0.1, 0.1, 0.1), "110", ("own", "plain"))
    assert (report.mean_change, report.mean_random) == pytest.approx((0.5, 0.1))
    assert report.agreement == pytest.approx(2 / 3)
    half = 1.96 * math.sqrt((0.09 + 0.01 + 0.16) / 2 / 3)
    lines = str(report).splitlines()
    assert lines[0] == "3 images, L2 0.5, 20 steps along own, plain"
    ends = f"{100 * (0.5 - half):.1f} to {100 * (0.5 + half):.1f}"
    assert lines[1] == f"change of the embedding, largest found: mean 50.0 % ({ends}), median 40.0 %"
    assert lines[3] == "same prediction at the largest change: 66.7 % (9.4 to 99.2)"
    assert EmbeddingReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["means"]["change"] == report.mean_change


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"threat": Threat("L0", 2)}, "The threat L0 2 has no gradient to climb: give one under Linf, L2 or L1"),
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"loader": []}, "no images"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}, "has no forward_features and forward_head"),
    ],
)
def test_what_is_refused(model, images, given, said):
    with pytest.raises(ValueError, match=said):
        embedding_change(**{"model": model, "loader": [images[0]], "steps": 1, **given})
