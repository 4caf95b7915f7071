"""Defences known to be broken are flagged, plain models are not: real models on real digits."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_nrpm import Threat, evaluate
from timm_nrpm.attacks import flags as F
from timm_nrpm.attacks.flags import THRESHOLDS, evidence_of, flags_of
from timm_nrpm.attacks.sources import Source
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

THREAT = Threat("Linf", 0.15)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


@pytest.fixture(scope="module")
def data():
    pixels, labels = (t[:60] for t in digits("test"))
    return [(pixels, labels)]


def trained(model: nn.Module, epochs: int = 30, noise: float = 0.0) -> nn.Module:
    """On the digits, in a second or two."""
    torch.manual_seed(0)
    pixels, labels = digits("train")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(128):
            x = (pixels[rows] + noise * torch.randn_like(pixels[rows])).clamp(0, 1)
            loss = nn.functional.cross_entropy(model(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )


PLAIN = {
    "bundled": lambda: timm.create_model(DIGITS, pretrained=True).eval(),
    "linear": lambda: trained(linear()),
    "perceptron": lambda: trained(perceptron()),
    "convolutional": lambda: trained(convolutional(), 8),
    "trained on noise": lambda: trained(perceptron(), 60, 0.25),
}


QUICK, SLOW = ("linear", "perceptron"), ("bundled", "convolutional", "trained on noise")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@pytest.mark.parametrize("eps", [0.02, 0.15])
def test_plain_models_are_not_flagged(data, name, eps):
    torch.manual_seed(0)
    model = PLAIN[name]()
    report = evaluate(model, data, Threat("Linf", eps), mean=None if name == "bundled" else (0.0,))
    assert report.accuracy() > 0.8
    assert set(report.evidence) >= {F.RANDOM, F.ZERO, F.UNBOUNDED, F.SCORES, F.ONE_STEP, F.NON_FINITE}
    assert report.flags == (), report.evidence


class ZeroGradient(nn.Module):
    """Same values, no gradient: the crudest of obfuscations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.detach() + 0 * x)


class Quantised(ZeroGradient):
    """Activations of few levels, whose gradient is zero almost everywhere; a trace is left by a soft step."""

    def forward(self, x):
        return self.model((8 * x).round() / 8)


class Noisy(ZeroGradient):
    """Another noise at every call."""

    def forward(self, x):
        return self.model(x + 0.2 * torch.randn_like(x))


class Clipped(ZeroGradient):
    """Logits so large that the cross-entropy of float32 is exactly 0, as after distillation at a high temperature."""

    def forward(self, x):
        return 1e4 * self.model(x)


class Detached(ZeroGradient):
    """Cut off from autograd altogether."""

    def forward(self, x):
        return self.model(x.detach())


class Integers(ZeroGradient):
    """Through bytes, which have no gradient."""

    def forward(self, x):
        return self.model((8 * x + 8).to(torch.uint8).float() / 8 - 1)


@pytest.mark.parametrize(
    ("defence", "expected"),
    [
        (Detached, {F.ZERO, F.UNBOUNDED}),
        pytest.param(Integers, {F.ZERO, F.UNBOUNDED}, marks=pytest.mark.slow),
        pytest.param(ZeroGradient, {F.ZERO, F.UNBOUNDED}, marks=pytest.mark.slow),
        pytest.param(Quantised, {F.ZERO, F.UNBOUNDED}, marks=pytest.mark.slow),
        pytest.param(Noisy, {F.RANDOM}, marks=pytest.mark.slow),
    ],
)
def test_broken_defences_are_flagged(data, defence, expected):
    """With and without the model beneath it to make examples on."""
    beneath = timm.create_model(DIGITS, pretrained=True).eval()
    for base in (None, copy.deepcopy(beneath)):
        options = {"mean": (0.5,), "std": (0.5,), "steps": 10, "queries": 20, "effort": "fast"}
        report = evaluate(defence(copy.deepcopy(beneath)), data, THREAT, base=base, **options)
        assert expected <= set(report.flags), report.evidence
        if base is not None and defence is not Noisy:
            assert F.MASKED in report.flags, report.evidence
            # What the attacks on the model beneath leave; rounding keeps some of it, as it keeps the noise of a scan.
            assert report.worst_case <= (0.7 if defence in (ZeroGradient, Detached) else 0.9)
        assert str(report).startswith("FLAGS: ")


