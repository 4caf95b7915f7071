"""Results of plain models that are kept: taken where everything is the same, found anew where anything differs."""

import json

import pytest
import timm
import torch

import timm_nrpm
from timm_nrpm import Threat, evaluate
from timm_nrpm.cli.program import main
from timm_nrpm.evaluation import controls
from timm_nrpm.evaluation.judge import Judge


def reprogrammed(lam):
    return timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=lam).eval()


@pytest.fixture
def judged(monkeypatch):
    """The models that were attacked, as their lambdas, in the order of the batches."""
    attacked, attack = [], Judge.__call__

    def recorded(judge, *arguments):
        attacked.append(min(timm_nrpm.lambdas(judge.net.model).values(), default=None))
        return attack(judge, *arguments)

    monkeypatch.setattr(Judge, "__call__", recorded)
    return attacked


@pytest.fixture
def digits(monkeypatch):
    """Two batches, each judged by itself."""
    monkeypatch.setattr("timm_nrpm.evaluation.sharing.TOGETHER", 4)
    pixels, labels = timm_nrpm.loaders.digits("test")
    return [(pixels[i : i + 4], labels[i : i + 4]) for i in (0, 4)]


def measured(model, digits, folder, threat=None, suite="quick", **more):
    return evaluate(model, digits, threat or Threat("Linf", 0.1), suite, steps=2, controls=folder, **more)


def test_the_control_is_attacked_once_for_all_lambdas(judged, digits, tmp_path):
    first = measured(reprogrammed(0.8), digits, tmp_path)
    assert judged == [0.8, None, 0.8, None]
    judged.clear()
    second = measured(reprogrammed(0.5), digits, tmp_path)
    assert judged == [0.5, 0.5]
    assert second.control.attacks == first.control.attacks
    assert second.control.correct == first.control.correct
    fresh = evaluate(reprogrammed(0.5), digits, Threat("Linf", 0.1), "quick", steps=2).control
    assert [attack.survived for attack in second.control.attacks] == [attack.survived for attack in fresh.attacks]


def other_weights():
    model = timm.create_model("resnet8_digits", pretrained=True).eval()
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    return timm_nrpm.reprogram_(model, timm_nrpm.NRPMConfig(lam=0.5))


def darker(digits):
    return [(pixels * 0.99, labels) for pixels, labels in digits]


DIFFERENT = {
    "the bound": lambda model, digits: (model, digits, {"threat": Threat("Linf", 0.11)}),
    "the seed": lambda model, digits: (model, digits, {"seed": 1}),
    "the suite": lambda model, digits: (model, digits, {"suite": "adaptive", "effort": "fast", "queries": 1}),
    "the weights": lambda model, digits: (other_weights(), digits, {}),
    "the normalisation": lambda model, digits: (model, digits, {"mean": (0.4,), "std": (0.5,)}),
    "the images": lambda model, digits: (model, darker(digits), {}),
    "the places of the images": lambda model, digits: (model, digits[::-1], {}),
    "the code": None,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_anything_else_is_attacked_anew(what, judged, digits, tmp_path, monkeypatch):
    measured(reprogrammed(0.5), digits, tmp_path)
    judged.clear()
    if DIFFERENT[what] is None:
        monkeypatch.setattr(controls, "code_sha256", lambda: "another")
        measured(reprogrammed(0.5), digits, tmp_path)
    else:
        model, digits, more = DIFFERENT[what](reprogrammed(0.5), digits)
        measured(model, digits, tmp_path, **more)
    assert judged == [0.5, None, 0.5, None]


def test_the_hash_of_the_code_is_that_of_its_files(tmp_path, monkeypatch):
    sums = set()
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "module.py").write_text(text)
        monkeypatch.setattr(controls, "PACKAGE", tmp_path)
        controls.code_sha256.cache_clear()
        sums.add(controls.code_sha256())
    monkeypatch.undo()
    controls.code_sha256.cache_clear()
    assert len(sums | {controls.code_sha256()}) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"clean": 3}', "null"])
def test_a_damaged_file_is_written_anew(content, judged, digits, tmp_path):
    first = measured(reprogrammed(0.5), digits, tmp_path)
    whole = {path: path.read_text() for path in tmp_path.iterdir()}
    assert len(whole) == 2
    damaged = sorted(whole)[0]
    damaged.write_text(content)
    judged.clear()
    again = measured(reprogrammed(0.5), digits, tmp_path)
    assert judged.count(None) == 1
    assert again.control.correct == first.control.correct
    left, right = (json.loads(text) for text in (damaged.read_text(), whole[damaged]))
    assert (left["clean"], left["classes"]) == (right["clean"], right["classes"])


@pytest.mark.cached
def test_a_cache_that_cannot_be_written_stops_nobody(judged, tmp_path, monkeypatch, digits):
    (tmp_path / "cache").write_text("a file, and no folder")
    monkeypatch.setattr("timm_nrpm.nn.kernels.compiling.cache_folder", lambda: tmp_path / "cache")
    call = ["evaluate", "--suite", "quick", "--steps", "1", "--first", "4", "--calibrate", "20", "--output"]
    assert main([*call, str(tmp_path / "out")]) == 0
    assert judged.count(None) == 1
    judged.clear()
    with pytest.raises(OSError):  # who names a folder is told before anything is attacked
        measured(reprogrammed(0.5), digits, tmp_path / "cache" / "controls")
    assert judged == []


@pytest.mark.cached
def test_a_user_gets_it_without_asking(judged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_nrpm.nn.kernels.compiling.cache_folder", lambda: tmp_path / "cache")
    call = ["evaluate", "--suite", "quick", "--steps", "1", "--first", "5", "--calibrate", "20", "--output"]
    for lam in ("0.8", "0.6"):
        assert main([*call, str(tmp_path / lam), "--lam", lam]) == 0
    assert judged.count(None) == 1
    assert len(list((tmp_path / "cache" / "controls").iterdir())) == 1
