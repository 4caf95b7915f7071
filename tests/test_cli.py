import dataclasses
import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import timm_nrpm
from timm_nrpm import cli, demo, options
from timm_nrpm.cli import main
from timm_nrpm.data import digits, pixel_loader
from timm_nrpm.given import completed

ROOT = Path(__file__).resolve().parents[1]


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
        (["--eps", "2"], "--eps 2.0 is not allowed"),
        (["--data", "nope"], "nope"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere"),
        (["resnet8_digit"], "Near names: resnet8_digits"),
        (["resnet8_digit"], "timm-nrpm models lists all."),
        (["--weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--num-classes", "5"], "'digits' has 10 classes, and the model has 5"),
        (["--resume", "--lam", "3"], "--lam 3.0 is not allowed"),
        (["--estimator-eps", "0"], "--estimator-eps 0.0 is not allowed"),
        (["--validation-split", "val"], "--validation-split val: the digits have 'train' and 'test'"),
        (["--samples", "65", "--batch-size", "32", "--paradigm", "all"], "give --drop-last or another --batch-size"),
    ],
)
def test_tune_refuses_in_one_line(capsys, tmp_path, arguments, message):
    assert main([*TUNE, *arguments, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: ")
    assert message in error


QUICK = ["evaluate", "--samples", "24", "--steps", "2"]
EVALUATE = [*QUICK, "--queries", "3", "--calibrate", "64"]


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
    assert files == {"attacks.png", "curves.png", "attacked.png", "report.html", "settings.json"} | {
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
    error = capsys.readouterr().err
    assert "seed: 0 then, 1 now" in error
    assert "or another folder as --output" in error


def test_evaluate_takes_variants_plain_models_and_other_norms(capsys, tmp_path):
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.7)
    folder = str(timm_nrpm.save_pretrained(model, tmp_path / "variant"))
    calls = {
        "variant": [*QUICK, "--queries", "3", folder, "--norm", "L0", "--eps", "3"],
        "plain": [*QUICK, "--lam", "none", "--suite", "quick"],
        "L1": [*EVALUATE, "--norm", "L1", "--eps", "2", "--no-control"],
    }
    titles = {"variant": f"{folder}, lambda 0.7", "plain": "resnet8_digits, plain", "L1": "resnet8_digits, lambda 0.8"}
    for name, call in calls.items():
        assert main([*call, "--output", str(tmp_path / name)]) == 0
        assert f"<h1>{titles[name]}</h1>" in (tmp_path / name / "report.html").read_text()
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
        (["--eps", "2"], "--eps 2.0 is not allowed"),
        (["--estimator-eps", "0"], "--estimator-eps 0.0 is not allowed"),
        (["--norm", "L0", "--eps", "0.5"], "a whole number of pixels"),
        (["--norm", "L1", "--eps", "2", "--suite", "paper"], "no attacks under L1"),
        (["--steps", "0"], "--steps 0 and --queries 3 are not allowed"),
        (["--training-split", "val"], "--training-split val: the digits have 'train' and 'test'"),
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


def test_an_output_that_is_no_folder_is_told_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["evaluate", "nosuch", "--output", str(tmp_path / "file")]) == 1
    assert f"--output {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err


def test_the_first_layers_can_be_chosen():
    parser, commands = cli._parsers()
    args = completed(parser.parse_args(["tune", "--layers", "first:2"]), commands["tune"])
    assert list(timm_nrpm.lambdas(options.model_of(args))) == ["conv1", "layer1.0.conv1"]


def test_evaluate_takes_the_first_images_of_a_split(tmp_path):
    assert main([*QUICK[:1], "--first", "7", "--steps", "1", "--suite", "quick", "--output", str(tmp_path)]) == 0
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "quick-Linf-0.0313725.json").read_text())
    pixels, labels = digits("test")
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.8)
    timm_nrpm.calibrate_(model, pixel_loader(samples=1000, batch_size=100))
    loader = [(pixels[:7], labels[:7])]
    expected = timm_nrpm.evaluate(model.eval(), loader, timm_nrpm.Threat(), "quick", steps=1)
    assert report.accuracy() == expected.accuracy()
    assert [attack.survived for attack in report.attacks] == [attack.survived for attack in expected.attacks]
    assert report.data == "digits, test, the first 7"


