"""Table 11: narrow ResNets of three depths, plain and tuned, CIFAR-10, PGD-20 (Figure 12 draws it).

python scripts/reproduce/table11.py --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from experiment import Claim, Experiment, Row, main
from lab import Lab
from table4 import COLUMNS, START, TUNE_3, TUNED_COUNT
from torch import nn

PAPER = {
    "LPM-ResNet10": (64.51, 37.26, 15.41, 2.71), "NRPM-ResNet10": (67.00, 40.02, 27.52, 19.18),
    "LPM-ResNet18": (67.89, 41.46, 16.99, 3.17), "NRPM-ResNet18": (71.79, 50.89, 39.58, 30.03),
    "LPM-ResNet34": (72.54, 43.7, 16.76, 3.16), "NRPM-ResNet34": (74.55, 50.12, 36.29, 25.54),
}  # fmt: skip
NEEDED = "no weights of this depth are published; 200 epochs of adversarial training take a GPU (--full)"


def model_of(lab: Lab, title: str) -> nn.Module:
    """Return the plain model (LPM), or the model tuned by paradigm 3 (NRPM)."""
    kind, depth = title.split("-ResNet")
    name = f"resnet{depth}_cifar_narrow"
    if kind == "LPM":
        return lab.plain("resnet", name)
    return lab.tuned("resnet", lab.reprogrammed("resnet", name, START, calibrated=True), TUNE_3)


def claims_of(columns: int) -> tuple[Claim, ...]:
    """Return the claims that NRPM beats LPM, one for each depth."""
    return tuple(
        Claim(f"NRPM-ResNet{depth} beats LPM-ResNet{depth}, clean and at every budget",
              lambda r, d=depth: all(r[f"NRPM-ResNet{d}"][i] > r[f"LPM-ResNet{d}"][i] for i in range(columns)))  # type: ignore[misc]
        for depth in (10, 18, 34)
    )  # fmt: skip


def experiment(lab: Lab) -> Experiment:
    count = TUNED_COUNT if lab.mode == "quick" else None
    rows = [
        Row(title, lambda t=title: lab.measured("resnet", model_of(lab, t), count), paper,  # type: ignore[misc]
            full="" if "18" in title else NEEDED, why="see paradigm 3 in Table 4")
        for title, paper in PAPER.items()
    ]  # fmt: skip
    return Experiment(
        "table-11", "narrow ResNets of three depths, CIFAR-10, PGD-20", ("resnet",), COLUMNS, rows,
        claims_of(len(COLUMNS)), settings={"paradigm 3": TUNE_3, "first lambda": START},
        about=f"{lab.described('resnet')} ResNet-18 is that of Table 4; in quick mode on {TUNED_COUNT} images.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
