"""Every example in a docstring runs and prints what it says."""

import re
import sys
from pathlib import Path

import forked

ROOT = Path(__file__).resolve().parents[1]


def test_the_examples_in_docstrings_run(stocked_hub, tmp_path):
    flags = "NUMBER NORMALIZE_WHITESPACE ELLIPSIS"
    command = [sys.executable, "-m", "pytest", "timm_nrpm", "--doctest-modules", "-p", "docstring_examples", "-q"]
    command += ["--doctest-ignore-import-errors", "--doctest-continue-on-failure", "-p", "no:cacheprovider"]
    command += ["-o", f"doctest_optionflags={flags}", "-o", "addopts=", "-p", "no:xdist", "-W", "ignore"]
    done = forked.run(
        command, cwd=ROOT, env=stocked_hub.environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-20000:]
    written = sum(
        bool(re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)) for path in ROOT.glob("timm_nrpm/**/*.py")
    )
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= written