def test_tune_validates_on_the_first_images(tmp_path, capsys):
    more = ["--epochs", "1", "--steps", "1", "--calibrate", "0", "--samples", "64", "--output", str(tmp_path)]
    assert main(["tune", "--validation-first", "361", *more]) == 1
    error = capsys.readouterr().err
    assert "--validation-first 361, and --validation-split test of 'digits' holds 360 images" in error
    assert main(["tune", "--validation-first", "10", *more]) == 0
    history = timm_nrpm.History.from_json((tmp_path / "history.json").read_text())
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    pixels, labels = digits("test")
    with torch.no_grad():
        right = (model((pixels[:10] - 0.5) / 0.5).argmax(1) == labels[:10]).float().mean()
    assert history.evaluations[0].clean == pytest.approx(float(right))


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--samples", "5", "--first", "5"],
        ["tune", "--validation-samples", "5", "--validation-first", "5"],
        ["tune", "--lam", "none"],
    ],
)
def test_options_that_exclude_each_other_are_a_wrong_call(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


USELESS = [  # the call, the flags that the message names, and some of the reason
    ("evaluate VARIANT --lam 0.9 --iterations 1 --layers nosuch --num-classes 77",
     "--num-classes, --lam, --iterations and --layers have no effect: VARIANT is a variant", "name its base"),
    ("evaluate VARIANT --weights w.pth --no-pretrained --estimator-eps 1e-2", "--weights, --no-pretrained and", ""),
    ("evaluate VARIANT --lam none", "--lam has no effect: VARIANT is a variant", ""),
    ("evaluate VARIANT --calibrate 100", "--calibrate has no effect", "brings its own statistics"),
    ("evaluate VARIANT --calibrate 0 --training-split val", "--calibrate and --training-split have no effect", ""),
    ("evaluate me/somebodys --lam 0.5", "--lam has no effect: me/somebodys is a variant", ""),
    ("tune VARIANT --lam 0.5", "--lam has no effect: VARIANT is a variant", ""),
    ("evaluate --weights w.pth --no-pretrained", "--no-pretrained has no effect", "those of --weights"),
    ("evaluate --lam none --iterations 2 --layers fc", "--iterations and --layers have no effect", "model is plain"),
    ("evaluate --lam none --calibrate 10 --no-control", "--calibrate and --no-control have no effect", ""),
    ("evaluate --calibrate 0 --training-split val", "--training-split has no effect", "--calibrate 0 takes no images"),
    ("evaluate --suite quick --queries 10", "--queries has no effect", "no random search"),
    ("evaluate --root photos", "--root has no effect", "Give --data folder, tar or torch/NAME with it"),
    ("evaluate --data folder --root FOLDER --download", "--download has no effect", "torch/NAME"),
    ("evaluate --data folder --root FOLDER --split test", "--split has no effect: FOLDER is one set", "is read whole"),
    ("tune --data folder --root FOLDER --validation-split a", "--validation-split has no effect", "the splits"),
    ("tune --hflip 0.5", "--hflip has no effect", "with --augment alone"),
    ("tune --lr 0.1 --weight-decay 0", "--lr and --weight-decay have no effect", "Give --paradigm all"),
    ("tune --objective fgsm --steps 3", "--steps has no effect", "the objective fgsm"),
    ("tune --eps 0 --steps 3 --gradient bpda", "--steps has no effect", "with eps 0"),
    ("tune --objective clean --step-size 0.1 --gradient plain", "--step-size and --gradient have no effect", ""),
    ("tune --objective clean --eps 0.1 --evaluate-eps 0.2", "--eps has no effect", "--evaluate-eps"),
    ("tune --beta 2", "--beta has no effect: the objective pgd has no second term", "trades, mart and sat"),
    ("tune --objective trades --weight-perturbation 0.1", "--weight-perturbation has no effect", "--objective awp"),
    ("tune --target-momentum 0.5 --target-start 2", "--target-momentum and --target-start have no effect", "sat"),
    ("tune --schedule constant --warmup-epochs 1", "--warmup-epochs has no effect", "the schedule is constant"),
    ("tune --license mit", "--license has no effect", "Give --push-to with it"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "flags", "reason"), USELESS, ids=[call for call, *_ in USELESS])
def test_an_option_without_effect_is_refused(tmp_path, monkeypatch, capsys, call, flags, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VARIANT").mkdir()
    (tmp_path / "VARIANT" / "nrpm_config.json").write_text("{}")
    (tmp_path / "FOLDER" / "a").mkdir(parents=True)
    assert main(call.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("timm-nrpm: ")
    assert flags in error
    assert reason in error


def test_arguments_that_are_left_out_have_their_defaults():
    parser, commands = cli._parsers()
    assert parser.parse_args(["pull", "me/x"]).folder is None
    for call, expected in ((["tune"], "resnet8_digits"), (["evaluate", "lenet"], "lenet")):
        args = completed(parser.parse_args(call), commands[call[0]])
        assert args.model == expected
        assert args.data == "digits"


def test_what_is_default_was_not_given(tmp_path, capsys):
    """The defaults of the options above are no reason to refuse."""
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.7)
    folder = str(timm_nrpm.save_pretrained(model, tmp_path / "variant"))
    more = ["--suite", "quick", "--first", "3", "--steps", "1", "--output"]
    assert main(["evaluate", folder, *more, str(tmp_path / "a")]) == 0
    assert main(["evaluate", "--lam", "none", *more, str(tmp_path / "b")]) == 0


def test_every_call_in_the_documents_has_only_options_with_an_effect(monkeypatch, tmp_path):
    lines = [path.read_text().replace("\\\n", " ") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    calls = re.findall(r"(?:timm-nrpm|timm_nrpm\.cli) ((?:evaluate|tune) [^#\n`]*)", "\n".join(lines))
    calls = [call for call in calls if call.split()[1][0] == "-" or " --" in call]
    assert len(calls) >= 8
    monkeypatch.chdir(tmp_path)
    parser, commands = cli._parsers()
    for call in calls:
        if "..." not in call:
            args = parser.parse_args(call.split())
            completed(args, commands[args.command])


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 80 * i).save(root / name / f"{i}.png")
    return root


def test_folders_without_splits_are_told_about(tmp_path, capsys, monkeypatch):
    root = folders(tmp_path / "mine", *map(str, range(10)))
    more = ["--data", "folder", "--root", str(root), "--output"]
    call = ["evaluate", "--suite", "quick", "--steps", "1", *more, str(tmp_path / "out")]
    assert main(call) == 0
    error = capsys.readouterr().err
    assert f"timm-nrpm: {root} is not divided into splits, so the model is calibrated on images that are eval" in error
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "out" / "quick-Linf-0.0313725.json").read_text())
    assert report.data == "mine"
    assert report.samples == 30
    assert main(["tune", "--epochs", "1", "--steps", "1", *more, str(tmp_path / "run")]) == 0
    assert "so the validation images are among those tuned on" in capsys.readouterr().err


