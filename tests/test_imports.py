"""Imports go one way: between the wings, and inside each (`[tool.importlinter]` in pyproject.toml)."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def lint(folder: Path) -> subprocess.CompletedProcess:
    """What import-linter says of the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to plant imports in."""
    shutil.copytree(ROOT / "timm_nrpm", tmp_path / "timm_nrpm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_go_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("room", "line", "contract"),
    [
        ("nn/layers.py", "from timm_nrpm.models.registry import create_model", "wings"),
        ("config.py", "from timm_nrpm.nn import functional", "wings"),
        ("evaluation/report.py", "def draw():\n    from timm_nrpm.figures import canvas", "wings"),
        ("attacks/threats.py", "from timm_nrpm.attacks.suites import SUITES", "inside attacks"),
        ("figures/history.py", "from timm_nrpm.figures.pareto import KINDS", "inside figures"),
    ],
)
def test_an_import_upwards_is_caught(copy, room, line, contract):
    file = copy / "timm_nrpm" / room
    file.write_text(f"{file.read_text()}\n\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout


def test_a_new_file_needs_a_place_in_the_list(copy):
    (copy / "timm_nrpm" / "attacks" / "another.py").write_text("")
    done = lint(copy)
    assert done.returncode == 1
    assert "inside attacks BROKEN" in done.stdout
    assert "another" in done.stdout


def test_files_and_functions_stay_short():
    """A file has at most 350 lines, and a function 60 beside its docstring."""
    long = []
    for path in (ROOT / "timm_nrpm").rglob("*.py"):
        text = path.read_text()
        if text.count("\n") > 350:
            long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                documented = ast.get_docstring(node) is not None
                lines = node.end_lineno - node.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)
                if lines > 60:
                    long.append(f"{path.name}: {node.name}")
    assert long == []
