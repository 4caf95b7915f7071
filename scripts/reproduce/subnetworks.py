"""The second paper (arXiv 2307.03803): Tables 1 and 3 and the figures of Algorithm 1, on CIFAR-10.

    python scripts/reproduce/subnetworks.py --data DATA --checkpoints CHECKPOINTS --kept FOLDER   # an hour on two cores
    python scripts/reproduce/subnetworks.py --kept FOLDER --full                                   # for a GPU
    python scripts/reproduce/subnetworks.py --kept FOLDER --page                                   # only the page

A run that was stopped goes on; with `--late` several processes may share FOLDER, each with other late parts, once one
of them has trained the natural and the robust network. Writes results/subnetworks.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab import Lab
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_nrpm import NRPMConfig, TuneConfig, plot, reprogram_, restore_, tune
from timm_nrpm.evaluation.subnetwork_report import SYMBOLS, SubnetworkReport
from timm_nrpm.subnetworks.semirobust import semirobust

ROOT = Path(__file__).parents[2]
EPS, STEPS = 8 / 255, 10
LATE = (4, 12)

PAPER = {
    4: {"clean": (86.4, 69.7, 67.7, 71.4), "fgsm": (6.21, 43.1, 34.4, 41.3), "pgd": (0.0, 38.5, 29.8, 36.5),
        "autoattack": (None, 39.45, 32.12, 39.57)},
    12: {"clean": (86.4, 69.7, 62.5, 66.3), "fgsm": (6.21, 43.1, 22.5, 38.1), "pgd": (0.0, 38.5, 16.9, 33.7),
         "autoattack": (None, 39.45, 16.6, 40.13)},
}  # fmt: skip
"""ResNet-18 on CIFAR-10 in Tables 1 and 3, in %: F, F*, the robust early part with the natural late one, and tuned."""


@dataclass(frozen=True)
class Effort:
    """How much is trained and measured.

    Attributes:
        name: Name of the network.
        samples: Number of training images; None for all.
        epochs: Number of epochs of F*.
        trials, late_epochs: Numbers of trials, and of epochs of each.
        images: Number of images to choose on, and as many to compare on.
    """

    name: str
    samples: int | None
    epochs: int
    trials: int
    late_epochs: int
    images: int


QUICK = Effort("resnet18_cifar_narrow", 5000, 6, 2, 4, 200)
FULL = Effort("resnet18_cifar", None, 120, 5, 10, 1000)


def natural(lab: Lab, effort: Effort) -> nn.Module:
    """F, trained on clean images."""
    if lab.mode == "quick":
        lab.efforts = {**lab.efforts, "resnet": replace(lab.efforts["resnet"], samples=25_000, epochs=8)}
    return lab.trained("resnet", effort.name, {"objective": "clean", "eps": 0.0})


def measure(lab: Lab, effort: Effort, late: int, folder: Path) -> SubnetworkReport:
    """Run Algorithm 1 for a late part of some layers."""
    pixels, labels = lab.images("cifar10", "test", 2 * effort.images)
    order = range(0, len(labels), 2), range(1, len(labels), 2)  # both parts have all classes
    selection, report = (DataLoader(TensorDataset(pixels[list(rows)], labels[list(rows)]), 100) for rows in order)
    return semirobust(
        natural(lab, effort), training_of(lab, effort), selection, report, late, robust=robust(lab, effort),
        config=config_of(effort), trials=effort.trials, epochs=effort.late_epochs, folder=folder, progress=True,
    )  # fmt: skip


def config_of(effort: Effort) -> TuneConfig:
    """Settings of adversarial training."""
    return TuneConfig(
        paradigm="all", eps=EPS, steps=STEPS, evaluate_steps=STEPS, epochs=effort.epochs, optimizer="momentum", lr=0.01
    )


def training_of(lab: Lab, effort: Effort) -> DataLoader[Any]:
    """The training images."""
    return lab.loader("cifar10", "train", training=True, batch_size=128, samples=effort.samples)


def robust(lab: Lab, effort: Effort) -> nn.Module:
    """F*, trained on from F under PGD; all late parts share it."""
    model = reprogram_(natural(lab, effort), NRPMConfig(lam=1.0))
    config = replace(
        config_of(effort), trainable=("*.weight", "*.bias"), output=str(lab.kept / f"robust-{effort.name}"),
        checkpoint_every=20, keep=1,
    )  # fmt: skip
    tune(model.to(lab.device), training_of(lab, effort), config, resume=True, progress=True)
    return restore_(model).eval()


def markdown(reports: dict[int, SubnetworkReport], effort: Effort) -> str:
    """The page of the results."""
    lines = [
        "# Semirobust subnetworks: Algorithm 1 on CIFAR-10", "",
        f"`{effort.name}`, Linf {EPS * 255:g}/255, PGD with {STEPS} steps in training. F is trained on clean images, "
        f"and F* from F for {effort.epochs} epochs on {effort.samples or 50_000} images. The late part has the weights "
        f"of F again, and is tuned alone, at most {effort.late_epochs} epochs, until PGD leaves at most a point fewer "
        f"of {effort.images} images than of F*. The table is of {effort.images} other images, in %; the paper's "
        "numbers, in brackets, are of a ResNet-18 eight times as wide, trained for 120 epochs on ten times as many "
        "images, and the paper ends and compares trials on the same images.", "",
    ]  # fmt: skip
    for late, report in sorted(reports.items()):
        lines += [f"## The last {late} layers of 18", "", report.verdict, ""]
        names = " | ".join(SYMBOLS.values())
        lines += [f"| | {names} | last from A(F*), 95 % |", "|---" * (len(SYMBOLS) + 2) + "|"]
        for measure in report.right:
            paper = PAPER.get(late, {}).get(measure)
            cells = [
                f"{100 * report.accuracy(measure, network):.1f}"
                + ("" if paper is None or paper[place] is None else f" [{paper[place]:g}]")
                for place, network in enumerate(SYMBOLS)
            ]
            lines.append(f"| {measure} | {' | '.join(cells)} | {report.difference(measure)} |")
        kind = (
            "smallest of the converged trials" if report.converged else "largest of all trials, none of which converged"
        )
        about = f"Dependence of each layer on the layer before it within a class, from {report.measured} images of each"
        lines += ["", f"{about}, in nats, {kind}:", ""]
        start = report.best.connectivity[0]
        lines += ["| layer | with natural weights | tuned |", "|---|---|---|"]
        lines += [
            f"| {name} | {before:.2f} | {after:.2f} |"
            for name, before, after in zip(report.late, start, report.thresholds, strict=True)
        ]
        lines += ["", "| trial | epochs | PGD on the images that end it, before and after each epoch | converged |"]
        lines += ["|---|---|---|---|"]
        for trial in report.trials:
            course = ", ".join(f"{100 * own:.1f}" for own in trial.own)
            lines.append(f"| {trial.number + 1} | {trial.epochs} | {course} | {'yes' if trial.converged else 'no'} |")
        lines += ["", f"F* keeps {100 * report.target:.1f} % of those.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of published weights")
    parser.add_argument("--kept", type=Path, required=True, help="folder of trained networks and results")
    parser.add_argument("--late", type=int, nargs="+", default=list(LATE), help="numbers of layers of the late part")
    parser.add_argument("--robust", action="store_true", help="only train the natural and the robust network")
    parser.add_argument("--full", action="store_true", help="the paper's network and epochs, for a GPU")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page from what is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    effort, mode = (FULL, "full") if args.full else (QUICK, "quick")
    lab = Lab(mode, args.data, args.checkpoints, args.kept / "models")
    folders = {late: args.kept / mode / f"late-{late}" for late in args.late}
    if args.robust:
        robust(lab, effort)
        return
    for late, folder in folders.items():
        if not args.page:
            found = measure(lab, effort, late, folder)
            (folder / "subnetwork.json").write_text(found.to_json())
            print(found)
    done = {late: folder / "subnetwork.json" for late, folder in folders.items()}
    reports = {late: SubnetworkReport.from_json(file.read_text()) for late, file in done.items() if file.exists()}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "subnetworks.json").write_text(
        json.dumps({str(late): json.loads(report.to_json()) for late, report in reports.items()}, indent=1) + "\n"
    )
    (args.out / "subnetworks.md").write_text(markdown(reports, effort))
    print(plot(list(reports.values()), args.out / "subnetworks.png"))


if __name__ == "__main__":
    main()
