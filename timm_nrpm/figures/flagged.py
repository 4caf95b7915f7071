"""The flags of reports as a page shows them: those that are raised with their numbers, and those that are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_nrpm.attacks.flags import MEANINGS, NON_FINITE, NUMBERS, RANDOM, THRESHOLDS
from timm_nrpm.evaluation.report import RobustnessReport

PLAIN_NUMBERS = (NON_FINITE, RANDOM)
"""Flags whose number is shown as it is; the numbers of the other flags are shown in percent."""


@dataclass(frozen=True)
class Number:
    """The number behind a flag.

    Attributes:
        flag: Name of the flag.
        value: The number as text; empty if the report has none.
        above: The threshold above which the flag is raised, as text.
        of: What the number counts.
        report: Heading of the report that the number comes from, followed by a colon; empty if there is one report.
    """

    flag: str
    value: str
    above: str
    of: str
    report: str = ""


@dataclass(frozen=True)
class Flag:
    """A raised flag, its meaning, and its number in every report that raises it."""

    name: str
    meaning: str
    numbers: Sequence[Number]


def raised_in(flag: str, named: Mapping[str, RobustnessReport]) -> Flag:
    """A flag with its number in every report that raises it."""
    numbers = []
    for name, report in named.items():
        if flag in report.flags:
            known = flag in report.evidence and flag in THRESHOLDS
            value, above = (_value(flag, n) for n in (report.evidence[flag], THRESHOLDS[flag])) if known else ("", "")
            numbers.append(Number(flag, value, above, NUMBERS.get(flag, ""), f"{name}: " if len(named) > 1 else ""))
    return Flag(flag, MEANINGS.get(flag, "This version of timm_nrpm does not know this flag."), numbers)


def not_raised(reports: Sequence[RobustnessReport]) -> list[Number]:
    """Flags that no report raises, each with the range of its numbers."""
    raised = {flag for report in reports for flag in report.flags}
    numbers = []
    for flag in (flag for flag in THRESHOLDS if flag not in raised):
        values = [report.evidence[flag] for report in reports if flag in report.evidence]
        ends = dict.fromkeys(_value(flag, end(values)) for end in (min, max)) if values else {}
        numbers.append(Number(flag, " to ".join(ends), _value(flag, THRESHOLDS[flag]), NUMBERS[flag]))
    return numbers


def _value(flag: str, number: float) -> str:
    return f"{number:.2g}" if flag in PLAIN_NUMBERS else f"{100 * number:.1f} %"
