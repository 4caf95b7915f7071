"""The common part of Tables 9 and 10: LeNet, plain and reprogrammed, on one dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiment import Claim, Experiment, Measured, Row
from lab import Lab

LAM = 0.3  # the default of the authors' code for LeNet
TUNE: dict[str, Any] = {"paradigm": "all", "objective": "clean", "optimizer": "adamw", "lr": 0.001, "lam_lr": 0.0005}


def plain_and_tuned(
    lab: Lab, key: str, title: str, family: str, name: str, columns: Sequence[str], paper: Mapping[str, Sequence[float]]
) -> Experiment:
    """Return a table of two rows: LPM, trained naturally, and NRPM, reprogrammed and fine-tuned on clean images."""

    def row(reprogrammed: bool) -> Measured:
        if not reprogrammed:
            return lab.measured(family, lab.plain(family, name))
        return lab.measured(family, lab.tuned(family, lab.reprogrammed(family, name, LAM), TUNE))

    effort = lab.efforts[family]
    why = f"trained for {effort.epochs} epochs on {effort.samples or 'all'} images"
    rows = [Row(model, lambda m=model: row(m.startswith("NRPM")), numbers, why=why) for model, numbers in paper.items()]  # type: ignore[misc]
    lpm, nrpm = paper
    claim = Claim(
        "NRPM beats LPM at every budget", lambda r: all(a > b for a, b in zip(r[nrpm][1:], r[lpm][1:], strict=True))
    )
    return Experiment(
        key, f"LeNet on {title}, PGD-20", (family,), columns, rows, (claim,), settings={"lambda": LAM, "tuning": TUNE},
        about=f"{lab.described(family)} Trained naturally; NRPM has its convolutions at lambda {LAM:g} to begin with, "
        "K = 1, eps = 1e-3, and is fine-tuned on clean images (paradigm 3). The attack takes steps of 2/255.",
    )  # fmt: skip
