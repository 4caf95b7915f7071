"""A forward of an architecture, plain and reprogrammed, in a process with limits on its memory and its time."""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_nrpm import NRPMConfig, reprogram_
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.selection import example_of

SIDES = (32, 48, 56, 64, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Sides of images that are tried, in pixels."""

MIXED = 0.9
"""The lambda below 1 at which a model must give other numbers, and finite ones."""

ASLEEP, SPREAD = 1e-3, 0.02
"""Parameters whose numbers all start below the former are drawn anew with the latter as their standard deviation."""

Row = dict[str, Any]


def awaken_(model: nn.Module) -> None:
    """Draw the parameters that start at zero or near it, with which a branch or the whole model would give nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and float(parameter.abs().max()) < ASLEEP:
                parameter.normal_(std=SPREAD)


def compared(plain: nn.Module, images: Tensor) -> Row:
    """What a model gives when it is reprogrammed, beside what it gave before.

    Args:
        plain: A plain model in evaluation mode, which is reprogrammed in place.
        images: A batch of its inputs, `[B, C, H, W]`.

    Returns:
        Whether the plain output is `sound`, that is finite; whether that at lambda 1 is `equal` bit for bit; whether
        that at lambda 0.9 is `finite` and `different`.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ReprogrammingWarning)
        before = plain(images)
        at_one = reprogram_(plain, NRPMConfig(lam=1.0), example=images)(images)
        mixed = reprogram_(plain, NRPMConfig(lam=MIXED), example=images)(images)
    return {
        "sound": bool(before.isfinite().all()),
        "equal": torch.equal(at_one, before),
        "finite": bool(mixed.isfinite().all()),
        "different": not torch.equal(mixed, before),
    }


def smallest(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The smallest image of SIDES that an architecture runs on, found on the meta device, which computes shapes alone.

    Returns:
        Arguments with which timm must create it for that size, and the shape `(C, H, W)` of the image. If no size
        runs, the shape is the architecture's own.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        own = example_of(model)
        assert own is not None
        own_shape = tuple(own.shape[1:])
        for side in SIDES:
            if side >= max(own_shape[1:]):
                break
            shape = (own_shape[0], side, side)
            try:
                return {}, _ran(model, shape)
            except Exception:
                pass
            try:
                return {"img_size": side}, _ran(timm.create_model(name, img_size=side).eval(), shape)
            except Exception:
                pass
    return {}, own_shape


def _ran(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, once the model has run on an image of it."""
    model(torch.zeros(1, *shape))
    return shape


def forward(name: str) -> Row:
    """Build an architecture with random weights, and compare its outputs on two images of the smallest size."""
    start = time.perf_counter()
    options, shape = smallest(name)
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    awaken_(model)
    row = compared(model, torch.randn(2, *shape))
    return {"image": list(shape), "options": options, **row, "seconds": round(time.perf_counter() - start, 1)}


def limited(name: str, memory: int, seconds: float) -> Row:
    """Do what :func:`forward` does in a process of its own.

    Args:
        name: Name of the architecture.
        memory: Most bytes of memory that the process may take.
        seconds: Longest time that it may take.

    Returns:
        What `forward` returns, or why it did not end, as `failed`.
    """
    context = multiprocessing.get_context("fork")  # torch is imported already, which takes seconds
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(name, memory, theirs))
    process.start()
    theirs.close()
    try:
        row: Mapping[str, Any] = ours.recv() if ours.poll(seconds) else {"failed": f"it takes more than {seconds:g} s"}
    except EOFError:
        row = {"failed": "its process was ended by the system, which happens when memory runs out"}
    finally:
        process.kill()
        process.join()
    return dict(row)


def _in_child(name: str, memory: int, answer: Connection) -> None:
    """Send the row of an architecture, or why there is none."""
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, most))
    torch.set_num_threads(1)
    try:
        answer.send(forward(name))
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))  # to say so takes memory, too
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
            answer.send({"failed": f"it needs more than {memory / 2**30:g} GiB of memory"})
        else:
            answer.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
