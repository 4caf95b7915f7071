"""`timm-nrpm export`: files with their facts, and what it refuses in the words of the command line."""

import json

import pytest
import torch

import timm_nrpm
from timm_nrpm import Threat
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits
from timm_nrpm.hub.templates import write_evaluation
from timm_nrpm.nn.pixel_model import PixelModel


def test_a_variant_with_its_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    folder = timm_nrpm.save_pretrained(model, "variant")
    images, labels = (part[:20] for part in digits("test"))
    report = timm_nrpm.evaluate(model, [(images, labels)], Threat("Linf", 0.1), "quick")
    write_evaluation([report], folder)
    assert main(["export", "--variant", "variant", "--output", "m.pt2", "--pixels", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["format"]) == ("m.pt2", "pt2")
    assert said["facts"]["verdicts"] == [str(report)]
    with torch.no_grad():
        got, want = torch.export.load("m.pt2").module()(images), PixelModel(model).eval()(images)
    assert torch.allclose(got, want, atol=1e-4)


def test_the_text_and_one_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--lam", "0.9", "--layers", "first:1", "--output", "m.ts", "--fixed-batch"]) == 0
    assert "m.ts: torchscript, " in capsys.readouterr().out
    assert torch.jit.load("m.ts")(torch.rand(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["--output", "m.bin"], "The ending of m.bin names no format: give --format"),
        (["--output", "m.pt2", "--format", "onnx"], "whose files end in .onnx"),
    ],
)
def test_what_it_refuses(call, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *call]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
