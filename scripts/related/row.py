"""A measured effect of a related system."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured effect.

    Attributes:
        method: Name of the method.
        base: Model and images.
        measure: Quantity that is measured, with its unit.
        control: What the method is compared with.
        before: Value of the control.
        after: Value of the method.
        effect: The difference with its paired 95 % interval, in words.
        note: What else a reader must know, as a sentence; empty if nothing.
    """

    method: str
    base: str
    measure: str
    control: str
    before: float
    after: float
    effect: str
    note: str = ""

    def __str__(self) -> str:
        values = f"{self.before:.1f} | {self.after:.1f}"
        words = (self.method, self.base, self.measure, self.control, values, self.effect, self.note)
        return f"| {' | '.join(words)} |"
