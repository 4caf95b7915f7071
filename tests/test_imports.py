"""Imports go one way, in the order that CONTRIBUTING.md has."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "timm_nrpm").glob("*.py"))


def rooms() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(
        r"`(\w+)`", text.split("One file for one noun")[1].partition("tests/test_imports.py`")[2].split("\n- ")[0]
    )


def test_every_room_is_in_the_list_once():
    names = {path.stem for path in FILES} - {"__init__"} | {"kernels"}
    assert sorted(rooms()) == sorted(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_none_imports_one_that_stands_after_it(path):
    if path.stem == "__init__":
        return
    order = rooms()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "timm_nrpm":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names if alias.name in order]
            for name in names:
                assert order.index(name) < order.index(path.stem), f"{path.stem} imports {name}"
