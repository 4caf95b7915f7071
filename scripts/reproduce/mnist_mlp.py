"""Tables 1 and 2 of the paper (arXiv 2410.04577): three paradigms on the published MNIST MLP, and what they are worth.

    python scripts/reproduce/mnist_mlp.py --weights mlp3_mnist_model.pth --root DATA    # half an hour on two cores

DATA holds MNIST in torchvision's layout. Writes results/mnist-mlp.json, .md and .png; a run that was interrupted goes on.

The paper's protocol is FGSM on the model's own gradient, K = 1. Beside it stands the worst case, image by image, of FGSM
and PGD on the own gradient and PGD from the plain model; and beside the paradigms their control, the plain model tuned
just as long under the same attack.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, TuneConfig, evaluate, lambdas, reprogram_, tune
from timm_nrpm.backbones import load_published_
from timm_nrpm.data import pixel_loader

RESULTS = Path(__file__).parents[2] / "results"
BUDGETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
LAMBDAS = tuple(i / 10 for i in range(10, -1, -1))
K, EPS, START = 1, 5e-5, 0.5  # the paper's K; its code's eps; its first lambda
STEPS = 10  # of PGD in the worst case

# One setting for every budget. Lambda moves slowly, since the cross-entropy of images that are lost in any case falls
# with the logits, and so with lambda, without end.
PARADIGM_2: dict[str, Any] = {"paradigm": "lambda", "lam_lr": 0.002}
PARADIGM_3: dict[str, Any] = {"paradigm": "all", "optimizer": "adamw", "lr": 0.001, "lam_lr": 0.0005}
CONTROL = {**PARADIGM_3, "trainable": ("*.weight", "*.bias")}
UNSTABLE: dict[str, Any] = {"paradigm": "all", "optimizer": "sgd", "lr": 0.02, "lam_lr": 0.02, "epochs": 5, "patience": 20}

PAPER = {
    "paradigm 1": {
        1.0: (90.8, 31.8, 2.6, 0.0, 0.0, 0.0, 0.0), 0.9: (90.8, 56.6, 17.9, 8.5, 4.6, 3.0, 2.3),
        0.8: (90.4, 67.1, 30.8, 17.4, 10.6, 6.5, 4.5), 0.7: (89.7, 73.7, 43.5, 25.5, 16.9, 11.7, 9.2),
        0.6: (88.1, 75.3, 49.0, 31.0, 22.0, 15.5, 12.4), 0.5: (84.1, 74.4, 50.0, 31.9, 22.8, 18.1, 14.3),
        0.4: (78.8, 70.4, 48.3, 33.9, 24.1, 18.4, 14.6), 0.3: (69.5, 62.6, 45.2, 31.5, 23.1, 19.0, 15.5),
        0.2: (58.5, 53.2, 38.2, 27.6, 22.2, 16.4, 12.9), 0.1: (40.7, 38.3, 29.7, 22.8, 16.8, 12.9, 11.1),
        0.0: (18.8, 17.6, 16.4, 14.6, 12.4, 10.7, 9.4),
    },
    "paradigm 2": (81.5, 75.3, 61.2, 44.7, 33.7, 26.0, 20.1),
    "paradigm 3": (86.1, 81.7, 75.8, 66.7, 58.7, 50.1, 39.8),
    "control": (76.4, 66.0, 57.6, 46.9, 35.0, 23.0, 9.1),
    "mean learned lambda": (0.794, 0.775, 0.659, 0.542, 0.407, 0.288, 0.208),
}  # fmt: skip

Row = dict[str, Any]


class Study:
    """Rows of numbers, each measured once and kept in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, args.out / "mnist-mlp.json"
        self.settings: Row = {"images": args.images, "samples": args.samples, "epochs": args.epochs, "seed": 0, "K": K,
                              "eps": EPS, "steps": STEPS, "first lambda": START, "paradigm 2": PARADIGM_2,
                              "paradigm 3": PARADIGM_3, "control": CONTROL}  # fmt: skip
        self.settings = json.loads(json.dumps(self.settings))
        self.rows: Row = {}
        if self.file.exists():
            kept = json.loads(self.file.read_text())
            self.rows = kept["rows"] if kept["settings"] == self.settings else {}
        self.test = pixel_loader("torch/mnist", args.root, split="test", input_size=(1, 28, 28), batch_size=250)
        images = list(self.test)[: args.images // 250]  # the first, as the paper's tables have it
        self.test = images  # type: ignore[assignment]

    def model(self, lam: float, eps: float = EPS, iterations: int = K) -> torch.nn.Module:
        plain = load_published_(timm.create_model("mlp3_mnist"), self.args.weights)
        return reprogram_(plain, NRPMConfig(lam=lam, iterations=iterations, eps=eps)).eval()

    def measured(self, model: torch.nn.Module) -> Row:
        """Accuracies in % at every budget, the first of them clean."""
        reports = [evaluate(model, self.test, Threat("Linf", eps), steps=STEPS) for eps in BUDGETS[1:]]
        clean = 100 * reports[0].accuracy("clean")
        return {
            "lambda": [round(lam, 4) for lam in lambdas(model).values()],
            "fgsm": [round(x, 1) for x in (clean, *(100 * r.accuracy("fgsm") for r in reports))],
            "worst case": [round(x, 1) for x in (clean, *(100 * r.worst_case for r in reports))],
        }

    def tuned(self, lam: float, eps: float, settings: Row, **reprogramming: Any) -> Row:
        """Tuned under FGSM of size `eps`, then measured."""
        model = self.model(lam, **reprogramming)
        options = {"samples": self.args.samples, "training": True, "batch_size": 128}
        loader = pixel_loader("torch/mnist", self.args.root, split="train", model=model, **options)
        config = TuneConfig(**{"objective": "fgsm", "eps": eps, "epochs": self.args.epochs, **settings})
        try:
            history = tune(model, loader, config)
        except timm_nrpm.Diverged as error:
            return {"diverged": str(error)}
        steps = history.steps
        return {
            **self.measured(model),
            "skipped steps": sum(row.skipped for row in steps),
            "largest norm": max((row.norm[1] for row in steps if row.norm[1] is not None), default=None),
            "loss": [steps[0].loss, steps[-1].loss],
        }

    def plan(self) -> dict[str, Callable[[], Row]]:
        """Every row, by name."""
        plan: dict[str, Callable[[], Row]] = {}
        for lam in LAMBDAS:
            plan[f"paradigm 1, {lam}"] = lambda lam=lam: self.measured(self.model(lam))  # type: ignore[misc]
        for name, lam, settings in (
            ("paradigm 2", START, PARADIGM_2),
            ("paradigm 3", START, PARADIGM_3),
            ("control", 1.0, CONTROL),
        ):
            for eps in BUDGETS:
                plan[f"{name}, {eps}"] = lambda a=(lam, eps, settings): self.tuned(*a)  # type: ignore[misc]
        steep = {"eps": 1e-3, "iterations": 3}
        for clip in (1.0, None):
            plan[f"steep, clip {clip}"] = lambda c=clip: self.tuned(START, 0.1, {**UNSTABLE, "clip": c}, **steep)  # type: ignore[misc]
        return plan

    def run(self, only: str) -> None:
        """Whatever rows are missing."""
        missing = {name: work for name, work in self.plan().items() if name not in self.rows and name.startswith(only)}
        for name in track(missing, "Measuring"):
            self.rows[name] = missing[name]()
            if self.file.exists():  # another process may fill other rows
                kept = json.loads(self.file.read_text())
                self.rows = {**(kept["rows"] if kept["settings"] == self.settings else {}), name: self.rows[name]}
            versions = {"torch": torch.__version__, "timm": timm.__version__, "timm_nrpm": timm_nrpm.__version__}
            machine = {"cpu": platform.machine(), "threads": torch.get_num_threads(), **versions}
            content = {"settings": self.settings, "machine": machine, "budgets": BUDGETS, "rows": self.rows}
            draft = self.file.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(content, indent=1) + "\n")
            draft.replace(self.file)

    def best(self, name: str, kind: str = "fgsm") -> list[float]:
        """Of paradigm 1, the best lambda of each budget; of what was tuned, the model tuned at that budget."""
        if name == "paradigm 1":
            return [max(self.rows[f"{name}, {lam}"][kind][i] for lam in LAMBDAS) for i in range(len(BUDGETS))]
        return [self.rows[f"{name}, {eps}"][kind][i] for i, eps in enumerate(BUDGETS)]
