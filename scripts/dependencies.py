"""What this package installs, in which version and under which licence: docs/dependencies.md.

    python scripts/dependencies.py --write    # from what is installed in this environment, as `nox -s licences` does

Says for each extra what it brings, directly and by way of others. pip-licenses reads the licences; a licence that may
not be used with this package's own (Apache-2.0) in every case is listed for itself.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dependencies.md"
EXTRAS = ("", "demo", "tune", "lora", "search", "corruptions", "export", "openvino")
"""The plain installation, and the extras that users install; those for developers are left out."""

COPYLEFT = re.compile(r"\bA?GPL|LGPL|General Public|proprietary|NVIDIA|unknown", re.IGNORECASE)


def directly(extra: str) -> set[str]:
    """What pyproject.toml asks for, for the plain installation (empty) or by an extra."""
    found = (Requirement(text) for text in distribution("timm_nrpm").requires or ())
    marked = ((each, str(each.marker or "")) for each in found)
    wanted = {each for each, marker in marked if (f'extra == "{extra}"' in marker if extra else "extra" not in marker)}
    names = {canonicalize_name(each.name) for each in wanted} - {"timm-nrpm"}
    inner = {name for each in wanted if canonicalize_name(each.name) == "timm-nrpm" for name in each.extras}
    return names.union(*(directly(name) for name in inner))


def closure(names: set[str]) -> set[str]:
    """These packages and everything that they need here."""
    found: set[str] = set()
    queue = [(name, "") for name in names]
    while queue:
        name, extra = queue.pop()
        if name in found and not extra:
            continue
        try:
            needs = distribution(name).requires or ()
        except PackageNotFoundError:  # for another system
            continue
        found.add(name)
        for each in map(Requirement, needs):
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                inner = canonicalize_name(each.name)
                queue += [(inner, more) for more in ("", *each.extras) if more or inner not in found]
    return found


def licences() -> dict[str, tuple[str, str]]:
    """Version and licence of everything that is installed."""
    command = [sys.executable, "-m", "piplicenses", "--format=json", "--from=mixed", "--with-system"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return {canonicalize_name(row["Name"]): (row["Version"], row["License"]) for row in listed}


def shortened(licence: str) -> str:
    """The first line of a licence, and no more than its name."""
    return licence.strip().splitlines()[0][:60].replace("|", "/").strip() or "unknown"


def page() -> str:
    """The Markdown of all tables."""
    known, lines, seen = licences(), [], set[str]()
    for extra in EXTRAS:
        asked = directly(extra)
        every = closure(asked)
        new = sorted(every - seen)
        seen |= every
        title = f"With `timm_nrpm[{extra}]`" if extra else "The plain installation"
        lines += ["", f"## {title}", ""]
        if not new:
            lines.append("Nothing more.")
            continue
        lines += ["| package | version | licence | asked for |", "|---|---|---|---|"]
        for name in sorted(new, key=lambda each: (each not in asked, each)):
            version, licence = known.get(name, ("", "unknown"))
            lines.append(f"| {name} | {version} | {shortened(licence)} | {'directly' if name in asked else ''} |")
    doubtful = [(name, *known.get(name, ("", "unknown"))) for name in sorted(seen)]
    doubtful = [each for each in doubtful if COPYLEFT.search(each[2])]
    lines += ["", "## Licences to look at", ""]
    lines += [f"- {name} {version}: {shortened(licence)}" for name, version, licence in doubtful] or ["None."]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Dependencies and their licences

What `pip install` brings beside this package, with the versions that were installed where `nox -s licences` wrote this
page, and the licences that the packages state. The same command writes a bill of materials in CycloneDX's format. Why a
package is asked for stands beside its name in `pyproject.toml`. This package itself is under Apache-2.0. NVIDIA's
libraries come with PyTorch's build for its GPUs, which pip takes on Linux; the build for the CPU has none of them.
"""


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/dependencies.md instead of printing it")
    text = INTRODUCTION + page()
    if parser.parse_args().write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
