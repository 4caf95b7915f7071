"""The numbers that a card gives to the Hub's own tables, where no flag and no caveat stands beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from huggingface_hub import EvalResult

from timm_nrpm.attacks.flags import COMPARISON
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.templates import Metadata, own_accuracy, percent


def evaluated(name: str, reports: Sequence[RobustnessReport]) -> Metadata:
    """Metadata of what was measured of the model in a repository `owner/name`; empty without reports.

    Each number says in its name what it is, since it is read without the card. The worst case comes first. Where a flag
    says that accuracies under attack are too high, the worst case names the flag, and the accuracy along the model's
    own gradient is left out. What a suite leaves that is not adaptive is not called the worst case.
    """
    if not reports:
        return {}
    results: list[EvalResult] = []
    for result in (result for report in reports for result in _results_of(report)):
        if result not in results:  # several threats have one clean accuracy
            results.append(result)
    return {"model_name": name.rpartition("/")[2], "eval_results": results}


def _results_of(report: RobustnessReport) -> list[EvalResult]:
    """The numbers of one report."""
    data = report.data or "unnamed images"
    kind = re.sub(r"[^\w.-]+", "-", data.partition(",")[0].strip()).lower()
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=kind,
            dataset_name=data,
            metric_type="accuracy",
            metric_name=label,
            metric_value=float(percent(share)),
        )
        for label, share in _metrics(report).items()
    ]


def _metrics(report: RobustnessReport) -> dict[str, float]:
    """The shares of the images that are right, by the name of the metric."""
    doubts = [flag for flag in report.flags if flag not in COMPARISON]
    images = f"{report.threat}, {report.samples} images"
    about = f"{images}, flagged {' '.join(doubts)}, %" if doubts else f"{images}, %"
    if report.suite == "adaptive":
        headline = f"worst-case accuracy, {about}"
    else:
        headline = f"accuracy under all attacks of the suite {report.suite}, which is no worst case, {about}"
    metrics = {headline: report.worst_case, f"clean accuracy, {report.samples} images, %": report.clean}
    own = own_accuracy(report)
    if own is not None and not doubts:
        metrics[f"accuracy under PGD along the model's own gradient alone, no worst case, {images}, %"] = own
    return metrics
