"""Measure the paper's published models (arXiv 2410.04577) under the paper's attack and in the worst case.

    python scripts/reproduce/worst_case.py --shared SHARED    # an hour and a half on two cores

SHARED holds the authors' checkpoints/ and data/, with CIFAR-10 as class folders in tars and MNIST in torchvision's
layout. Writes results/worst-case.json, .md and an HTML report for each model. A run that was interrupted goes on from
its journals in results/.journals.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_nrpm import NRPMConfig, RobustnessReport, Threat, calibrate_, evaluate, reprogram_
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.figures.report_folder import show
from timm_nrpm.models.backbones import load_published_

RESULTS = Path(__file__).parents[2] / "results"
CALIBRATION = 1000
ROBUST = ("layer*.conv*",)  # as published: the 3x3 convolutions of the blocks


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: Name of the model, a key of `MODELS`.
        lam: Lambda of every layer.
        calibrated: Whether the model is calibrated on training images.
        paper: The paper's accuracies in %, clean and under its attack; None if it has none.
    """

    name: str
    lam: float
    calibrated: bool
    paper: tuple[float, float] | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.lam:g}-{'calibrated' if self.calibrated else 'published'}"


CASES = (
    Case("resnet18", 1.0, False, (67.89, 41.46)),
    Case("resnet18", 0.5, True),
    Case("resnet18", 0.5, False, (15.99, 12.51)),
    Case("mlp", 1.0, False, (90.8, 31.8)),
    Case("mlp", 0.9, False, (90.8, 56.6)),
    Case("mlp", 0.5, False, (84.1, 74.4)),
    Case("mlp", 0.5, True),
)

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {
        "title": "The published narrow ResNet-18 (CIFAR-10)",
        "backbone": ("resnet18_cifar_narrow", "tinyresnet18_cifar10_model.t7"),
        "data": ("tar", "data/cifar10-jpeg"),
        "every": {"train": 50, "test": 20},
        "images": 500,
        "batch": 100,
        "estimate": {"iterations": 1, "eps": 5e-4, "layers": ROBUST},
        "threat": Threat("Linf", 8 / 255),
        "protocol": ("pgd", "PGD-20"),
    },
    "mlp": {
        "title": "The published MLP 784-256-64-10 (MNIST)",
        "backbone": ("mlp3_mnist", "mlp3_mnist_model.pth"),
        "data": ("torch/mnist", "data"),
        "every": {"train": 60, "test": 1},  # the first thousand, as in the paper
        "images": 1000,
        "batch": 500,
        "estimate": {"iterations": 1, "eps": 5e-5},
        "threat": Threat("Linf", 0.05),
        "protocol": ("fgsm", "FGSM"),
    },
}


