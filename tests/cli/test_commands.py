"""One vocabulary for all commands: their help, their examples, their JSON, and how they fail."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch

import timm_nrpm
from timm_nrpm.cli import program as cli
from timm_nrpm.cli.options import Command
from timm_nrpm.cli.plot import result_in
from timm_nrpm.cli.program import main

ORDER = ["advise", "models", "cost", "create", "calibrate", "adapt", "search", "tune", "subnetwork", "evaluate"]
ORDER += ["certify", "corrupt", "export", "plot", "push", "pull", "inspect", "list", "demo"]


def shown(capsys, *arguments):
    """What a command that ends well prints, as JSON."""
    assert main([*arguments, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def help_of(command):
    parser = cli._parsers()[1][command]
    return parser.format_help()


def test_the_commands_and_their_order():
    assert list(cli._parsers()[1]) == ORDER


def process(*arguments, **more):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["--version"], ["tune", "--nosuch"]])
def test_what_needs_no_model_imports_no_torch(arguments):
    done = process("-X", "importtime", "-m", "timm_nrpm.cli", *arguments)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "timm_nrpm.cli.program" in loaded
    assert not {"torch", "timm", "accelerate", "matplotlib", "numpy"} & loaded


@pytest.mark.slow
def test_a_users_program_registers_the_models_all_the_same():
    code = "import timm, timm_nrpm; print(timm.is_model('nrpm_resnet18'), timm.is_model('resnet8_digits'))"
    assert process("-c", code).stdout == "True True\n"


@pytest.mark.parametrize("command", ORDER)
def test_the_help_states_the_defaults_as_one_types_them(command):
    parser = cli._parsers()[1][command]
    defaults = parser.get_default("defaults")
    for action in parser._actions:
        stated = re.search(r"\(default: (.*)\)$", action.help or "")
        default = defaults.get(action.dest)
        if action.option_strings and isinstance(default, (int, float)) and not isinstance(default, bool):
            assert stated is not None, action.dest
            text = stated[1].removesuffix(" at most")
            assert cli.options.number(text) == pytest.approx(default), action.dest
        assert not re.search(r"\d\.\d{6}", action.help or "")  # no 0.03137254901960784


def test_a_flag_means_the_same_everywhere():
    """It takes the same kind of value, whatever the command."""
    seen = {}
    for command, parser in cli._parsers()[1].items():
        for action in parser._actions:
            for flag in action.option_strings:
                meaning = (type(action), getattr(action.type, "__name__", None), action.nargs, action.metavar)
                seen.setdefault(flag, {}).setdefault(meaning, []).append(command)
    allowed = {
        "--lam": "none is a plain model where one can be measured",
        "--eps": "one bound, or several",
        "--variant": "push reads a folder, pull a repository",
    }
    different = {flag: uses for flag, uses in seen.items() if len(uses) > 1 and flag not in allowed}
    assert different == {}


def test_every_command_has_the_flags_of_output():
    for parser in cli._parsers()[1].values():
        flags = {flag for action in parser._actions for flag in action.option_strings}
        assert {"--json", "--quiet", "--traceback"} <= flags
        assert not any(action.dest == "model" and not action.option_strings for action in parser._actions)


LOCAL = [name for name in ORDER if name not in ("pull", "list", "demo")]


@pytest.mark.slow
def test_the_example_of_every_help_works(tmp_path, monkeypatch, capsys):
    """In the order of the commands: what one writes another reads. Those that need the Hub are in tests/hub."""
    monkeypatch.chdir(tmp_path)
    for command in LOCAL:
        text = help_of(command)
        example = text.rpartition("example:\n")[2].strip()
        assert example.startswith(f"timm-nrpm {command} "), command
        said = shown(capsys, *shlex.split(example)[1:])
        assert isinstance(said, dict)
        for key in ("variant", "picture", "page", "file"):
            assert key not in said or os.path.exists(said[key]), (command, key)
    assert set(timm_nrpm.lambdas(timm_nrpm.from_pretrained("variant")).values()) == {0.8}
    front = result_in(tmp_path / "searched" / "front.json")
    assert timm_nrpm.lambdas(timm_nrpm.from_pretrained("searched/variant")) == pytest.approx(front.best.lams)
    files = [
        "tuned/history.json",
        "certified/sigma-0.25.json",
        "corrupted/corruptions.json",
        "searched/front.json",
        "subnetwork/subnetwork.json",
    ]
    for file in [*files, "evaluated/adaptive-Linf-0.15.json"]:
        assert main(["plot", file, "--output", "one.png"]) == 0
    assert main(["plot", "--variant", "calibrated", "--output", "lambdas.svg"]) == 0
    assert main(["plot", "tuned/variant/config.json"]) == 2
    assert "tuned/variant/config.json holds no result that can be drawn" in capsys.readouterr().err


def test_adapted_like_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown(capsys, "create", "--lam", "0.5", "--output", "half")
    call = ["adapt", "--samples", "64", "--batch-size", "32", "--prior", "20", "--robust", "l1"]
    said = shown(capsys, *call, "--variant", "half", "--output", "moved")
    assert set(said["lambdas"].values()) == {0.5}
    variant = timm_nrpm.from_pretrained("moved")
    assert list(map(str, variant.nrpm.statistics)) == ["adapted to 64 images (prior 20, l1)"]
    expected = timm_nrpm.from_pretrained("half")
    images = timm_nrpm.loaders.pixel_loader("digits", split="test", model=expected, batch_size=32, samples=64)
    timm_nrpm.adapt_(expected, images, prior=20, robust="l1")
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(variant(x), expected(x))
    with pytest.raises(SystemExit):
        main(["adapt", "--prior", "few"])
    assert "--prior: 'few' is no number" in capsys.readouterr().err
    assert main(["adapt", "--prior", "-3"]) == 2
    assert re.search(r"--prior -3(\.0)? is not allowed: give a number >= 0 of images", capsys.readouterr().err)


def test_standard_units_without_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    standard = ("--lam", "0.5", "--estimator-eps", "0.6", "--standardize")
    shown(capsys, "create", *standard)
    measure = ("--suite", "quick", "--first", "9", "--steps", "2", "--no-control")
    for call in (["evaluate", "--variant", "variant"], ["evaluate", *standard, "--calibrate", "0"]):
        assert main([*call, *measure, "--output", call[1].strip("-")]) == 2
        assert "call timm-nrpm calibrate, which takes them from images" in capsys.readouterr().err
    shown(capsys, "calibrate", "--variant", "variant", "--samples", "100")
    expected = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5, eps=0.6, standardize=True).eval()
    images = timm_nrpm.loaders.pixel_loader("digits", split="train", model=expected, batch_size=100, samples=100)
    timm_nrpm.calibrate_(expected, images)
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(timm_nrpm.from_pretrained("variant")(x), expected(x))
    assert main(["inspect", "--variant", "variant"]) == 0
    assert "eps 0.6 in standard units, penalty l1" in capsys.readouterr().out
    shown(capsys, "evaluate", "--variant", "variant", *measure)
    calls = ["search", "--variant", "variant", "--budget", "2", "--one-lambda", "--samples", "20", "--calibrate", "60"]
    shown(capsys, *calls, "--steps", "1", "--output", "found")
    assert timm_nrpm.from_pretrained("found/variant").nrpm.config.standardize


def test_from_a_checkpoint_of_timms_to_the_hub_without_python(tmp_path, monkeypatch, capsys):
    """Made, calibrated, evaluated and pushed; the weights, which have no public name, are in the variant."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("resnet8_digits", pretrained=True)
    with torch.no_grad():
        model.fc.bias += torch.randn(10) / 10
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "arch": "resnet8_digits"}, "best.pth.tar")
    said = shown(capsys, "create", "--model", "resnet8_digits", "--weights", "best.pth.tar", "--lam", "0.9")
    assert said["variant"] == "variant"
    assert said["full"]
    assert set(said["lambdas"].values()) == {0.9}
    shown(capsys, "calibrate", "--variant", "variant", "--samples", "100")
    variant = timm_nrpm.from_pretrained("variant")
    expected = timm_nrpm.reprogram_(model.eval(), timm_nrpm.NRPMConfig(lam=0.9))
    images = timm_nrpm.loaders.pixel_loader("digits", split="train", model=model, batch_size=100, samples=100)
    timm_nrpm.calibrate_(expected, images)
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(variant(x), expected(x))
    call = ["evaluate", "--variant", "variant", "--suite", "quick", "--first", "9", "--steps", "2"]
    reports = shown(capsys, *call)["reports"]
    assert [report["data"] for report in reports] == ["digits, test, the first 9"]
    assert main(["push", "--variant", "variant", "me/mine", "--dry-run"]) == 2  # of whose weights nobody said anything
    assert "--license" in capsys.readouterr().err
    report = "evaluated/quick-Linf-0.0313725.json"
    sent = ["push", "--variant", "variant", "me/mine", "--license", "mit", "--report", report, "--dry-run"]
    assert {"model.safetensors", "README.md", "evaluation.json"} <= set(shown(capsys, *sent)["files"])
    tuned = [
        "tune",
        "--weights",
        "best.pth.tar",
        "--epochs",
        "1",
        "--steps",
        "1",
        "--samples",
        "64",
        "--calibrate",
        "0",
    ]
    history = shown(capsys, *tuned, "--validation-first", "5")
    learned = timm_nrpm.lambdas(timm_nrpm.from_pretrained(history["variant"]))  # without its base
    assert learned == pytest.approx(history["lambdas"])


