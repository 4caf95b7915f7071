"""An extension of griffe, which reads the docstrings for the reference of all functions."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    """Puts docstrings into the form that griffe knows, when each is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """References such as :func:`timm_nrpm.evaluate` become code, and an example a section with code."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub(r"`\1`", obj.docstring.value))
