"""`timm-nrpm subnetwork`: what it gives, and how it refuses."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_nrpm.cli.program import main

CALL = ["subnetwork", "--late", "1", "--eps", "0.1", "--steps", "1", "--trials", "1", "--late-epochs", "1"]
CALL += ["--samples", "40", "--attacks", "quick", "--json"]


def test_a_robust_network_that_is_given_leaves_the_natural_one_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    star = timm.create_model("resnet8_digits", pretrained=True)
    with torch.no_grad():
        for parameter in star.parameters():
            parameter.zero_()
    save_file(star.state_dict(), "star.safetensors")
    assert main([*CALL, "--robust-weights", "star.safetensors", "--output", "run"]) == 0
    found = json.loads(capsys.readouterr().out)["subnetwork"]
    shares = {name: digits.count("1") / len(digits) for name, digits in found["right"]["clean"].items()}
    assert shares["natural"] > 0.9
    assert shares["robust"] < 0.4
    assert json.loads((tmp_path / "run" / "subnetwork.json").read_text()) == found
    assert (tmp_path / "run" / "subnetwork.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--late", "9"], "--late 9 is not allowed"),
        (["--late-epochs", "0"], "--late-epochs 0"),
        (["--epochs", "0"], "--epochs 0"),
        (["--tolerance", "200"], "--tolerance 200.0 is not allowed: give a number from 0 to 100 of points"),
        (["--train", "0"], "--train 0"),
        (["--train", "300"], "Give more training images as --train"),
        (["--robust-weights", "star.pth", "--epochs", "3"], "--epochs"),
        (["--robust-weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_cannot_be_is_said_in_flags(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main([*CALL, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "late=" not in said
    assert "epochs=" not in said
