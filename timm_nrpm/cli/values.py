"""Values of options, as one types them."""

from __future__ import annotations

import argparse
import math
from fractions import Fraction


def number(text: str) -> float:
    """A number, also as a fraction, 8/255."""
    try:
        value = float(Fraction(text) if "/" in text else text)  # a fraction of 1e999999999 would not end
        if math.isfinite(value):
            return value
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number, such as 0.03 or 8/255")


def number_or_none(text: str) -> float | None:
    """A number, or none."""
    return None if text.lower() == "none" else number(text)


def number_or_auto(text: str) -> float | str:
    """A number, or auto."""
    return "auto" if text.lower() == "auto" else number(text)
