"""The second paper (arXiv 2307.03803): Tables 1 and 3 and the figures of Algorithm 1.

    python scripts/reproduce/subnetworks.py --data DATA --checkpoints CHECKPOINTS --kept FOLDER   # hours on two cores
    python scripts/reproduce/subnetworks.py --kept FOLDER --full                                   # for a GPU
    python scripts/reproduce/subnetworks.py --kept FOLDER --page                                   # only the page

By default it measures the narrow ResNet-18, whose robust weights are published; with `--full` the paper's networks and
datasets, trained as in the paper. A run that was stopped goes on; with `--late` several processes may share FOLDER,
each with other late parts, once one of them has trained the networks (`--networks`). Writes results/subnetworks.json,
.md and a picture for each network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from families import FAMILIES
from lab import Lab
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_nrpm import NRPMConfig, TuneConfig, plot, reprogram_, restore_, tune
from timm_nrpm.evaluation.subnetwork_report import COMPOSED, ROBUST, SYMBOLS, TUNED, SubnetworkReport
from timm_nrpm.nn.wrappers import copied
from timm_nrpm.subnetworks.semirobust import SUITES, semirobust

ROOT = Path(__file__).parents[2]
EPS, STEPS = 8 / 255, 10
LATE = (4, 12)
MEASURES = ("clean", "fgsm", "pgd", "autoattack")

PAPER = {
    ("resnet18_cifar", "cifar10", 4): ((86.4, 69.7, 67.7, 71.4), (6.21, 43.1, 34.4, 41.3), (0, 38.5, 29.8, 36.5),
                                       (None, 39.45, 32.12, 39.57)),
    ("resnet18_cifar", "cifar10", 12): ((86.4, 69.7, 62.5, 66.3), (6.21, 43.1, 22.5, 38.1), (0, 38.5, 16.9, 33.7),
                                        (None, 39.45, 16.6, 40.13)),
    ("resnet18_cifar", "cifar100", 4): ((57.4, 46.8, 39.5, 46.4), (4.37, 19.8, 14.9, 19.2), (0, 16.0, 12.3, 15.9),
                                        (None, 17.38, 14.65, 18.4)),
    ("resnet18_cifar", "cifar100", 12): ((57.4, 46.8, 31.4, 42.2), (4.37, 19.8, 7.6, 18.5), (0, 16.0, 5.5, 16.3),
                                         (None, 17.38, 1.16, 17.9)),
    ("wideresnet34_cifar", "cifar10", 4): ((90.9, 81.3, 74.2, 81.6), (4.07, 50.1, 39.8, 49.8), (0, 43.2, 34.5, 42.8),
                                           (None, 41.66, 33.85, 41.76)),
    ("wideresnet34_cifar", "cifar10", 12): ((90.9, 81.3, 68.9, 77.7), (4.07, 50.1, 34.9, 45.8), (0, 43.2, 30.3, 41.4),
                                            (None, 41.66, 28.32, 43.29)),
    ("wideresnet34_cifar", "cifar100", 4): ((69.0, 56.2, 46.4, 55.9), (3.04, 24.5, 19.3, 23.9), (0, 20.4, 17.0, 19.6),
                                            (None, 20.32, 4.68, 21.34)),
    ("wideresnet34_cifar", "cifar100", 12): ((69.0, 56.2, 40.0, 52.0), (3.04, 24.5, 13.8, 23.4), (0, 20.4, 11.1, 20.5),
                                             (None, 20.32, 0.07, 21.5)),
}  # fmt: skip
"""The paper's Tables 1 and 3 in %, by network, dataset and late layers: for each of `MEASURES` the accuracies of F, F*,
the robust early part with the natural late one, and tuned."""


@dataclass(frozen=True)
class Case:
    """A network and a dataset, and how much is trained and measured.

    Attributes:
        network: Name of the network.
        dataset: Name of the dataset.
        paper: Name of the paper's network beside it.
        samples: Number of training images; None for all.
        natural_samples, natural_epochs: Numbers of images, and of epochs, of clean training that gives F from published
            robust weights.
        epochs: Number of epochs that give F* from F where no robust weights are published.
        trials, late_epochs: Numbers of trials, and of epochs of each.
        batch: Number of images in a batch of the late part.
        images: Number of images to choose on, and as many to compare on.
        build: Arguments of the network.
        suites: Suites of attacks.
    """

    network: str
    dataset: str
    paper: str
    samples: int | None = None
    natural_samples: int = 0
    natural_epochs: int = 0
    epochs: int = 120
    trials: int = 5
    late_epochs: int = 10
    batch: int = 128
    images: int = 1000
    build: Mapping[str, Any] = field(default_factory=dict)
    suites: tuple[str, ...] = SUITES

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.network}-{self.dataset}"

    @property
    def family(self) -> str:
        """Its family in the lab."""
        return "resnet" if self.dataset == "cifar10" else self.dataset

    @property
    def published(self) -> bool:
        """Whether its robust weights are published."""
        return self.network in FAMILIES[self.family].published


QUICK = (
    Case(
        "resnet18_cifar_narrow", "cifar10", "resnet18_cifar",
        samples=5000, natural_samples=25_000, natural_epochs=5, trials=2, late_epochs=10, batch=32, images=200,
    ),
)  # fmt: skip
FULL = tuple(
    Case(network, dataset, network, build={"num_classes": classes})
    for network in ("resnet18_cifar", "wideresnet34_cifar")
    for dataset, classes in (("cifar10", 10), ("cifar100", 100))
)


def config_of(case: Case) -> TuneConfig:
    """Settings of adversarial training."""
    return TuneConfig(
        paradigm="all", eps=EPS, steps=STEPS, evaluate_steps=STEPS, epochs=case.epochs, optimizer="momentum", lr=0.01
    )


def networks(lab: Lab, case: Case) -> tuple[nn.Module, nn.Module]:
    """F and F*. As in the paper, F* is trained on from F under PGD; where robust weights are published, those are F*,
    and F is trained on from them on clean images."""
    if case.published:
        star = lab.plain(case.family, case.network, **case.build)
        settings = {"paradigm": "all", "trainable": ("*.weight", "*.bias"), "objective": "clean", "eps": 0.0,
                    "optimizer": "momentum", "lr": 0.01, "epochs": case.natural_epochs}  # fmt: skip
        model = reprogram_(lab.plain(case.family, case.network, **case.build), NRPMConfig(lam=1.0))
        return restore_(lab.tuned(case.family, model, settings, case.natural_samples)).eval(), star
    natural = lab.trained(case.family, case.network, {"objective": "clean", "eps": 0.0}, **case.build).eval()
    model = reprogram_(copied(natural), NRPMConfig(lam=1.0))
    config = replace(
        config_of(case), trainable=("*.weight", "*.bias"), output=str(lab.kept / f"robust-{case.name}"),
        checkpoint_every=20, keep=1,
    )  # fmt: skip
    tune(model.to(lab.device), training_of(lab, case, 128), config, resume=True, progress=True)
    return natural, restore_(model).eval()


def training_of(lab: Lab, case: Case, batch: int) -> DataLoader[Any]:
    """The training images."""
    return lab.loader(case.dataset, "train", training=True, batch_size=batch, samples=case.samples)


def images_of(lab: Lab, case: Case) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Images to choose on, and others to compare on, both of all classes."""
    pixels, labels = lab.images(case.dataset, "test", 2 * case.images)
    order = range(0, len(labels), 2), range(1, len(labels), 2)
    selection, report = (DataLoader(TensorDataset(pixels[list(rows)], labels[list(rows)]), 100) for rows in order)
    return selection, report


