"""Whole models beside the plain ones: a forward pass, a training step, their memory, bf16 autocast and CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_nrpm
from gpu.session import Session, Work

LAM = 0.5


def models(session: Session) -> None:
    large = ("resnet18_cifar_narrow", 8, (2,)) if session.quick else ("resnet50", 224, (32, 64))
    small = (("resnet8_digits", 1, 8), ("resnet18_cifar_narrow", 3, 32))
    name, size, batches = large
    for precision in ("float32", "bf16 autocast"):
        _large(session, name, size, batches[0], precision)
    for name_of_small, channels, side in small[: 1 if session.quick else 2]:
        if session.device != "cuda":
            session.leave_out(f"{name_of_small} as a CUDA graph", "there is no GPU")
        with session.attempt(f"{name_of_small} with and without a CUDA graph"):
            session.need(10)
            _small(session, name_of_small, (2 if session.quick else 64, channels, side, side))
    for batch in batches[1:]:
        for precision in ("float32", "bf16 autocast"):
            _large(session, name, size, batch, precision)


def _pair(name: str, device: str) -> dict[str, nn.Module]:
    """The reprogrammed model and the plain one."""
    made = {"ours": timm_nrpm.create_model(name, lam=LAM), "plain": timm.create_model(name)}
    return {kind: model.to(device) for kind, model in made.items()}


def _autocast(session: Session, precision: str) -> Any:
    return torch.autocast(session.device, torch.bfloat16) if precision.startswith("bf16") else nullcontext()


def _large(session: Session, name: str, size: int, batch: int, precision: str) -> None:
    """Add rows of a forward pass and of a training step."""
    for step in ("forward", "training step"):
        with session.attempt(f"{name}, batch {batch}, {step}, {precision}"):
            session.need(15)
            x = torch.randn(batch, 3, size, size, device=session.device)
            works = {
                kind: (_forward if step == "forward" else _training)(session, model, x, precision)
                for kind, model in _pair(name, session.device).items()
            }
            first = session.first_call(works["ours"])
            seconds = session.medians(works, 2.0)
            memory = {kind: session.peak_mib(work) for kind, work in works.items()}
            session.add("models", **{
                "model": f"{name}, {size}x{size}, batch {batch}", "step": step, "precision": precision,
                "ms": 1e3 * seconds["ours"], "ms of the plain model": 1e3 * seconds["plain"],
                "times the plain model": seconds["ours"] / seconds["plain"], "images/s": batch / seconds["ours"],
                "MiB": memory["ours"], "MiB of the plain model": memory["plain"],
                "s of the first call, compiled ahead": first,
            })  # fmt: skip


def _forward(session: Session, model: nn.Module, x: Tensor, precision: str) -> Work:
    model.eval()

    def forward() -> None:
        with torch.no_grad(), _autocast(session, precision):
            model(x)

    return forward


def _training(session: Session, model: nn.Module, x: Tensor, precision: str) -> Work:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        with _autocast(session, precision):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _small(session: Session, name: str, shape: tuple[int, ...]) -> None:
    """Add rows of a small model, whose time goes to starting kernels: as called, and as a CUDA graph."""
    for step in ("forward", "gradient of the pixels"):
        row: dict[str, Any] = {"model": f"{name}, {shape[2]}x{shape[3]}, batch {shape[0]}", "step": step}
        for kind, model in _pair(name, session.device).items():
            work = _on_pixels(model.eval().requires_grad_(False), torch.rand(shape, device=session.device), step)
            works = {f"ms, {kind}": work}
            work()  # compiles and tunes
            if session.device == "cuda":
                with session.attempt(f"{name}, {step}, {kind}, as a CUDA graph"):
                    works[f"ms as a graph, {kind}"] = session.graphed(work)
            row |= {key: 1e3 * seconds for key, seconds in session.medians(works, 0.6).items()}
        session.add("graphs", **row)


def _on_pixels(model: nn.Module, x: Tensor, step: str) -> Work:
    x.requires_grad_(step != "forward")

    def work() -> Tensor:
        if step == "forward":
            with torch.no_grad():
                return model(x)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    return work