def test_images_of_another_size_and_normalisation(tmp_path, monkeypatch, capsys):
    """They are described where a variant records it, so that whatever is done with it later agrees."""
    monkeypatch.chdir(tmp_path)
    call = ["create", "--lam", "1", "--image-size", "12", "10", "--mean", "0.4", "--std", "0.3"]
    shown(capsys, *call)
    model = timm_nrpm.from_pretrained("variant")
    assert model.pretrained_cfg["input_size"] == [1, 12, 10]
    assert model.pretrained_cfg["mean"] == [0.4]
    pixels, _ = next(iter(timm_nrpm.loaders.pixel_loader("digits", split="test", model=model)))
    assert pixels.shape[1:] == (1, 12, 10)
    quick = ["evaluate", "--suite", "quick", "--first", "40", "--steps", "1", "--eps", "0.1"]
    of_variant = shown(capsys, *quick, "--variant", "variant", "--output", "a")["reports"][0]
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=1.0).eval()
    loader = timm_nrpm.loaders.pixel_loader("digits", split="test", input_size=(1, 12, 10), first=40, batch_size=100)
    expected = timm_nrpm.evaluate(
        model, loader, timm_nrpm.Threat("Linf", 0.1), "quick", steps=1, mean=(0.4,), std=(0.3,)
    )
    assert of_variant["correct"] == list(expected.correct)
    assert of_variant["attacks"][0]["survived"] == list(expected.attacks[0].survived)
    assert main(["create", "--image-size", "8", "8", "8"]) == 2
    assert "--image-size 8 8 8 is not allowed" in capsys.readouterr().err
    for wrong, message in (("--mean 123.7", "--mean 123.7 normalises no pixels"), ("--std 0.2 0.3", "--std 0.2 0.3")):
        assert main(["create", *wrong.split(), "--output", "wrong"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


def test_json_and_quiet_leave_stderr_to_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "--samples", "10", "--quiet", "--json"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    assert json.loads(out)["variant"] == "variant"
    assert main(["models", "*nope*", "--json"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1


def test_halves_have_files_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call = ["certify", "--model", "resnet8_digits", "--lam", "none", "--samples", "2", "--n0", "10", "--n", "40"]
    said = [shown(capsys, *call, *flags) for flags in ((), ("--halves",))]
    names = [f"sigma-0.25.{end}" for end in ("json", "jsonl", "png")]
    assert sorted(os.listdir("certified")) == sorted([*names, *(name.replace("sigma", "halves") for name in names)])
    assert [each["report"]["smoothing"] for each in said] == ["whole", "halves"]
    assert main(["plot", "certified/sigma-0.25.json", "certified/halves-0.25.json", "--output", "both.svg"]) == 0
    assert "in halves" in (tmp_path / "both.svg").read_text()


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"timm-nrpm {timm_nrpm.__version__}\n"
    assert main(["--version", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"timm_nrpm", "python", "timm", "huggingface_hub", "platform", "gpu", "threads"} <= set(versions)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes(shell):
    done = process("-m", "timm_nrpm.cli", "--print-completion", shell)
    assert done.returncode == 0
    assert "--estimator-eps" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
        complete = (
            done.stdout + "\nCOMP_WORDS=(timm-nrpm eval); COMP_CWORD=1; _shtab_timm_nrpm timm-nrpm eval timm-nrpm"
        )
        complete += '\necho "${COMPREPLY[@]}"'
        found = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, check=True)
        assert found.stdout.split() == ["evaluate"]


CASES = [  # the call, the exit status, and some of what is said
    ("evaluate resnet18", 2, "a model is --model resnet18, a variant --variant resnet18"),
    ("evaluate --sample 3", 2, "--sample is not known: did you mean --samples. See timm-nrpm evaluate --help."),
    ("evaluate --model resnet8_digit", 2, "Near names: resnet8_digits"),
    ("certify --model resnet8_digit --lam none", 2, "Near names: resnet8_digits"),
    ("create --weights nosuch.pth", 2, "nosuch.pth is no file"),
    ("create --lam 1.5", 2, "--lam 1.5 is not allowed"),
    ("create --revision main", 2, "--revision is not known"),
    ("calibrate --variant nosuch", 2, "give the folder of a variant, or owner/name on the Hub"),
    ("calibrate --revision main", 2, "--revision has no effect"),
    ("search --lam 0.3", 2, "--lam has no effect: lambda is what is searched for"),
    ("search --budget 1 --samples 5 --calibrate 5", 2, "--budget 1 is not allowed"),
    ("certify --confidence 0.001 --samples 2 --calibrate 5", 2, "--confidence 0.001"),
    ("certify --n 5 --samples 2 --calibrate 5", 2, "n"),
    ("certify --halves --n 101 --samples 2 --calibrate 5", 2, "--n 101 is not allowed: 2 parts of an image share"),
    ("corrupt --kinds fogg --samples 2 --calibrate 5", 2, "fog"),
    ("corrupt --kinds white_noise --severities 6 --samples 2 --calibrate 5", 2, "6"),
    ("plot", 2, "there is nothing to draw"),
    ("plot nosuch.json", 2, "nosuch.json"),
    ("inspect --variant nosuch", 2, "nosuch"),
    ("push --variant nosuch me/x", 2, "nosuch"),
]


def status_of(call):
    try:
        return main(call)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("call", "status", "message"), CASES, ids=[call for call, *_ in CASES])
def test_a_users_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, call, status, message):
    monkeypatch.chdir(tmp_path)
    assert status_of(call.split()) == status
    error = capsys.readouterr().err
    assert error.startswith("timm-nrpm: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("lam=2"), 2, "lam=2"),
        (ImportError("pip install it"), 2, "pip install it"),
        (PermissionError(13, "no"), 2, "[Errno 13] no"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (timm_nrpm.errors.NotOnHub("no such"), 2, "no such"),
        (timm_nrpm.errors.Unreachable("silent"), 1, "silent"),
        (RuntimeError("out of memory"), 1, "out of memory"),
        (KeyError("x"), 1, "KeyError('x'), which should not have happened. Start it again with --traceback"),
    ],
)
def test_what_the_user_can_mend_has_one_status(monkeypatch, capsys, error, status, text):
    def fail(args, terminal):
        raise error

    parsers = cli._parsers()
    parsers[1]["models"].set_defaults(command=Command(fail))
    monkeypatch.setattr(cli, "_parsers", lambda: parsers)
    assert main(["models"]) == status
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said
    assert main(["models", "--traceback"]) == status
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("timm-nrpm: ")
