"""Evaluations that are kept, so that a measurement that was stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from timm_nrpm import RobustnessReport, Threat, evaluate
from timm_nrpm.evaluation.trials import digits_of

Batches: TypeAlias = "list[tuple[Tensor, Tensor]]"


def batches(pixels: Tensor, labels: Tensor, size: int = 100) -> Batches:
    """Images `[N, C, H, W]` and labels `[N]` in batches."""
    return list(zip(pixels.split(size), labels.split(size), strict=True))


def evaluated(
    file: Path, model: nn.Module, images: Batches, threat: Threat, suite: str = "adaptive", effort: str = "fast"
) -> RobustnessReport:
    """The report of an evaluation without a control, from the file if it is there; `effort` is the adaptive suite's."""
    if not file.exists():
        effort = effort if suite == "adaptive" else "default"
        torch.manual_seed(0)
        report = evaluate(model, images, threat, suite, effort=effort, control=False, progress=True, resume=f"{file}l")
        file.write_text(report.to_json())
    return RobustnessReport.from_json(file.read_text())


def judged(file: Path, model: nn.Module, images: Batches, threat: Threat) -> tuple[str, str]:
    """The images that a model is right on, clean and in the worst case, a digit for each."""
    report = evaluated(file, model, images, threat)
    return digits_of(report.correct), digits_of(report.survivors)


def along_its_gradient(file: Path) -> str:
    """The images that PGD along a model's own gradient left of an evaluation that is kept, a digit for each."""
    report = RobustnessReport.from_json(file.read_text())
    survived = next(attack.survived for attack in report.attacks if attack.name == "pgd")
    return digits_of(each is True for each in survived)
