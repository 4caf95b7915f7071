"""`timm-nrpm tune`, against the library's own results."""

import dataclasses

import pytest
import torch

import timm_nrpm
from timm_nrpm.cli import inputs
from timm_nrpm.cli import program as cli
from timm_nrpm.cli.given import completed
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits

TUNE = ["tune", "--samples", "64", "--validation-samples", "20", "--epochs", "1", "--steps", "1", "--calibrate", "64"]


def test_tune_says_what_it_learned_and_where_it_is(capsys, tmp_path):
    folder = tmp_path / "run"
    assert main([*TUNE, "--eps", "0.1", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "layer3.0.conv2" in out
    assert "validation, Linf 0.1" in out
    history = timm_nrpm.evaluation.history.History.from_json((folder / "history.json").read_text())
    assert [row.step for row in history.evaluations] == [0, 1]
    learned = timm_nrpm.lambdas(timm_nrpm.from_pretrained(folder / "variant"))
    assert tuple(learned.values()) == history.steps[-1].lams
    assert main([*TUNE, "--eps", "0.1", "--output", str(folder)]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main([*TUNE, "--eps", "0.1", "--output", str(folder), "--resume"]) == 0


def test_tune_takes_every_setting(tmp_path):
    more = "--paradigm all --trainable *.lam fc.* --objective trades --beta 2 --norm L2 --step-size 1/255"
    more += " --gradient mixture"
    more += " --clip none --lam 0.9 --iterations 1 --estimator-eps 1e-2 --layers layer1.* fc --batch-size 16"
    assert main([*TUNE, *more.split(), "--eps", "8/255", "--output", str(tmp_path)]) == 0
    history = timm_nrpm.evaluation.history.History.from_json((tmp_path / "history.json").read_text())
    c = history.config
    assert (c.trainable, c.objective, c.beta, c.gradient, c.clip) == (("*.lam", "fc.*"), "trades", 2.0, "mixture", None)
    assert (c.norm, c.eps, c.attack_step_size) == ("L2", 8 / 255, 1 / 255)
    assert history.layers == ("layer1.0.conv1", "layer1.0.conv2", "fc")
    assert len(history.steps) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "2"], "--eps 2.0 is not allowed"),
        (["--norm", "L1"], "--eps is missing: under L1 it is the sum of the changes"),
        (["--data", "nope"], "nope"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere"),
        (["--model", "resnet8_digit"], "Near names: resnet8_digits"),
        (["--model", "resnet8_digit"], "timm-nrpm models lists all."),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--num-classes", "5"], "'digits' has 10 classes, and the model has 5"),
        (["--resume", "--lam", "3"], "--lam 3.0 is not allowed"),
        (["--estimator-eps", "0"], "--estimator-eps 0.0 is not allowed"),
        (["--validation-split", "val"], "--validation-split val: the digits have 'train' and 'test'"),
        (["--samples", "65", "--batch-size", "32", "--paradigm", "all"], "give --drop-last or another --batch-size"),
    ],
)
def test_tune_refuses_in_one_line(capsys, tmp_path, arguments, message):
    assert main([*TUNE, *arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: ")
    assert message in error


def test_without_an_attack_validation_still_needs_its_bound(capsys, tmp_path):
    arguments = ["tune", "--samples", "64", "--norm", "L2", "--eps", "0", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "--evaluate-eps is missing: under L2 it is the length" in capsys.readouterr().err


CHANGED = {"output", "calibrate"}
"""Settings whose default on the command line is another one than the library's: a run is kept, and calibrated."""


def test_every_setting_is_an_option_with_its_default():
    actions = {action.dest: action for action in cli._parsers()[1]["tune"]._actions}
    defaults = cli._parsers()[1]["tune"].get_default("defaults")
    for field in dataclasses.fields(timm_nrpm.TuneConfig):
        assert field.name in actions
        assert field.name in CHANGED or defaults[field.name] == field.default


def test_the_first_layers_can_be_chosen():
    parser, commands = cli._parsers()
    args = completed(parser.parse_args(["tune", "--layers", "first:2"]), commands["tune"])
    assert list(timm_nrpm.lambdas(inputs.model_of(args))) == ["conv1", "layer1.0.conv1"]


def test_tune_validates_on_the_first_images(tmp_path, capsys):
    more = ["--epochs", "1", "--steps", "1", "--calibrate", "0", "--samples", "64", "--output", str(tmp_path)]
    assert main(["tune", "--validation-first", "361", *more]) == 2
    error = capsys.readouterr().err
    assert "--validation-first 361, and --validation-split test of 'digits' holds 360 images" in error
    assert main(["tune", "--validation-first", "10", *more]) == 0
    history = timm_nrpm.evaluation.history.History.from_json((tmp_path / "history.json").read_text())
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    pixels, labels = digits("test")
    with torch.no_grad():
        right = (model((pixels[:10] - 0.5) / 0.5).argmax(1) == labels[:10]).float().mean()
    assert history.evaluations[0].clean == pytest.approx(float(right))