def test_another_number_of_classes_needs_a_class_map(tmp_path, capsys):
    root = folders(tmp_path / "mine", "train/one", "train/two", "test/two")
    (tmp_path / "map.txt").write_text("zero\none\ntwo\n")
    call = ["evaluate", "--suite", "quick", "--steps", "1", "--data", "folder", "--root", str(root)]
    call += ["--output", str(tmp_path / "out")]
    assert main(call) == 1
    error = capsys.readouterr().err
    assert f"'folder' in --root {root} has 2 classes (one, two), and the model has 10" in error
    assert "give a model with --num-classes 2, as --root the folder" in error
    assert "or as --class-map the model's class of each name" in error
    assert main([*call, "--class-map", str(tmp_path / "map.txt")]) == 0
    report = timm_nrpm.RobustnessReport.from_json((tmp_path / "out" / "quick-Linf-0.0313725.json").read_text())
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.8).eval()
    train = pixel_loader("folder", root, input_size=(1, 8, 8))
    timm_nrpm.calibrate_(model, train)
    pixels, _ = next(iter(pixel_loader("folder", root, split="test", input_size=(1, 8, 8))))
    with torch.no_grad():
        right = (model((pixels - 0.5) / 0.5).argmax(1) == 2).float().mean()
    assert report.accuracy() == pytest.approx(float(right))
    assert report.data == "mine, test"


def test_another_lambda_needs_another_folder(tmp_path, capsys):
    call = ["evaluate", "--suite", "quick", "--first", "3", "--steps", "1", "--output", str(tmp_path)]
    assert main([*call, "--lam", "0.4"]) == 0
    assert main([*call, "--lam", "0.4", "--eps", "0.1"]) == 0  # another bound is welcome
    for more in ([], ["--eps", "0.2"]):  # also where it would have a file of its own
        assert main([*call, "--lam", "0.9", *more]) == 1
        error = capsys.readouterr().err
        assert (
            f"{tmp_path} holds an evaluation of something else (--lam 0.4 then, 0.9 now): give another folder" in error
        )
        assert "as --output" in error
        assert "sha256" not in error
    page = (tmp_path / "report.html").read_text()
    assert "<h1>resnet8_digits, lambda 0.4</h1>" in page


