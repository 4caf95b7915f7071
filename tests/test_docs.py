"""The pages: short where they have to be, whole, and each of their links leads somewhere."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from urllib.parse import unquote

import pages
import pytest
from pages import NOTEBOOK, PAGES, ROOT

import timm_nrpm

README = ROOT / "README.md"
LINKED = [*PAGES, NOTEBOOK, *sorted((ROOT / "results").glob("*.md"))]
GENERATORS = ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter")


def test_the_readme_is_short():
    assert len(README.read_bytes()) < 12_000


def test_the_readme_begins_with_two_commands_that_are_in_the_makefile():
    told = re.findall(r"^make (\w+) ", README.read_text(), re.MULTILINE)
    made = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert told == ["demo", "test"]
    assert set(told) <= set(made)


def rows(text: str) -> list[list[str]]:
    """The first table of a text whose first column is the model, as rows of cells."""
    (table,) = re.findall(r"^\| model \| threat .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[:1]
    return [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()]


def test_the_table_of_what_helps_is_that_of_the_atlas():
    """In other words, but with the same models, threats and numbers."""
    ours, measured = rows(README.read_text()), rows((ROOT / "results" / "atlas.md").read_text())
    in_short = [[cell.removesuffix(" of severity 5").replace("_", " ") for cell in row] for row in measured]
    for row, full in zip(ours, in_short, strict=True):
        model, *others = row
        assert [model.replace("_", " "), *others[:3], *others[4:]] == [*full[:4], *full[5:]]
        assert set(re.findall(r"\d+", row[4])) <= set(re.findall(r"\d+", full[4]))


@pytest.mark.parametrize("page", LINKED, ids=pages.name_of)
def test_links_inside_the_repository_lead_to_a_file_and_a_heading(page):
    for _, words, target in pages.links(page):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), (words, target)
        if anchor:
            assert anchor in pages.anchors(found), (words, target)


@pytest.mark.parametrize("page", [*LINKED, ROOT / "CHANGELOG.md"], ids=pages.name_of)
def test_brackets_after_brackets_are_code(page):
    # "[0, 1] [B, C, H, W]" in plain words is a link by reference for Markdown, and one that leads nowhere.
    words = re.sub(r"`[^`\n]+`", "", pages.FENCE.sub("", pages.text_of(page)))
    assert not re.findall(r"\[[^\]\n]*\] ?\[[^\]\n]*\]", words)


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_pictures_say_their_numbers_in_words(page):
    for kind, words, target in pages.links(page):
        if kind:
            assert len(re.findall(r"\d+", words)) >= 5, target


@pytest.mark.parametrize("page", PAGES, ids=pages.name_of)
def test_every_block_of_code_says_what_it_is(page):
    for language, body in pages.FENCE.findall(page.read_text()):
        assert language or body.startswith("make demo "), body
        assert body.startswith("$ ") == (language == "console"), body
        assert language in ("bash", "sh", "console") or not pages.calls(body), body


def test_every_page_has_a_place_in_the_navigation():
    told = re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(told) == len(set(told))
    assert set(told) == {*map(pages.name_of, [*PAGES, NOTEBOOK]), "CHANGELOG.md"}


def test_every_public_name_is_in_the_reference():
    told = re.findall(r"^::: timm_nrpm\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(set(timm_nrpm.__all__) - {"__version__"})


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, GENERATORS)), reason="the generator is not installed: pip install '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    front = (tmp_path / "site" / "index.html").read_text()
    assert "https://cdn" not in front
    reference = (tmp_path / "site" / "docs" / "api.html").read_text()
    assert ":func:" not in reference
    assert 'id="timm_nrpm.create_model"' in reference


def outputs(notebook: str) -> list[list[str]]:
    """The lines that each cell of code printed."""
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    return [
        "".join("".join(out.get("text") or out["data"]["text/plain"]) for out in cell["outputs"]).splitlines()
        for cell in cells
    ]


def test_the_notebook_was_run_from_top_to_bottom():
    content = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {out["output_type"] for cell in cells for out in cell["outputs"]}
    assert kinds <= {"stream", "execute_result"}
    assert all(outputs(NOTEBOOK.read_text()))


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("nbconvert", "ipykernel"))), reason="notebooks cannot be run: pip install '.[docs]'"
)
def test_the_notebook_runs_and_prints_what_it_shows(tmp_path):
    """Which tuned model is advised depends on what the time suffices for. That one is advised does not, nor that it
    keeps far more than the plain model, of which 29 % are left. A busy machine gets more time than the page says."""
    content = NOTEBOOK.read_text()
    assert "seconds=60," in content
    patient = tmp_path / "patient.ipynb"
    patient.write_text(content.replace("seconds=60,", "seconds=240,"))
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", NOTEBOOK.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(patient)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shown, printed = (outputs(path.read_text()) for path in (NOTEBOOK, tmp_path / NOTEBOOK.name))
    *measured, advice, kept = zip(shown, printed, strict=True)
    for before, after in measured:
        assert pages.missing(before, after) == []
    assert all(cell[-1].startswith("Against Linf 0.15, tuning ") for cell in advice)
    assert pages.missing(*kept, tolerance=20.0) == []
