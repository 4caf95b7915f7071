"""Checks of arguments, one function for each kind: a number, an integer, one of several words.

Each returns the plain Python value, so that settings can be compared, hashed and written as JSON whichever library a
number came from, or raises a ValueError that says what was given and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    why: str = "",
) -> float:
    """A finite number within its bounds, as a float.

    Args:
        name: Name of the argument in the error message.
        value: Any real number, including those of NumPy and torch, such as a tensor without dimensions; a boolean is
            refused.
        least, most: The smallest and the largest allowed value.
        above, below: Exclusive bounds: the value must be larger than `above` and smaller than `below`.
        why: Text that the error message adds to the range, such as a unit or an example.

    Raises:
        ValueError: `value` is not a finite number within the bounds.

    Example:
        >>> check_number("eps", np.float32(0.5), above=0)
        0.5
        >>> check_number("eps", 0, above=0, why=", in pixel units of [0, 1]")
        Traceback (most recent call last):
            ...
        ValueError: eps=0 is not allowed: give a number > 0, in pixel units of [0, 1].
    """
    plain = _plain(value, Real)
    try:
        number = math.nan if plain is None else float(plain)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if math.isfinite(number) and least <= number <= most and above < number < below:
        return number
    raise _refused(name, value, "number", least, most, above, below, why)


def check_integer(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf, why: str = "") -> int:
    """An integer within its bounds, as an int; the arguments are those of :func:`check_number`.

    Example:
        >>> check_integer("steps", np.int64(20), least=1)
        20
        >>> check_integer("steps", 1.5, least=1)
        Traceback (most recent call last):
            ...
        ValueError: steps=1.5 is not allowed: give an integer >= 1.
    """
    number = _plain(value, Integral)
    if number is not None and least <= number <= most:
        return int(number)
    raise _refused(name, value, "integer", least, most, -math.inf, math.inf, why)


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of the allowed words, or raise a ValueError that lists them.

    Example:
        >>> check_choice("norm", "L7", ("Linf", "L2"))
        Traceback (most recent call last):
            ...
        ValueError: norm='L7' is not known: choose one of Linf, L2.
    """
    allowed = tuple(allowed)
    if isinstance(value, str) and value in allowed:
        return value
    raise ValueError(f"{name}={shown(value)} is not known: choose one of {', '.join(allowed)}.")


def check_names(name: str, values: Iterable[str]) -> tuple[str, ...]:
    """Several names, as a tuple; one text is refused, since its letters would be taken for names.

    Example:
        >>> check_names("tags", ["digits"])
        ('digits',)
        >>> check_names("tags", "digits")
        Traceback (most recent call last):
            ...
        ValueError: tags='digits' is not allowed: give a list of names, each one line of text.
    """
    names = () if isinstance(values, str) else tuple(values)
    if isinstance(values, str) or not all(
        isinstance(each, str) and each.strip() and each.isprintable() for each in names
    ):
        raise ValueError(f"{name}={shown(values)} is not allowed: give a list of names, each one line of text.")
    return names


def shown(value: Any) -> str:
    """The repr of a value for an error message: on one line, and shortened if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: Any, kind: type) -> Any:
    """The Python number in `value`, a number of this kind or an array without dimensions; None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _refused(
    name: str, value: Any, kind: str, least: float, most: float, above: float, below: float, why: str
) -> ValueError:
    """The error for a number outside its range, which the message names."""
    article = "an" if kind == "integer" else "a"
    if least > -math.inf and most < math.inf:
        allowed = f" from {least:g} to {most:g}"
    else:
        bounds = ((">=", least), (">", above), ("<=", most), ("<", below))
        allowed = " and".join(f" {sign} {bound:g}" for sign, bound in bounds if math.isfinite(bound))
    return ValueError(f"{name}={shown(value)} is not allowed: give {article} {kind}{allowed}{why}.")


def printable(text: str) -> str:
    """Text of unknown origin with its unprintable characters escaped, since they could control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