def images(name: str, shared: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` images and labels of a split, at an even distance, since CIFAR's tar is ordered by class."""
    reader, root = MODELS[name]["data"]
    model = timm.create_model(MODELS[name]["backbone"][0])
    dataset = pixel_loader(reader, shared / root, split=split, model=model).dataset
    chosen = range(0, len(dataset), MODELS[name]["every"][split])[:count]  # type: ignore[arg-type]
    pixels, labels = zip(*(dataset[i] for i in chosen), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def model_of(case: Case, shared: Path) -> nn.Module:
    """Return the published model, reprogrammed and, if the case says so, calibrated."""
    settings = MODELS[case.name]
    backbone, file = settings["backbone"]
    model = load_published_(timm.create_model(backbone), shared / "checkpoints" / file).eval()
    reprogram_(model, NRPMConfig(lam=case.lam, **settings["estimate"]))
    if case.calibrated:
        calibrate_(model, images(case.name, shared, "train", CALIBRATION)[0].split(250))
    return model


def measure(case: Case, args: argparse.Namespace) -> RobustnessReport:
    """Evaluate a case; write an HTML page of the calibrated one at lambda 0.5."""
    count, size = args.images or MODELS[case.name]["images"], MODELS[case.name]["batch"]
    pixels, labels = images(case.name, args.shared, "test", count)
    loader = list(zip(pixels.split(size), labels.split(size), strict=True))
    model = model_of(case, args.shared)
    journal = args.out / ".journals" / f"{case}-{count}.jsonl"
    print(case)
    report = evaluate(model, loader, MODELS[case.name]["threat"], resume=journal, progress=True)
    if case.calibrated and case.lam == 0.5:
        title = f"{MODELS[case.name]['title']}, lambda {case.lam:g}, calibrated"
        page = show([report], model, loader, args.out / ".journals" / str(case), title=title)
        page.replace(args.out / f"worst-case-{case.name}.html")
    return report


def row_of(case: Case, report: RobustnessReport) -> dict[str, Any]:
    """Return the values of a report that the table shows."""
    control = report.control
    assert control is not None
    key = MODELS[case.name]["protocol"][0]
    return {
        **asdict(case),
        "images": report.samples,
        "threat": str(report.threat),
        "clean": report.accuracy(),
        "protocol": report.accuracy(key),
        "accuracies": {attack.name: report.accuracy(attack.name) for attack in report.attacks},
        "worst_case": report.worst_case,
        "interval": report.interval(),
        "control": {
            "clean": control.accuracy(),
            "protocol": control.accuracy(key),
            "worst_case": control.worst_case,
            "interval": control.interval(),
        },
        "rounds": report.rounds,
        "evolutions": report.evolutions,
        "flags": report.flags,
        "evidence": dict(report.evidence),
        "sha256": report.sha256,
        "versions": dict(report.versions),
        "passes": [
            sum(attack.forwards for attack in report.attacks),
            sum(attack.backwards for attack in report.attacks),
        ],
        "seconds": report.seconds,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Two numbers: the paper's protocol and the worst case",
        "",
        "`scripts/reproduce/worst_case.py`. Accuracy in %; the worst case is, image by image, over every attack of the "
        "adaptive suite, with its 95 % interval. The plain model stands beside, under the same attacks on the same "
        "images.",
    ]
    for name, settings in MODELS.items():
        chosen = [row for row in rows if row["name"] == name]
        if not chosen:
            continue
        attack = settings["protocol"][1]
        lines += ["", f"## {settings['title']}, {chosen[0]['threat']}, {chosen[0]['images']} images", ""]
        lines.append(
            f"| lambda | calibrated | clean | {attack}, own gradient | worst case | plain model, worst | flags |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        for row in chosen:
            paper = row["paper"] or (None, None)
            clean, own = (
                f"{100 * value:.1f}" + ("" if theirs is None else f" ({theirs:.1f})")
                for value, theirs in zip((row["clean"], row["protocol"]), paper, strict=True)
            )
            low, high = (100 * x for x in row["interval"])
            worst = f"**{100 * row['worst_case']:.1f}** ({low:.1f} to {high:.1f})"
            plain = f"{100 * row['control']['worst_case']:.1f}"
            former = "" if row.get("evolutions") else "*"
            cells = (f"{row['lam']:g}{former}", "yes" if row["calibrated"] else "no", clean, own, worst, plain)
            lines.append("| " + " | ".join((*cells, ", ".join(row["flags"]))) + " |")
        lines += ["", "In brackets behind clean and own gradient: the paper's."]
        if not all(row.get("evolutions") for row in chosen):
            lines[-1] += " *: by the adaptive suite as it was before its evolutions, which left more."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--images", type=int, help="number of test images (default: 500 of CIFAR-10, 1000 of MNIST)")
    parser.add_argument(
        "--only", default="", help="run the cases whose names start so, like resnet18-0.5; processes can share the work"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    args = parser.parse_args()
    (args.out / ".journals").mkdir(parents=True, exist_ok=True)
    file = args.out / "worst-case.json"
    for case in CASES:
        if not str(case).startswith(args.only):
            continue
        report = measure(case, args)
        print(report)
        rows = json.loads(file.read_text()) if file.exists() else {}  # another process may have added rows
        rows[str(case)] = row_of(case, report)
        rows = {str(c): rows[str(c)] for c in CASES if str(c) in rows}
        file.write_text(json.dumps(rows, indent=1) + "\n")
        (args.out / "worst-case.md").write_text(markdown(list(rows.values())))


if __name__ == "__main__":
    main()
