"""The card and the versions that the numbers depend on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu.session import Session

PACKAGES = ("torch", "triton", "timm", "numpy", "pytest", "accelerate", "rich", "scipy", "scikit-learn", "torchattacks")


def machine(session: Session) -> None:
    """Add one row."""
    row = {"gpu": "cpu", "python": platform.python_version(), "cores": os.cpu_count()}
    if session.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        capability = f"{card.major}.{card.minor}"
        row |= {"gpu": torch.cuda.get_device_name(0), "multiprocessors": card.multi_processor_count}
        row |= {"compute capability": capability, "GiB": round(card.total_memory / 2**30), "cuda": torch.version.cuda}
        row["highest clock, power limit, driver"] = _smi("clocks.max.sm,power.limit,driver_version")
    for package in PACKAGES:
        try:
            row[package] = version(package)
        except PackageNotFoundError:
            row[package] = "not installed"
    session.add("machine", **row)
    torch.ones(8, device=session.device).sum().item()  # the device works at all


def _smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"
