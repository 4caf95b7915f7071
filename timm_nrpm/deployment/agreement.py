"""Whether an exported file computes what its model computes, as far as float32 can tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from timm_nrpm.deployment.formats import Format, Given
from timm_nrpm.nn.wrappers import copied

Result = TypeVar("Result")

AGREEMENT = 1e-4
"""Largest difference of a file's logits from the model's, in units of the largest logit or of 1 where that is less."""

ROUNDING = 4.0
"""Largest distance of a file's logits from those in float64, in units of the model's own, where they agree less: the
steps of the estimate are steep, and in some calibrated models the rounding of float32 alone moves logits by more."""

MOST = 1e-2
"""Largest difference in any case, in the units of AGREEMENT."""

HINT = "Its number of images may be fixed: try any_batch=False."


@dataclass(frozen=True)
class Agreement:
    """How far the logits of a file are from the model's.

    Attributes:
        difference: Largest difference.
        rounding: Largest difference of the model's own logits from those in float64, where the file agrees less than to
            AGREEMENT; otherwise 0, since nothing was computed in float64.
    """

    difference: float
    rounding: float


def agreement(format: Format, path: Path, given: Given, pixels: bool) -> Agreement:
    """Run a file and its model on the example, and on other images in other numbers where these are free.

    Args:
        format: The format of the file.
        path: The file.
        given: What it was written from.
        pixels: Whether the file takes pixels in [0, 1].

    Raises:
        RuntimeError: The file cannot be run, or computes something else.
    """
    images = given.example
    others = 1 - images if pixels else -images  # other branches and numbers than a trace has seen
    batches = [images, others[:1], torch.cat([others] * 8)[:8]] if given.any_batch else [images, others]
    run = _tried(partial(format.read, path), "The file cannot be read", given.any_batch)
    outputs = [_tried(partial(run, batch), "The file does not run", given.any_batch) for batch in batches]
    found = [_compared(given, batch, output) for batch, output in zip(batches, outputs, strict=True)]
    return Agreement(max(each.difference for each in found), max(each.rounding for each in found))


def _tried(work: Callable[[], Result], failure: str, any_batch: bool) -> Result:
    """What a function of another library returns, whose errors are told in a sentence."""
    try:
        return work()
    except Exception as error:
        said = " ".join(str(error).split())
        hint = f" {HINT}" if any_batch else ""
        raise RuntimeError(f"{failure}: {said[-300:]}. Nothing was written.{hint}") from error


@torch.no_grad()
def _compared(given: Given, batch: Tensor, got: Tensor) -> Agreement:
    """The agreement on one batch, if there is one."""
    want = given.model(batch)
    if want.shape != got.shape:
        raise RuntimeError(f"The file gives {list(got.shape)}, and the model {list(want.shape)}. Nothing was written.")
    difference, scale = _largest(want, got), max(1.0, float(want.abs().max()))
    if difference <= AGREEMENT * scale:
        return Agreement(difference, 0.0)
    own, of_file = _from_exact(given.model, batch, want, got)
    if not (difference <= MOST * scale and of_file <= ROUNDING * own):
        raise RuntimeError(
            f"The file's logits differ from the model's by {difference:.2g} on {len(batch)} images, of logits up to "
            f"{scale:.2g}. In float64 they are {of_file:.2g} from the file's and {own:.2g} from the model's. Nothing "
            "was written."
        )
    return Agreement(difference, own)


def _from_exact(net: nn.Module, batch: Tensor, want: Tensor, got: Tensor) -> tuple[float, float]:
    """Distances of the model's and of the file's logits from those in float64; not a number where there are none."""
    try:
        exact = copied(net).double()(batch.double())
    except Exception:  # a model may cast to float32 inside
        return float("nan"), float("nan")
    return _largest(want, exact), _largest(got, exact)


def _largest(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors, in float64."""
    return float((one.double() - other.double()).abs().max())
