"""What the workflow of releases asks before it tags."""

import re
from pathlib import Path

import pytest

import timm_nrpm

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, newest: str) -> None:
    """A repository at version 1.2.3 whose changelog begins with this entry."""
    (folder / "timm_nrpm").mkdir()
    (folder / "timm_nrpm" / "version.py").write_text('__version__ = "1.2.3"\n')
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {newest}\n\n- a\n\n## 1.2.2 (2025-01-02)\n")


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import release_version

    return release_version


def test_the_changelog_describes_this_version():
    entries = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(each.split(" ")[0] for each in entries if each != "Unreleased") == timm_nrpm.__version__


def test_a_version_that_all_agree_on_is_released(release, tmp_path):
    write(tmp_path, "1.2.3 (2026-01-02)")
    assert release.agreed(tmp_path) == release.agreed(tmp_path, "v1.2.3") == "1.2.3"


@pytest.mark.parametrize(
    ("newest", "tag", "message"),
    [
        ("Unreleased", None, "says '1.2.3', and the first entry of CHANGELOG.md is 'Unreleased'"),
        ("1.2.4 (2026-01-02)", None, "it has to be '1.2.3 (YYYY-MM-DD)'"),
        ("1.2.3", None, "is '1.2.3': it has to be '1.2.3 (YYYY-MM-DD)'"),
        ("1.2.3 (2026-01-02)", "v1.2.4", "The tag 'v1.2.4' is not v1.2.3"),
        ("1.2.3 (2026-01-02)", "1.2.3", "The tag '1.2.3' is not v1.2.3"),
    ],
)
def test_what_disagrees_is_not_released(release, tmp_path, newest, tag, message):
    write(tmp_path, newest)
    with pytest.raises(ValueError, match=re.escape(message)):
        release.agreed(tmp_path, tag)


def test_every_direct_dependency_is_on_the_page(release):
    from importlib.metadata import distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    page = (ROOT / "docs" / "dependencies.md").read_text()
    listed = {row[0]: row[3] for row in re.findall(r"^\| (\S+) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)}
    developers = re.compile(r'extra == "(test|docs|package|dev)"')
    for text in distribution("timm_nrpm").requires:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "timm-nrpm" and not developers.search(str(requirement.marker)):
            assert listed.get(name) == "directly", name
