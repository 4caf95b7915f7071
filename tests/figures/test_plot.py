"""One function draws every result, as the function made for that result does."""

import pytest

import timm_nrpm
from timm_nrpm import RobustnessReport, Threat, TuneConfig
from timm_nrpm.data import digits
from timm_nrpm.evaluation.certificates import Certificate, CertificationReport
from timm_nrpm.evaluation.corruption_report import Answers, CorruptionReport
from timm_nrpm.evaluation.diagnostics import embedding_differences
from timm_nrpm.evaluation.history import History
from timm_nrpm.evaluation.landscape import loss_landscape
from timm_nrpm.evaluation.pareto import Candidate, ParetoFront
from timm_nrpm.evaluation.resolutions import ResolutionReport
from timm_nrpm.evaluation.trials import Advice, Bounds, Kept, Trial
from timm_nrpm.figures.advised import draw_advice
from timm_nrpm.figures.certified import draw_certified
from timm_nrpm.figures.corruptions import draw_corruptions
from timm_nrpm.figures.diagnostics import draw_differences, draw_landscape
from timm_nrpm.figures.history import draw_history
from timm_nrpm.figures.lambdas import draw_lambdas
from timm_nrpm.figures.pareto import draw_front
from timm_nrpm.figures.resolutions import draw_resolutions
from timm_nrpm.figures.robustness import draw_attacks, draw_curves


@pytest.fixture(scope="module")
def results():
    """Every kind of result, with the function that draws it and what that is given."""
    pixels, labels = (t[:4] for t in digits("test"))
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.9).eval()
    data = [(pixels, labels)]
    reports = [timm_nrpm.evaluate(model, data, Threat("Linf", eps), "quick", steps=2) for eps in (0.05, 0.1)]
    certified = CertificationReport("a", 0.5, 9, 90, 0.999, 0, "", {}, (Certificate(0, 0, 0.1, 0, 9, 90),))
    corrupted = CorruptionReport(Answers((True, False), {"fog": {1: (True, False)}}), None, 0, {})
    sizes = ResolutionReport("1110", {32: "1100", 16: "1000"}, 10)
    front = ParetoFront(Threat(), 1, 0, 5, 0.1, (Candidate("plain", {"fc": 1.0}, 0.9, 0.4),))
    seen = (Kept("1111", "1000"), Kept("1111", "0110"))
    tried = Trial("nothing", "as it is", 1.0, 1.0, selection=seen[0], report=seen[1])
    other = Trial("a", "b", 1.0, 1.0, selection=seen[1], report=seen[0])
    advice = Advice("fog", Bounds(), (tried, other, Trial("c", "d", 11.0, 1.0, "11.0 times the latency")), {})
    differences = embedding_differences(model, pixels, (pixels + 0.1).clamp(0, 1))
    landscape = loss_landscape(model, pixels[:1], labels[:1], eps=0.1, resolution=3)
    lams = timm_nrpm.lambdas(model)
    history = History(TuneConfig(), ("fc",))
    return {
        "a report": (reports[0], draw_attacks, reports[0]),
        "reports": (reports, draw_curves, reports),
        "a certificate": (certified, draw_certified, [certified]),
        "certificates": ([certified], draw_certified, [certified]),
        "corruptions": (corrupted, draw_corruptions, corrupted),
        "sizes": (sizes, draw_resolutions, sizes),
        "a run": (history, draw_history, history),
        "a front": (front, draw_front, front),
        "an advice": (advice, draw_advice, advice),
        "differences": (differences, draw_differences, {"model": differences}),
        "differences by name": ({"a": differences}, draw_differences, {"a": differences}),
        "a landscape": (landscape, draw_landscape, {"model": landscape}),
        "landscapes by name": ({"a": landscape}, draw_landscape, {"a": landscape}),
        "lambdas": (lams, draw_lambdas, lams),
    }


def test_every_result_is_drawn(results, tmp_path):
    for i, (name, (result, draw, given)) in enumerate(results.items()):
        path = timm_nrpm.plot(result, tmp_path / f"{i}.png")
        assert path == tmp_path / f"{i}.png", name
        assert path.read_bytes() == draw(given, tmp_path / "same.png").read_bytes(), name


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (0.5, "a float"),
        ("report.json", "a str"),
        ([], "a list of nothing"),
        ({}, "a dict of nothing"),
        ([RobustnessReport, 1], "a list of int, type"),
        ({"a": 0.5, "b": "c"}, "a dict of float, str"),
    ],
)
def test_what_has_no_picture_is_named(result, said, tmp_path):
    with pytest.raises(ValueError, match=f"^result is {said}, which has no picture: give a RobustnessReport, "):
        timm_nrpm.plot(result, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
