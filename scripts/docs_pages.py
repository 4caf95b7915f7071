"""A hook of mkdocs: the pages of the site are files of the whole repository, each under its own path.

The README, docs/, results/ and hub_cards/ link to each other. mkdocs follows links inside one folder only, so the pages
are built from a folder of links to these files, where every relative link holds as it does in the repository.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "docs", "results", "hub_cards")
"""Files and folders that pages link to."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Build from a folder of links to the parts of the repository, in place of docs/ alone."""
    pages = ROOT / "build" / "pages"
    pages.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        link = pages / part
        if not link.is_symlink():
            link.symlink_to(ROOT / part)
    config.docs_dir = str(pages)
    return config
