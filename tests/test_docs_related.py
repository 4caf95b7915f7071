"""docs/related.md has one line for each system, and the rooms that it names are there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "related.md").read_text(encoding="utf-8")
SYSTEMS = 49
LINES = [line for line in PAGE.splitlines() if line.startswith("- ")]
ROOMS = sorted(set(re.findall(r"`(timm_nrpm(?:\.\w+)+)`", PAGE)))


def test_every_system_has_one_line():
    titles = [re.match(r"- \*\*(.+?)\*\*: ", line)[1] for line in LINES]
    assert len(titles) == len(set(titles)) == SYSTEMS


def test_every_line_says_where_it_is_or_why_not():
    for line in LINES:
        assert "Not here: " in line or "Not here, for the same reason" in line or "`timm_nrpm." in line, line


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_that_is_named_exists(room):
    assert find_spec(room) is not None
