"""The version that is released, if the package, the changelog and the tag agree on it.

python scripts/release_version.py            # prints it, or says what disagrees
python scripts/release_version.py v0.1.0     # and whether that tag is its own
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def agreed(root: Path, tag: str | None = None) -> str:
    """Return the version.

    Args:
        root: Folder of the repository.
        tag: Tag of the release, "v" and the version; None if there is none yet.

    Raises:
        ValueError: The package, the changelog and the tag name different versions, or the entry has no date.
    """
    found = re.search(r'__version__ = "(.+)"', (root / "timm_nrpm" / "version.py").read_text())
    version = found.group(1) if found else ""
    entry = re.search(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = entry.group(1) if entry else ""
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", newest):
        raise ValueError(
            f"timm_nrpm/version.py says {version!r}, and the first entry of CHANGELOG.md is {newest!r}: it has to be "
            f"'{version} (YYYY-MM-DD)'."
        )
    if tag is not None and tag != f"v{version}":
        raise ValueError(f"The tag {tag!r} is not v{version}, the version of the package: tag the right commit.")
    return version


if __name__ == "__main__":
    try:
        print(agreed(ROOT, *sys.argv[1:2]))
    except ValueError as error:
        sys.exit(str(error))
