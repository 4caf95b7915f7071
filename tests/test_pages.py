"""What the pages have one type runs as it stands, and prints what they show."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pages
import pytest
import timm
import torch
from pages import PAGES, ROOT, SYNSETS, photos
from safetensors.torch import save_file

SHORTER = {
    "tune": ("--epochs", "1"),
    "advise": ("--effect", "100", "--seconds", "1", "--train", "0"),
    "subnetwork": shlex.split(
        "--num-classes 2 --image-size 64 --epochs 1 --steps 1 --trials 1 --late-epochs 1 --attacks quick"
    ),
}
IMAGES = {"advise": {"tested": 6}, "subnetwork": {"trained": 100}}
RUN = [page for page in PAGES if not (ROOT / "tests" / f"test_docs_{page.stem.replace('-', '_')}.py").exists()]
"""Pages whose code is run here: a page may have a file of tests of its own."""

PYTHON = [page for page in RUN if pages.blocks(page, "python")]
SHELL = list(dict.fromkeys(block for page in RUN for block in pages.blocks(page, "bash") if pages.calls(block)))
SHOWN = [(page, block) for page in RUN for block in pages.blocks(page, "console")]

QUICKLY = {"evaluation.md"}
"""A page whose Python runs in any case, so that a fault is seen at once; the others are slow together."""


@pytest.mark.parametrize("page", PYTHON, ids=pages.name_of)
def test_every_block_of_python_is_python(page):
    for block in pages.blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=() if page.name in QUICKLY else pytest.mark.slow) for page in PYTHON],
)
def test_the_python_of_a_page_runs(page, stocked_hub, tmp_path):
    photos(tmp_path)
    command = [sys.executable, str(ROOT / "tests" / "page_script.py"), str(page)]
    environment = {**stocked_hub.environment(tmp_path), "PYTHONPATH": str(ROOT)}
    done = forked.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^ran block \d+$", done.stdout, re.MULTILINE)) == len(pages.blocks(page, "python"))


def models_in(folder: Path) -> None:
    """Weights that commands name."""
    two = timm.create_model("resnet18", num_classes=len(SYNSETS))
    save_file(two.state_dict(), folder / "natural.safetensors")
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": two.state_dict()}, folder / "model_best.pth.tar")


@pytest.mark.slow
@pytest.mark.parametrize("block", SHELL, ids=lambda block: " ".join(pages.calls(block)[0][:3]))
def test_the_commands_of_a_block_run(block, stocked_hub, tmp_path):
    """Those for resnet18, with a few photos: weights drawn at random are right about few images, so the attacks have
    little to do; of ten epochs one is run, and advice has a second. A subnetwork needs images of every class."""
    calls = pages.calls(block)
    photos(tmp_path, **IMAGES.get(calls[0][0], {}))
    models_in(tmp_path)
    ran = [call for call in calls if {"resnet18", "my-variant"} & set(call)]
    for call in ran:
        done = subprocess.run(
            [sys.executable, "-m", "timm_nrpm.cli", *call, *SHORTER.get(call[0], ())],
            cwd=tmp_path,
            env=stocked_hub.environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (call, done.stderr)
        if call[0] == "push":
            assert "README.md" in stocked_hub.repo("me/my-variant").files()
    assert ran


TOLERANCES = {"tune": 6.0, "push": 250.0, "pull": 250.0}
"""Largest difference of a number to the page's, in points, where it is not 3: tuning differs from machine to machine,
and a file of the Hub by some bytes."""

TIMED = ("--seconds", "3600")
"""Advice has time for everything that the page shows, on a slow or busy machine as well."""


def in_outline(lines: list[str]) -> list[str]:
    """Advice in outline: the strategies in their order, what was not tried and why, and the kind of the best one.

    The numbers hang on tuned models, which differ from machine to machine, and so does which candidate of a strategy
    is its best where several are as good.
    """
    words = [re.split(r"\s{2,}|\. Give more", line)[0] for line in lines]
    return [
        re.sub(r"^(Against .*?, tuning).*", r"\1", each) for each in words if not re.match(r"on \d+|at |points", each)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), SHOWN, ids=[pages.sessions(block)[0][0] for _, block in SHOWN])
def test_commands_print_what_a_page_shows(page, block, stocked_hub, tmp_path):
    shutil.copytree(ROOT / "hub_cards" / "resnet8_digits-lambda", tmp_path / "digits-lambda")
    programs = {"timm-nrpm": [sys.executable, "-m", "timm_nrpm.cli"], "python": [sys.executable]}
    for command, shown in pages.sessions(block):
        program, *arguments = shlex.split(command)
        advised = arguments[0] == "advise"
        width = max(map(len, shown))
        done = subprocess.run(
            [*programs[program], *arguments, *(TIMED if advised else ())],
            cwd=tmp_path,
            env={**stocked_hub.environment(tmp_path), "COLUMNS": "80" if width <= 80 else "120"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        printed = done.stdout.splitlines()
        if advised:
            shown, printed = in_outline(shown), in_outline(printed)
        assert pages.missing(shown, printed, TOLERANCES.get(arguments[0], 3.0)) == [], done.stdout
