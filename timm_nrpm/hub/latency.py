"""What a forward costs, beside the plain model, as a card says it: measured, or estimated without running the model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import timm_nrpm.models.registry  # noqa: F401, which adds the bundled model to those of timm
from timm_nrpm.evaluation.cost import cost
from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.hub.templates import Metadata
from timm_nrpm.models.format import Variant
from timm_nrpm.models.loading import with_random_weights

COST = "cost.json"
"""The file with the cost behind a card, and the hash of the model that it is of."""


def estimated(source: nn.Module | Variant, image_size: Sequence[int] | None = None) -> CostReport | None:
    """The estimated cost of a forward of one image on this machine; None for a model that cannot be estimated, such as
    one that does not say what images it takes.

    The first call in a process measures the machine in one thread, for about two seconds; a model is not run but in its
    plain form, once. Random numbers are afterwards what they were.

    Args:
        source: A reprogrammed model or an ensemble; or the contents of a variant, whose weights do not matter.
        image_size: Shape of an image, `(C, H, W)`; by default that of timm's model.

    Example:
        >>> estimated(model).slowdown > 1
        True
    """
    with torch.random.fork_rng(devices=[]):
        try:
            model = with_random_weights(source, "this folder") if isinstance(source, Variant) else source
            return cost(model, image_size)
        except Exception:  # a model that cannot be estimated, such as one in half precision on a CPU, can be published
            return None


def write_cost(report: CostReport | None, model: str, folder: Path) -> None:
    """Write the cost behind a card to its folder; without one, the file goes.

    Args:
        report: The cost of the model.
        model: Hash of the model, as reports of an evaluation have it.
        folder: Folder of the card.
    """
    if report is None:
        (folder / COST).unlink(missing_ok=True)
    else:
        (folder / COST).write_text(json.dumps({"model": model, "cost": json.loads(report.to_json())}) + "\n")


def parse_cost(text: str | None, model: str) -> CostReport | None:
    """The cost in a text that :func:`write_cost` wrote; None if there is none, or it is not of the model of this hash.

    Anything else than such a text counts as none, since a cost can be estimated again.
    """
    try:
        content = json.loads(text or "null")
        found = CostReport.from_json(json.dumps(content["cost"]))
        return found if content["model"] == model and math.isfinite(found.slowdown) else None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def read_cost(folder: Path, model: str) -> CostReport | None:
    """The cost in a folder, see :func:`parse_cost`."""
    path = folder / COST
    return parse_cost(path.read_text(encoding="utf-8"), model) if path.is_file() else None


def timed(report: CostReport | None, beside: str) -> Metadata:
    """The values of the variables in the part on latency.

    Args:
        report: The cost of a forward, if it is known.
        beside: The model that it is compared with, in words.
    """
    if report is None:
        return {"time": None}
    device, threads = report.machine.device.upper(), report.machine.threads
    on = f"{threads} thread{'s' * (threads != 1)} of a {device}" if report.machine.device == "cpu" else f"a {device}"
    measured = report.measured
    ours, plain = (
        (report.seconds, report.plain_seconds) if measured is None else (measured.seconds, measured.plain_seconds)
    )
    return {
        "time": f"{1e3 * ours:.3g} ms",
        "plain_time": f"{1e3 * plain:.3g} ms",
        "times": f"{ours / plain:.1f}",
        "measured": measured is not None,
        "machine": f"{on} ({report.machine.name})" if report.machine.name else on,
        "images": f"{report.batch} image{'s' * (report.batch != 1)} of {'x'.join(map(str, report.image))}",
        "products": f"{report.products / 1e6:.3g}",
        "estimates": sum(layer.estimated for layer in report.layers),
        "counted": len(report.layers),
        "timed_beside": beside,
    }
