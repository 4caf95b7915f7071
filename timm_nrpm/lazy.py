"""Lazy import of submodules, so that `import timm_nrpm` is light and every dotted path works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType


def modules_of(package: str, *places: str) -> Callable[[str], ModuleType]:
    """A package's `__getattr__` (PEP 562), which finds its modules.

    Args:
        package: Name of the package, its `__name__`.
        places: Names of further packages that are searched for a module, in this order.

    Returns:
        A function that maps the name of a module to the module, and raises AttributeError if there is none.

    Example:
        >>> modules_of("timm_nrpm.attacks")("flags")
        <module 'timm_nrpm.attacks.flags' from '...'>
    """

    def find(name: str) -> ModuleType:
        if name.isidentifier() and not name.startswith("_"):
            for place in (package, *places):
                if find_spec(f"{place}.{name}"):
                    return import_module(f"{place}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def is_command() -> bool:
    """Whether this process runs the command `timm-nrpm` or `python -m timm_nrpm.cli`, rather than a user's program."""
    script = any(Path(word).stem == "timm-nrpm" for word in sys.orig_argv[:2])
    return script or ("-m", "timm_nrpm.cli") in pairwise(sys.orig_argv)
