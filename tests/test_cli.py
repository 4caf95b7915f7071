import dataclasses
import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

import timm_nrpm
from timm_nrpm import demo
from timm_nrpm.cli import main


def test_the_demo_on_fewer_images(tmp_path):
    out = io.StringIO()
    assert demo.run(tmp_path, Console(file=out, width=80), lams=(1.0, 0.6), images=40)
    text = out.getvalue()
    assert "it gives the same logits" in text.replace("\n", " ")
    assert text.count("yes") == text.count("no ") == 2
    assert "…" not in text  # fits a terminal
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert set(timm_nrpm.lambdas(timm_nrpm.from_pretrained(tmp_path / "variant")).values()) == {0.6}


def test_list(capsys):
    assert main(["models", "resnet1?"]) == 0
    assert "resnet18" in capsys.readouterr().out.split()


def test_an_empty_list_is_told(capsys):
    assert main(["models", "*nope*"]) == 1
    assert "no architecture matches '*nope*'" in capsys.readouterr().err


def test_a_failure_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.startswith("timm-nrpm: ")


@pytest.mark.parametrize("arguments", [[], ["nope"]])
def test_a_wrong_call(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "timm_nrpm.cli", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout


TUNE = ["tune", "--samples", "64", "--validation-samples", "20", "--epochs", "1", "--steps", "1", "--calibrate", "64"]


def test_tune_says_what_it_learned_and_where_it_is(capsys, tmp_path):
    folder = tmp_path / "run"
    assert main([*TUNE, "--eps", "0.1", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "layer3.0.conv2" in out
    assert "validation, Linf 0.1" in out
    history = timm_nrpm.History.from_json((folder / "history.json").read_text())
    assert [row.step for row in history.evaluations] == [0, 1]
    learned = timm_nrpm.lambdas(timm_nrpm.from_pretrained(folder / "variant"))
    assert tuple(learned.values()) == history.steps[-1].lams
    assert main([*TUNE, "--eps", "0.1", "--output", str(folder)]) == 1
    assert "holds a run" in capsys.readouterr().err
    assert main([*TUNE, "--eps", "0.1", "--output", str(folder), "--resume"]) == 0


def test_tune_takes_every_setting(tmp_path):
    more = "--paradigm all --trainable *.lam fc.* --objective trades --beta 2 --step-size 1/255 --gradient mixture"
    more += " --clip none --lam 0.9 --iterations 1 --estimator-eps 1e-2 --layers layer1.* fc --batch-size 16"
    assert main([*TUNE, *more.split(), "--eps", "8/255", "--output", str(tmp_path)]) == 0
    history = timm_nrpm.History.from_json((tmp_path / "history.json").read_text())
    c = history.config
    assert (c.trainable, c.objective, c.beta, c.gradient, c.clip) == (("*.lam", "fc.*"), "trades", 2.0, "mixture", None)
    assert (c.eps, c.attack_step_size) == (8 / 255, 1 / 255)
    assert history.layers == ("layer1.0.conv1", "layer1.0.conv2", "fc")
    assert len(history.steps) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "2"], "eps=2.0 is not allowed"),
        (["--data", "nope"], "nope"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere"),
        (["resnet8_digit"], "Near names: resnet8_digits"),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--num-classes", "5"], "5 classes"),
        (["--resume", "--lam", "3"], "lam=3.0 is not allowed"),
    ],
)
def test_tune_refuses_in_one_line(capsys, tmp_path, arguments, message):
    assert main([*TUNE, *arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: ")
    assert message in error


EVALUATE = ["evaluate", "--samples", "24", "--steps", "2", "--queries", "3", "--calibrate", "64"]


def test_evaluate_prints_draws_and_goes_on(capsys, tmp_path):
    """Two bounds, then the same command again, which has nothing left to do."""
    call = [*EVALUATE, "--eps", "0.05", "38/255", "--lam", "0.5", "--output", str(tmp_path)]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert out.count("24 images, Linf") == 2
    assert "the plain model" in out
    assert out.rstrip().endswith(f"Written: {tmp_path / 'report.html'}")
    files = {path.name for path in tmp_path.iterdir()}
    stems = ("adaptive-Linf-0.05", "adaptive-Linf-0.14902")
    assert files == {"attacks.png", "curves.png", "attacked.png", "report.html"} | {
        stem + end for stem in stems for end in (".json", ".jsonl")
    }
    reports = [timm_nrpm.RobustnessReport.from_json((tmp_path / f"{stem}.json").read_text()) for stem in stems]
    assert [report.threat.eps for report in reports] == [0.05, 38 / 255]
    assert reports[0].worst_case >= reports[1].worst_case
    assert reports[0].control is not None
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "data:image/svg" in page or "<svg" in page  # the curve
    journal = (tmp_path / "adaptive-Linf-0.05.jsonl").read_bytes()
    assert main(call) == 0
    assert (tmp_path / "adaptive-Linf-0.05.jsonl").read_bytes() == journal
    again = [timm_nrpm.RobustnessReport.from_json((tmp_path / f"{stem}.json").read_text()) for stem in stems]
    assert again == reports
    assert main([*call, "--seed", "1"]) == 1
    assert "seed: 0 then, 1 now" in capsys.readouterr().err


def test_evaluate_takes_variants_plain_models_and_other_norms(capsys, tmp_path):
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.7)
    folder = str(timm_nrpm.save_pretrained(model, tmp_path / "variant"))
    calls = {
        "variant": [folder, "--norm", "L0", "--eps", "3"],
        "plain": ["--lam", "none", "--suite", "quick"],
        "L1": ["--norm", "L1", "--eps", "2", "--no-control"],
    }
    for name, more in calls.items():
        assert main([*EVALUATE, *more, "--output", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "24 images, L0 3, adaptive" in out
    assert "24 images, L1 2, adaptive" in out
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "variant" / "adaptive-L0-3.json").read_text())
    assert report.sha256 == timm_nrpm.reprogramming.model_sha256(timm_nrpm.from_pretrained(folder))
    plain = timm_nrpm.RobustnessReport.from_json((tmp_path / "plain" / "quick-Linf-0.0313725.json").read_text())
    assert plain.control is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "2"], "eps=2.0 is not allowed"),
        (["--norm", "L0", "--eps", "0.5"], "a whole number of pixels"),
        (["--norm", "L1", "--eps", "2", "--suite", "paper"], "no attacks under L1"),
        (["--steps", "0"], "steps=0"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere"),
    ],
)
def test_evaluate_refuses_in_one_line(capsys, tmp_path, arguments, message):
    assert main([*EVALUATE, *arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: ")
    assert message in error


@pytest.mark.parametrize(
    ("option", "value"), [("--objective", "best"), ("--eps", "x"), ("--eps", "1/0"), ("--epochs", "1.5")]
)
def test_a_wrong_value_is_a_wrong_call(option, value):
    with pytest.raises(SystemExit) as error:
        main(["tune", option, value])
    assert error.value.code == 2


def test_the_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.partition("tuning:")[2].split())
    for field in dataclasses.fields(timm_nrpm.TuneConfig):
        help = re.search(rf"--{field.name.replace('_', '-')} (.*?)( --|$)", text)
        assert help is not None
        assert len(help[1].split()) > 4
