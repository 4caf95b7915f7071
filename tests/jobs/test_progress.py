"""What a progress bar writes, to a terminal and to a file."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from timm_nrpm.jobs import progress
from timm_nrpm.jobs.progress import progress_bar, track


@pytest.fixture
def written(monkeypatch):
    """What bars write to a file, twenty times a second."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "CONSOLE", Console(file=file, width=80))
    monkeypatch.setattr(progress, "EVERY", 0.05)
    return file


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_file_is_told_how_far_a_long_work_is(written):
    """Before the work has ended, and again when it does."""
    with progress_bar(True, counted=True) as bar:
        task = bar.add_task("Attacking", total=4)
        bar.update(task, completed=3)
        until(lambda: "3/4" in written.getvalue())
        bar.update(task, completed=4, description="Attacked")
    last = written.getvalue().splitlines()[-1]
    assert last.startswith("Attacked")
    assert "4/4" in last


def test_short_work_writes_one_line(written, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 60.0)
    assert list(track(iter("abc"), "Spelling", None, True)) == ["a", "b", "c"]
    (line,) = written.getvalue().splitlines()
    assert line.startswith("Spelling")


def test_nothing_is_written_of_a_hidden_bar(written):
    with progress_bar(False) as bar:
        bar.add_task("Attacking", total=4)
        time.sleep(0.2)
    assert written.getvalue() == ""


@pytest.mark.parametrize("ends", [ValueError, KeyboardInterrupt, None])
def test_the_writing_ends_with_the_work(written, ends):
    """Also when the work ends with an error, and when the bar is stopped twice."""
    before = threading.active_count()
    try:
        with progress_bar(True) as bar:
            bar.start()  # a second time
            assert [thread.name for thread in threading.enumerate()].count("bars in a file") == 1
            bar.add_task("Attacking", total=4)
            if ends:
                raise ends
    except (ValueError, KeyboardInterrupt):
        pass
    bar.stop()
    said = written.getvalue()
    time.sleep(0.2)
    assert written.getvalue() == said
    assert threading.active_count() == before


def test_a_terminal_is_drawn_on_and_not_written_to_anew(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "CONSOLE", Console(file=file, width=80, force_terminal=True))
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with progress_bar(True) as bar:
        bar.add_task("Attacking", total=4)
        names = {thread.name for thread in threading.enumerate()}
        assert "bars in a file" not in names