def test_the_cheap_flags_are_in_every_suite(data):
    beneath = timm.create_model(DIGITS, pretrained=True).eval()
    for suite in ("quick", "standard"):
        options = {"mean": (0.5,), "std": (0.5,), "steps": 1, "queries": 1}
        assert F.ZERO in evaluate(Detached(beneath), data, THREAT, suite, **options).flags
        assert F.RANDOM in evaluate(Noisy(beneath), data, THREAT, suite, **options).flags


@pytest.mark.slow
def test_a_saturated_loss_is_seen_through(data):
    """Its cross-entropy has no gradient, its margin has: the adaptive worst case is the plain model's, give or take."""
    beneath = timm.create_model(DIGITS, pretrained=True).eval()
    options = {"mean": (0.5,), "std": (0.5,), "steps": 10, "queries": 20}
    broken, plain = (evaluate(m, data, THREAT, **options) for m in (Clipped(beneath), beneath))
    assert broken.accuracy("pgd") > plain.accuracy("pgd") + 0.1
    assert broken.worst_case <= plain.worst_case + 0.05


def test_every_flag_is_documented():
    names = [value for name, value in vars(F).items() if name.isupper() and isinstance(value, str)]
    assert sorted(names) == sorted(THRESHOLDS)
    text = DOCS.read_text()
    for name in names:
        assert f"## {name}" in text
        section = text.split(f"## {name}")[1].split("\n## ")[0]
        assert f"{THRESHOLDS[name]:g}" in section or f"{100 * THRESHOLDS[name]:g} %" in section, name


def outcome(right: int, of: int = 100) -> list[bool | None]:
    return [i < right for i in range(of)]


def test_evidence_by_hand():
    clean = [True] * 90 + [False] * 10
    outcomes = {
        "fgsm": ("own", outcome(50)),
        "pgd": ("own", outcome(60)),
        "pgd_plain": ("plain", outcome(45)),
        "pgd_bpda": ("bpda", outcome(40)),
        "square": ("scores", [None if i >= 40 else i < 36 for i in range(100)]),
    }
    probes = {"looked": 50.0, "probed": 50.0, "random": 0.5, "zero": 5.0, "unbounded": 20.0, "half": 40.0,
              "double": 39.0, "surviving": 20.0, "climbing": 5.0}  # fmt: skip
    found = evidence_of(outcomes, clean, probes, non_finite=True, classes=10)
    assert found == pytest.approx(
        {
            F.NON_FINITE: 1.0,
            F.MASKED: 0.2,
            F.SCORES: 0.04,
            F.ONE_STEP: 0.1,
            F.RANDOM: 0.5,
            F.ZERO: 0.1,
            F.UNBOUNDED: 0.3,
            F.FLAT: 39 / 40,
            F.CLIMBING: 0.25,
        }
    )
    assert set(flags_of(found, 100)) == set(THRESHOLDS) - {F.PLAIN_CHANGED}
    assert flags_of({F.PLAIN_CHANGED: 1.0}, 100) == (F.PLAIN_CHANGED,)
    assert flags_of({F.PLAIN_CHANGED: 0.0}, 100) == ()
    assert flags_of({F.MASKED: 0.04}, 50) == ()  # two images of fifty may be chance
    assert flags_of({F.MASKED: 0.06}, 50) == (F.MASKED,)
    few = {**probes, "half": 46.0, "surviving": 9.0}
    assert not {F.FLAT, F.CLIMBING} & set(evidence_of(outcomes, clean, few, non_finite=False, classes=10))


@pytest.mark.parametrize(
    ("threat", "most", "half", "double"),
    [
        (Threat("Linf", 0.3), 1.0, 0.15, 0.6),
        (Threat("Linf", 0.75), 1.0, 0.375, 1.0),
        (Threat("L2", 2.0), 60**0.5, 1.0, 4.0),
        (Threat("L1", 40.0), 60.0, 20.0, 60.0),
        (Threat("L0", 5), 20.0, 2.0, 10.0),
        (Threat("L0", 1), 20.0, 1.0, 2.0),
        (Threat("patch", 3), 5.0, 1.0, 5.0),
    ],
    ids=str,
)
def test_bounds_that_are_tried_beside_the_threat(threat, most, half, double):
    """No bound at all, half of it and twice of it, on one image of 3 x 5 x 4 pixels."""
    tried = F._bounds(threat, torch.rand(1, 3, 5, 4))
    assert [each.norm for each in tried] == [threat.norm] * 3
    assert [each.eps for each in tried] == pytest.approx([most, half, double])


