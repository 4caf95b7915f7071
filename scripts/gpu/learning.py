"""What users wait for: an adaptive evaluation, and steps of tuning."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from gpu.session import Session

FEW, MANY = 1, 4  # numbers of tuning steps; the difference of their times leaves out starting and ending a run


def evaluation(session: Session) -> None:
    """Add a row for each adaptive evaluation: its time, its passes and what it leaves."""
    if not find_spec("rich"):
        session.leave_out("the adaptive evaluation", "it draws its progress by rich, which is not installed")
        return
    library = find_spec("torchattacks") is not None
    if not library:
        session.leave_out("the adaptive evaluation under Linf", "torchattacks is not installed: L1 took its place")
    efforts = ("fast",) if session.quick else ("fast", "default")
    count = 4 if session.quick else 180
    with session.attempt("the adaptive evaluation of the digits"):
        session.need(10)
        pixels, labels = _digits(session, count)
        model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.4).eval().to(session.device)
        timm_nrpm.calibrate_(model, [pixels.to(session.device)])
        for effort in efforts:
            with session.attempt(f"the adaptive evaluation of the digits, {effort}"):
                session.need(10)
                _evaluate(
                    session,
                    "resnet8_digits, lambda 0.4",
                    model,
                    (pixels, labels),
                    effort,
                    ("Linf", 0.15) if library else ("L1", 3.0),
                )
    with session.attempt("the adaptive evaluation of a narrow ResNet-18"):
        session.need(10)
        torch.manual_seed(0)
        model = timm_nrpm.create_model("resnet18_cifar_narrow", lam=0.5, iterations=1).eval().to(session.device)
        pixels = torch.rand(2 if session.quick else 100, 3, 32, 32)
        with torch.no_grad():  # with its own answers as labels, every image is there to be attacked
            labels = model(pixels.to(session.device)).argmax(1).cpu()
        name = "resnet18_cifar_narrow with random weights, lambda 0.5, K = 1"
        _evaluate(session, name, model, (pixels, labels), "fast", ("Linf", 8 / 255) if library else ("L1", 12.0))


def _digits(session: Session, count: int) -> tuple[Tensor, Tensor]:
    if find_spec("sklearn"):
        from timm_nrpm.data.loaders import digits

        pixels, labels = digits("test")
        return pixels[:count], labels[:count]
    session.leave_out("the digits themselves", "scikit-learn is not installed: random pixels took their place")
    return torch.rand(count, 1, 8, 8), torch.randint(10, (count,))


def _evaluate(
    session: Session, name: str, model: nn.Module, data: tuple[Tensor, Tensor], effort: str, threat: tuple[str, float]
) -> None:
    tiny: dict[str, Any] = {"steps": 1, "queries": 1} if session.quick else {}
    began = time.perf_counter()
    report = timm_nrpm.evaluate(model, [data], timm_nrpm.Threat(*threat), effort=effort, **tiny)
    session.add("evaluation", **{
        "model": name, "images": len(data[0]), "threat": f"{threat[0]} {threat[1]:.3g}",
        "effort": effort, "s": time.perf_counter() - began,
        "forwards": sum(attack.forwards for attack in report.attacks),
        "backwards": sum(attack.backwards for attack in report.attacks),
        "worst case in %": 100 * report.worst_case,
        "of the plain model in %": 100 * report.control.worst_case if report.control else None,
    })  # fmt: skip


def tuning(session: Session) -> None:
    """Add a row for each kind of tuning: the time of a step, its attack included."""
    for package in ("accelerate", "rich"):
        if not find_spec(package):
            session.leave_out("tuning", f"{package} is not installed")
            return
    if session.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    batch, size = (4, 8) if session.quick else (128, 32)
    cases = {
        "paradigm 2, PGD of seven steps": {"paradigm": "lambda"},
        "paradigm 3, FGSM": {"paradigm": "all", "objective": "fgsm"},
        "paradigm 3, FGSM, bf16": {"paradigm": "all", "objective": "fgsm", "precision": "bf16"},
    }
    for name, settings in list(cases.items())[: 1 if session.quick else 3]:
        with session.attempt(f"tuning, {name}"):
            session.need(8)
            counts = (FEW, FEW, MANY)  # the first run compiles and tunes
            first, few, many = (_tune(settings, batch, size, steps) for steps in counts)
            step = (many - few) / (MANY - FEW)
            session.add("tuning", **{
                "case": f"resnet18_cifar_narrow, {name}, batch {batch}", "ms of a step": 1e3 * step,
                "images/s": batch / step if step > 0 else None, "s of the first run": first,
            })  # fmt: skip


def _tune(settings: dict[str, Any], batch: int, size: int, steps: int) -> float:
    """Seconds of a run of so many steps."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(batch * steps, 3, size, size), torch.randint(10, (batch * steps,)))
    model = timm_nrpm.create_model("resnet18_cifar_narrow", lam=0.5, iterations=3)
    config = timm_nrpm.TuneConfig(**{"epochs": 1, "calibrate": 0, **settings})
    began = time.perf_counter()
    timm_nrpm.tune(model, DataLoader(data, batch_size=batch), config)
    return time.perf_counter() - began
