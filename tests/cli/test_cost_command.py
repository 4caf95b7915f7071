"""`timm-nrpm cost`: the report as text and as JSON, and what it refuses."""

import json

import pytest
import torch

import timm_nrpm
from timm_nrpm.cli.program import main
from timm_nrpm.evaluation import cost as room
from timm_nrpm.evaluation.cost_report import CostReport


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "SECONDS", 0.05)


def test_the_cost_of_the_first_layers_as_json(capsys):
    call = ["cost", "--lam", "0.8", "--layers", "first:4", "--iterations", "1", "--batch-size", "3", "--json"]
    assert main(call) == 0
    said = json.loads(capsys.readouterr().out)
    report = CostReport.from_json(json.dumps(said["report"]))
    model = timm_nrpm.create_model("resnet8_digits", lam=0.8, layers="first:4")
    assert [layer.name for layer in report.layers if layer.estimated] == list(timm_nrpm.lambdas(model))
    assert (report.model, report.image, report.batch) == ("resnet8_digits", (1, 8, 8), 3)
    assert report.machine.iterations == 1
    assert report.machine.threads == torch.get_num_threads()
    assert said["seconds"] == report.seconds
    assert said["slowdown"] == report.slowdown > 1
    assert report.measured is None


def test_the_cost_of_a_variant_and_of_another_size_as_text(capsys):
    timm_nrpm.save_pretrained(timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5), "variant")
    assert main(["cost", "--variant", "variant", "--measured"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("resnet8_digits, 1 image of 1x8x8: about ")
    for word in ("times plain", "layer1.0.conv1", "all else", "total", "Measured: ", "Assumed of "):
        assert word in out
    assert main(["cost", "--model", "resnet18", "--image-size", "64", "32", "--lam", "none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("resnet18, 1 image of 3x64x32: about ")
    assert ", 1.0 times the plain model's " in out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("--weights FILE", "--weights has no effect: a model costs the same whatever its weights are"),
        ("--no-pretrained", "--no-pretrained has no effect"),
        ("--batch-size 0", "--batch-size 0 is not allowed: give an integer >= 1 images"),
        ("--model lenet_mnist --image-size 12", "give the size that it takes as --image-size"),
        ("--lam none --iterations 3", "--iterations has no effect"),
    ],
)
def test_what_is_refused(capsys, call, message):
    assert main(["cost", *call.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