def measure(lab: Lab, case: Case, late: int, folder: Path) -> SubnetworkReport:
    """Run Algorithm 1 for a late part of some layers."""
    selection, report = images_of(lab, case)
    natural, star = networks(lab, case)
    return semirobust(
        natural.to(lab.device), training_of(lab, case, case.batch), selection, report, late, robust=star,
        config=config_of(case), trials=case.trials, epochs=case.late_epochs, suites=case.suites, folder=folder,
        progress=True,
    )  # fmt: skip


def about(case: Case) -> str:
    """How a case was measured."""
    origin = (
        f"F* has the published robust weights, and F is trained on from them for {case.natural_epochs} epochs on "
        f"{case.natural_samples} clean images, where the paper trains F* from F"
        if case.published
        else f"F is trained on clean images, and F* from F for {case.epochs} epochs"
    )
    return (
        f"Linf {EPS * 255:g}/255, PGD with {STEPS} steps in training. {origin}. The late part has the weights of F "
        f"again, and is tuned alone, in batches of {case.batch}, at most {case.late_epochs} epochs of "
        f"{case.samples or 50_000} images, until PGD leaves at most a point fewer of {case.images} images than of F*. "
        f"The table is of {case.images} other images, in %, under PGD with 20 steps; in brackets, the paper's "
        f"numbers of `{case.paper}`, "
        "which ends and compares trials on the same images."
    )