def test_other_weights_need_another_folder_too(tmp_path, capsys):
    """The options may be the same, as where a variant was tuned further."""
    call = ["evaluate", str(tmp_path / "v"), "--suite", "quick", "--first", "3", "--steps", "1"]
    call += ["--output", str(tmp_path / "out")]
    for lam, status in ((0.7, 0), (0.7, 0), (0.6, 1)):
        model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=lam)
        timm_nrpm.save_pretrained(model, tmp_path / "v")
        assert main(call) == status
    assert (
        "something else (the weights or statistics differ): give another folder as --output" in capsys.readouterr().err
    )


def test_what_failed_before_the_first_batch_claims_no_folder(tmp_path):
    call = ["evaluate", "--first", "3", "--output", str(tmp_path)]
    assert main([*call, "--steps", "0"]) == 1
    assert main([*call, "--suite", "quick", "--steps", "1", "--lam", "0.9"]) == 0


def started(tmp_path, *arguments):
    """A command as a process of its own, once the file in its folder is there that shows that it is at work."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "timm_nrpm.cli", *arguments, "--output", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, folder


def wait_for(process, ready):
    end = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


LONG = ["evaluate", "--suite", "quick", "--first", "120", "--batch-size", "2", "--steps", "1", "--no-control"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_evaluation_says_how_to_go_on(tmp_path, number, status):
    process, folder = started(tmp_path, *LONG)
    journal = folder / "quick-Linf-0.0313725.jsonl"
    wait_for(process, lambda: journal.exists() and journal.read_bytes().count(b"\n") > 1)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error == f"timm-nrpm: stopped. What is done is in {folder}, and the same command goes on from it.\n"
    assert "Traceback" not in out
    before = journal.read_bytes()
    assert before.count(b"\n") < 61
    if number == signal.SIGINT:
        assert main([*LONG, "--output", str(folder)]) == 0
        assert journal.read_bytes().startswith(before)
        assert journal.read_bytes().count(b"\n") == 61


def test_a_stopped_run_of_tune_says_how_to_go_on(tmp_path):
    more = ["tune", "--epochs", "50", "--steps", "1", "--calibrate", "0", "--validation-first", "5"]
    process, folder = started(tmp_path, *more, "--checkpoint-every", "1")
    wait_for(process, lambda: any((folder / "checkpoints").glob("*")))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    said = f"The last checkpoint is in {folder}, and the same command with --resume goes on from it."
    assert error == f"timm-nrpm: stopped. {said}\n"


@pytest.mark.parametrize("command", ["demo", "models", "push", "pull", "inspect", "list"])
def test_every_command_stops_in_one_line(monkeypatch, capsys, command):
    def interrupted(_):
        signal.raise_signal(signal.SIGINT)

    parsers = cli._parsers()
    parsers[1][command].set_defaults(run=interrupted)
    monkeypatch.setattr(cli, "_parsers", lambda: parsers)
    needed = {"push": ["v", "me/x"], "pull": ["me/x"], "inspect": ["me/x"], "list": ["me"]}
    assert main([command, *needed.get(command, [])]) == 130
    assert capsys.readouterr().err == "timm-nrpm: stopped. Start the same command again.\n"


def test_the_handler_of_sigterm_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["models", "resnet18"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_pipe_that_nobody_reads_is_no_failure():
    command = [sys.executable, "-m", "timm_nrpm.cli", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_a_failure_in_a_process_that_reads_is_one_line(tmp_path, capsys):
    root = folders(tmp_path / "mine", *(f"train/{i}" for i in range(10)))
    Image.fromarray(np.full((8, 8), -1, np.int32)).save(root / "train" / "3" / "deep.tif")
    (root / "train" / "3" / "deep.tif").rename(root / "train" / "3" / "deep.png")
    call = ["evaluate", "--data", "folder", "--root", str(root), "--split", "train", "--calibrate", "0"]
    assert main([*call, "--workers", "1", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: An image of mode 'I' has values from -1 to -1")
    assert error.count("\n") == 1


def test_warnings_speak_the_words_of_the_command(tmp_path, capsys):
    root = folders(tmp_path / "mine", "0", "1", "2")
    call = ["evaluate", "--suite", "quick", "--steps", "1", "--data", "folder", "--root", str(root)]
    assert main([*call, "--output", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "timm-nrpm: warning: 'folder' in --root" in error
    assert "give a model with --num-classes 3, or --class-map." in error
    assert "UserWarning" not in error