def test_a_flag_has_all_that_it_needs():
    """Reports, pages and cards look up each of these by the flag's name."""
    known = {value for name, value in vars(F).items() if name.isupper() and isinstance(value, str)}
    for table in ("THRESHOLDS", "NUMBERS", "MEANINGS"):
        has = set(getattr(F, table))
        assert has == known, f"{table} in timm_nrpm/attacks/flags.py lacks {known - has} and has {has - known}"
    assert all(meaning.endswith(".") for meaning in F.MEANINGS.values())


def test_how_much_two_forwards_differ():
    """The largest change of a logit beside the largest logit, however small both are."""
    first = torch.tensor([[1e-3, -4e-3], [2e-3, float("nan")]])
    assert F.unlike(first, first) == 0
    assert F.unlike(first, first + torch.tensor([0.0, 1e-3])) == pytest.approx(0.25)
    assert F.unlike(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def test_probes_of_several_batches():
    """Counts are added up, and of random changes the largest counts, also where a batch has no such number."""
    probes = [
        {"looked": 3.0, "random": 0.1, "half": 2.0},
        {"looked": 4.0, "random": 0.3},
        {"looked": 1.0, "random": 0.2},
    ]
    assert F.joined_probes(probes) == {"looked": 8.0, "random": 0.3, "half": 2.0}
    assert F.joined_probes([]) == {}


def test_evidence_where_there_is_little():
    """Shares need ten images, and comparisons two attacks."""
    own = {"pgd": ("own", [True] * 12)}
    assert evidence_of(own, [True] * 12, {}, non_finite=False, classes=4) == {F.NON_FINITE: 0.0}
    scores = {"square": ("scores", [False] * 12)}
    assert F.SCORES not in evidence_of(scores, [True] * 12, {}, non_finite=False, classes=4)
    probes = {"looked": 10.0, "probed": 10.0, "random": 0.0, "zero": 1.0, "unbounded": 5.0, "half": 9.0, "double": 9.0,
              "surviving": 9.0, "climbing": 1.0}  # fmt: skip
    found = evidence_of(own, [True] * 12, probes, non_finite=False, classes=4)
    assert found == {F.NON_FINITE: 0.0, F.RANDOM: 0.0, F.ZERO: 0.1, F.UNBOUNDED: 0.25}
    more = {**probes, "probed": 20.0, "half": 10.0, "double": 5.0, "surviving": 10.0}
    found = evidence_of(own, [True] * 12, more, non_finite=False, classes=4)
    assert (found[F.FLAT], found[F.CLIMBING]) == (0.5, 0.1)
    without_attacks = {name: probes[name] for name in ("looked", "random", "zero")}
    found = evidence_of(own, [True] * 12, without_attacks, non_finite=False, classes=4)
    assert set(found) == {F.NON_FINITE, F.RANDOM, F.ZERO}


def test_images_that_only_scores_break_were_right_before():
    """One that was wrong when clean, or that a gradient breaks, too, is no evidence."""
    outcomes = {
        "pgd": ("own", [None, False, True, True, None]),
        "square": ("scores", [False, False, False, True, False]),
    }
    found = evidence_of(outcomes, [False, True, True, True, True], {}, non_finite=False, classes=4)
    assert found[F.SCORES] == 2 / 5


def test_what_a_probe_counts(monkeypatch):
    """Half and double of the bound from random starts, no bound from the image itself, and five times the steps under
    the bound, of which the last part counts.
    """
    net = PixelModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    pixels, calls = torch.rand(4, 1, 8, 8), []
    labels = net(pixels).argmax(1)

    def climb(forward, x, y, within, seeds, *, steps, start=None, fooled=False):
        calls.append((within.eps, steps, None if start is None else torch.equal(start, pixels), fooled, seeds))
        # Of four images the first rises until half of the steps, the second to the end, the third is broken, and the
        # fourth never rises.
        rises = torch.zeros(steps + 1, 4)
        rises[:, 0] = torch.arange(steps + 1.0).clamp(max=steps / 2)
        rises[:, 1] = torch.arange(steps + 1.0) ** 2
        rises[-1, 2] = float("nan")
        return x, rises

    monkeypatch.setattr(F, "climb", climb)
    found = F.probe(Source(net), pixels, labels, THREAT, [1, 2, 3, 4], steps=2)
    assert calls == [
        (0.075, 2, None, False, [1, 2, 3, 4]),
        (0.3, 2, None, False, [1, 2, 3, 4]),
        (1.0, 2, True, False, [1, 2, 3, 4]),
        (0.15, 10, None, True, [1, 2, 3, 4]),
    ]
    assert found == {"looked": 4, "random": 0, "zero": 0, "probed": 4, "half": 4, "double": 4, "unbounded": 4,
                     "surviving": 3, "climbing": 1}  # fmt: skip
