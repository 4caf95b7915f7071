import io
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
    assert main(["list", "resnet1?"]) == 0
    assert "resnet18" in capsys.readouterr().out.split()


def test_an_empty_list_is_told(capsys):
    assert main(["list", "*nope*"]) == 1
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