def table(case: Case, late: int, report: SubnetworkReport) -> list[str]:
    """The lines of one late part."""
    lines = [f"### The last {late} of {len(report.early) + late} layers", "", report.verdict, ""]
    lines += [f"| | {' | '.join(SYMBOLS.values())} | last from A(F*), 95 % |", "|---" * (len(SYMBOLS) + 2) + "|"]
    paper = dict(zip(MEASURES, PAPER.get((case.paper, case.dataset, late), ()), strict=False))
    for measure in report.right:
        beside = paper.get(measure, (None,) * 4)
        cells = [
            f"{100 * report.accuracy(measure, network):.1f}" + ("" if theirs is None else f" [{theirs:g}]")
            for network, theirs in zip(SYMBOLS, beside, strict=True)
        ]
        lines.append(f"| {measure} | {' | '.join(cells)} | {report.difference(measure)} |")
    kind = "smallest of the converged trials" if report.converged else "largest of all trials, none of which converged"
    lines += [
        "",
        f"Dependence of each layer on the layer before it within a class, from {report.measured} images of each, in "
        f"nats: with the natural weights, and tuned ({kind}); under attack, before and after tuning of the best trial:",
        "",
        f"| layer | natural | tuned | {' | '.join(report.attacked)} |",
        "|---" * (3 + len(report.attacked)) + "|",
    ]
    for place, name in enumerate(report.late):
        pairs = [f"{rows[COMPOSED][place]:.2f}, {rows[TUNED][place]:.2f}" for rows in report.attacked.values()]
        values = f"{report.best.connectivity[0][place]:.2f} | {report.thresholds[place]:.2f}"
        lines.append(f"| {' | '.join([name, values, *pairs])} |")
    lines += ["", "| trial | epochs | PGD on the images that end it, before and after each epoch | converged |"]
    lines += ["|---|---|---|---|"]
    for trial in report.trials:
        course = ", ".join(f"{100 * own:.1f}" for own in trial.own)
        lines.append(f"| {trial.number + 1} | {trial.epochs} | {course} | {'yes' if trial.converged else 'no'} |")
    return [*lines, "", f"F* keeps {100 * report.target:.1f} % of those.", ""]


def claims(reports: Mapping[int, SubnetworkReport]) -> list[str]:
    """The paper's claims, and whether they hold here."""
    strongest = [list(report.right)[-1] for report in reports.values()]
    held = [
        (
            f"a tuned late part of {late} layers comes within a point of the robust network under PGD",
            bool(report.converged),
        )
        for late, report in reports.items()
    ]
    for (late, report), measure in zip(reports.items(), strongest, strict=True):
        effect = report.difference(measure)
        claim = (
            f"on other images, a tuned late part of {late} layers cannot be told from the robust network ({measure})"
        )
        held.append((claim, effect.high >= 0))
        lower = report.accuracy(measure, COMPOSED) < report.accuracy(measure, ROBUST)
        held.append((f"natural weights in the last {late} layers cost robustness ({measure})", lower))
    if len(reports) > 1:
        short, long = (reports[late] for late in (min(reports), max(reports)))
        claim = "before tuning, a longer robust part keeps more robustness"
        measure = strongest[0]
        held.append((claim, short.accuracy(measure, COMPOSED) > long.accuracy(measure, COMPOSED)))
    return ["| the paper's claim | here |", "|---|---|"] + [
        f"| {claim} | {'yes' if holds else '**no**'} |" for claim, holds in held
    ]


def page(done: Sequence[tuple[Case, Mapping[int, SubnetworkReport]]]) -> str:
    """The page of the results."""
    lines = ["# Semirobust subnetworks: Algorithm 1", ""]
    for case, reports in done:
        lines += [f"## `{case.network}`, {case.dataset}", "", about(case), "", *claims(reports), ""]
        lines += [f"![dependence by layer, and over the epochs]({picture(case)})", ""]
        for late, report in sorted(reports.items()):
            lines += table(case, late, report)
    return "\n".join(lines)


def picture(case: Case) -> str:
    """Name of its picture."""
    return "subnetworks.png" if case in QUICK else f"subnetworks-{case.name}.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of published weights")
    parser.add_argument("--kept", type=Path, required=True, help="folder of trained networks and results")
    parser.add_argument("--late", type=int, nargs="+", default=list(LATE), help="numbers of layers of the late part")
    parser.add_argument("--networks", action="store_true", help="only train the natural and the robust networks")
    parser.add_argument("--full", action="store_true", help="the paper's networks, datasets and epochs, for a GPU")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page from what is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    cases, mode = (FULL, "full") if args.full else (QUICK, "quick")
    lab = Lab(mode, args.data, args.checkpoints, args.kept / "models")
    done: list[tuple[Case, dict[int, SubnetworkReport]]] = []
    for case in cases:
        if args.networks:
            networks(lab, case)
            continue
        reports: dict[int, SubnetworkReport] = {}
        for late in args.late:
            folder = args.kept / mode / case.name / f"late-{late}"
            if not args.page:
                found = measure(lab, case, late, folder)
                (folder / "subnetwork.json").write_text(found.to_json())
                print(found)
            if (file := folder / "subnetwork.json").exists():
                reports[late] = SubnetworkReport.from_json(file.read_text())
        if reports:
            done.append((case, reports))
            args.out.mkdir(parents=True, exist_ok=True)
            print(plot(list(reports.values()), args.out / picture(case)))
    if done:
        rows = {
            case.name: {late: json.loads(each.to_json()) for late, each in reports.items()} for case, reports in done
        }
        (args.out / "subnetworks.json").write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "subnetworks.md").write_text(page(done))


if __name__ == "__main__":
    main()
