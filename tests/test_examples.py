"""Every example in a docstring runs and prints what it says."""

import ast
import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import forked
import pytest
from docstring_examples import GIVEN

import timm_nrpm

ROOT = Path(__file__).resolve().parents[1]


PARTS = ("advice subnetworks", "evaluation", "tuning hub", "")
"""Wings whose examples run in one process; the last part is all others."""


def test_no_module_has_another_meaning_for_what_its_examples_take_for_granted():
    """The module's own names come first in its examples: a function `plain` would stand where a model is meant."""
    for found in pkgutil.walk_packages(timm_nrpm.__path__, "timm_nrpm."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            nodes = (node for example in test.examples for node in ast.walk(ast.parse(example.source)))
            used = {node.id for node in nodes if isinstance(node, ast.Name)}
            another = GIVEN & vars(module).keys() - {test.name.split(".")[-1]}
            assert not used & another, f"{test.name}: rename what {found.name} has"


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_the_examples_in_docstrings_run(part, stocked_hub, tmp_path):
    named = {ROOT / "timm_nrpm" / wing for each in PARTS for wing in each.split()}
    folders = [ROOT / "timm_nrpm" / wing for wing in part.split()] or sorted(
        path for path in (ROOT / "timm_nrpm").iterdir() if path not in named and (path.is_dir() or path.suffix == ".py")
    )
    flags = "NUMBER NORMALIZE_WHITESPACE ELLIPSIS"
    command = [sys.executable, "-m", "pytest", *map(str, folders), "--doctest-modules", "-p", "docstring_examples"]
    command += ["-q", "--doctest-ignore-import-errors", "--doctest-continue-on-failure", "-p", "no:cacheprovider"]
    command += ["-o", f"doctest_optionflags={flags}", "-o", "addopts=", "-p", "no:xdist", "-W", "ignore"]
    done = forked.run(
        command, cwd=ROOT, env=stocked_hub.environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:]
    files = [file for path in folders for file in ([path] if path.suffix else path.glob("**/*.py"))]
    written = sum(bool(re.search(r"^\s*>>> ", file.read_text(), re.MULTILINE)) for file in files)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= written > 0
