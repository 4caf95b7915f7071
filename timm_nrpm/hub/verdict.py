"""The sentence that a card begins with: what the evaluations of a model come to, and whether they are flagged."""

from __future__ import annotations

from collections.abc import Sequence

from timm_nrpm.evaluation.report import NAMES, RobustnessReport


def verdict(reports: Sequence[RobustnessReport]) -> str:
    """What some reports on one model come to: a sentence, and one more where they raise flags.

    Args:
        reports: The reports, one for each threat.

    Example:
        >>> verdict([])
        'Not evaluated: neither its robustness nor its accuracy is known.'
        >>> verdict([report]).startswith(report.verdict)
        True
    """
    if not reports:
        return "Not evaluated: neither its robustness nor its accuracy is known."
    flags = dict.fromkeys(flag for report in reports for flag in report.flags)
    raised = f" Flagged, see below: {', '.join(f'`{flag}`' for flag in flags)}." if flags else ""
    if len(reports) == 1:
        return f"{reports[0].verdict}{raised}"
    *most, last = map(_part, reports)
    return f"This model keeps {'; '.join(most)}; and {last}.{raised}"


def _part(report: RobustnessReport) -> str:
    """The part of the sentence on one threat."""
    beside = NAMES[report.plain]
    words = {
        None: "nothing stands beside it",
        "": f"no difference from {beside} can be told",
        "better": f"better than {beside}",
        "worse": f"worse than {beside}",
    }
    kept = f"{100 * report.worst_case:.1f} % of {report.samples} images {report.where} at {report.threat}"
    return f"{kept} ({words[report.comparison]})"
