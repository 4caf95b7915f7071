"""The entry point: what every command shares, and how a command ends."""

import signal
import subprocess
import sys
import time

import forked
import pytest

import timm_nrpm
from timm_nrpm.cli import demo
from timm_nrpm.cli import program as cli
from timm_nrpm.cli.options import Command
from timm_nrpm.cli.program import main
from timm_nrpm.cli.terminal import Terminal


@pytest.mark.slow
def test_the_demo_on_fewer_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    demo.run(tmp_path, Terminal(), lams=(1.0, 0.6), images=40)
    text = capsys.readouterr().out
    assert "it gives the same logits" in text.replace("\n", " ")
    assert text.count("│ yes") == text.count("│ no ") == 2
    assert "…" not in text  # fits a terminal
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert set(timm_nrpm.lambdas(timm_nrpm.from_pretrained(tmp_path / "variant")).values()) == {0.6}


def test_list(capsys):
    assert main(["models", "resnet1?"]) == 0
    assert "resnet18" in capsys.readouterr().out.split()


def test_an_empty_list_is_told(capsys):
    assert main(["models", "*nope*"]) == 2
    assert "no architecture matches '*nope*'" in capsys.readouterr().err


def test_a_failure_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.startswith("timm-nrpm: ")


def test_a_wrong_call(capsys):
    with pytest.raises(SystemExit) as error:
        main(["nope"])
    assert error.value.code == 2
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "timm_nrpm.cli", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--objective", "best"), ("--eps", "x"), ("--eps", "1/0"), ("--epochs", "1.5")]
)
def test_a_wrong_value_is_a_wrong_call(option, value):
    with pytest.raises(SystemExit) as error:
        main(["tune", option, value])
    assert error.value.code == 2


def started(tmp_path, *arguments):
    """A command as a process of its own, once the file in its folder is there that shows that it is at work."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "timm_nrpm.cli", *arguments, "--output", str(folder)]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, folder


def wait_for(process, ready):
    end = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


LONG = ["evaluate", "--suite", "quick", "--first", "360", "--batch-size", "180", "--steps", "20", "--no-control"]


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
    assert before.count(b"\n") == 2
    if number == signal.SIGINT:
        assert main([*LONG, "--output", str(folder)]) == 0
        assert journal.read_bytes().startswith(before)
        assert journal.read_bytes().count(b"\n") == 3


def test_a_stopped_run_of_tune_says_how_to_go_on(tmp_path):
    more = ["tune", "--epochs", "50", "--steps", "1", "--calibrate", "0", "--validation-first", "5"]
    process, folder = started(tmp_path, *more, "--checkpoint-every", "1")
    wait_for(process, lambda: any((folder / "checkpoints").glob("*")))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    said = f"The last checkpoint is in {folder}, and the same command with --resume goes on from it."
    assert error == f"timm-nrpm: stopped. {said}\n"


VARIANT = ["--variant", "v"]


@pytest.mark.parametrize("command", ["demo", "models", "create", "search", "plot", "push", "pull", "inspect", "list"])
def test_every_command_stops_in_one_line(monkeypatch, capsys, command):
    def interrupted(args, terminal):
        signal.raise_signal(signal.SIGINT)

    parsers = cli._parsers()
    parsers[1][command].set_defaults(command=Command(interrupted))
    monkeypatch.setattr(cli, "_parsers", lambda: parsers)
    needed = {"push": [*VARIANT, "me/x"], "pull": VARIANT, "inspect": VARIANT, "list": ["me"]}
    assert main([command, *needed.get(command, [])]) == 130
    assert capsys.readouterr().err == "timm-nrpm: stopped. Start the same command again.\n"


def test_the_handler_of_sigterm_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    assert main(["models", "resnet18"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_is_no_failure():
    command = [sys.executable, "-m", "timm_nrpm.cli", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
