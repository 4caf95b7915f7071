"""Table 12: narrow ResNets of three depths, plain and tuned, CIFAR-10, AutoAttack (Figure 7 draws it).

python scripts/reproduce/table12.py --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from experiment import Experiment, Measured, Row, main
from families import FAMILIES
from lab import Lab
from table4 import COLUMNS, START, TUNE_3
from table11 import NEEDED, claims_of, model_of

from timm_nrpm import Threat

PAPER = {
    "LPM-ResNet10": (64.51, 28.70, 5.50, 0.20), "NRPM-ResNet10": (67.00, 40.40, 30.10, 12.80),
    "LPM-ResNet18": (67.89, 30.50, 7.20, 0.40), "NRPM-ResNet18": (71.79, 51.60, 43.40, 26.40),
    "LPM-ResNet34": (72.54, 33.90, 9.20, 0.30), "NRPM-ResNet34": (74.55, 54.20, 45.00, 28.90),
}  # fmt: skip
QUICK, FULL = (25, 20, 200), (1000, 100, 5000)
"""Numbers of images, steps and queries; the authors' code attacks a thousand images."""


def experiment(lab: Lab) -> Experiment:
    count, steps, queries = QUICK if lab.mode == "quick" else FULL
    threats = [Threat("Linf", eps) for eps in FAMILIES["resnet"].budgets]

    def row(title: str) -> Measured:
        model = model_of(lab, title)
        options = {"count": count, "steps": steps, "queries": queries}
        ours = lab.surviving("resnet", model, threats, "standard", **options)
        return {"ours": ours, "worst case": lab.surviving("resnet", model, threats, count=count), "images": count}

    rows = [
        Row(title, lambda t=title: row(t), paper, full="" if "18" in title else NEEDED,  # type: ignore[misc]
            why=f"{count} images, AutoAttack with {steps} steps and {queries} queries; see paradigm 3 in Table 4")
        for title, paper in PAPER.items()
    ]  # fmt: skip
    return Experiment(
        "table-12", "narrow ResNets of three depths, CIFAR-10, AutoAttack", ("resnet",), COLUMNS, rows,
        claims_of(len(COLUMNS)), settings={"images": count, "steps": steps, "queries": queries, "paradigm 3": TUNE_3,
                                           "first lambda": START},
        about=f"{count} evenly chosen test images, AutoAttack with {steps} steps and {queries} queries. Clean accuracy "
        "is on them, too. ResNet-18 is that of Table 4.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
