"""What a reader of a page may do next, which depends on what its reports say."""

from __future__ import annotations

from collections.abc import Sequence

from timm_nrpm.attacks.flags import CLIMBING, FLAT, PLAIN_CHANGED, UNBOUNDED
from timm_nrpm.evaluation.report import SIGNIFICANT, RobustnessReport

TOO_WEAK = (CLIMBING, FLAT, UNBOUNDED)
"""Flags that say that the attacks were too weak for this model, so that stronger ones would leave less."""


def next_steps(reports: Sequence[RobustnessReport]) -> list[str]:
    """Return what to do next, in sentences, the most urgent first.

    Args:
        reports: The reports of a page.

    Example:
        >>> next_steps([report])[-1]
        'Quote the worst case with its interval, and never the accuracy along the own gradient alone.'
    """
    steps = []
    if any(report.suite != "adaptive" for report in reports):
        steps.append("Run the suite adaptive (--suite adaptive): only its result counts as a worst case.")
    if any(report.control is None for report in reports):
        steps.append("If this model is reprogrammed, evaluate it without --no-control: alone, it shows no gain.")
    flags = {flag for report in reports for flag in report.flags}
    if flags & set(TOO_WEAK):
        steps.append("Run longer attacks (--effort exhaustive): a flag says that these were too weak for the model.")
    if PLAIN_CHANGED in flags:
        steps.append("Give the model that this one was made from (base= in Python), so that the two can be compared.")
    if flags:
        steps.append("Read what each flag means and what to do about it: docs/flags.md.")
    if any(report.p_value is not None and report.p_value > SIGNIFICANT for report in reports):
        steps.append("Take more images (--samples) if the difference matters: these cannot tell the two models apart.")
    return [*steps, "Quote the worst case with its interval, and never the accuracy along the own gradient alone."]
