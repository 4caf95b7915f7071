"""Table 7: MLPs of one, two and three layers, plain and reprogrammed, MNIST, FGSM.

python scripts/reproduce/table7.py --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from typing import Any

from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab
from table1 import COLUMNS, OTHER
from table1 import PAPER as TABLE_1

PAPER = {
    1: ((91.1, 12.0, 7.1, 0.5, 0.0, 0.0, 0.0), (87.6, 14.0, 13.6, 12.9, 12.1, 11.5, 10.3)),
    2: ((91.6, 32.9, 2.6, 0.2, 0.0, 0.0, 0.0), (89.1, 37.0, 34.2, 30.7, 25.8, 22.7, 21.2)),
    3: (TABLE_1[1.0], (90.7, 47.2, 45.1, 37.8, 30.8, 24.9, 21.1)),
}
LAM = 0.5
TUNE: dict[str, Any] = {"paradigm": "all", "objective": "clean", "optimizer": "adamw", "lr": 0.001, "lam_lr": 0.0005}


def experiment(lab: Lab) -> Experiment:
    def row(layers: int, reprogrammed: bool) -> Measured:
        name = f"mlp{layers}_mnist"
        if not reprogrammed:
            return lab.measured("mlp", lab.plain("mlp", name))
        return lab.measured("mlp", lab.tuned("mlp", lab.reprogrammed("mlp", name, LAM), TUNE))

    rows = [
        Row(f"{layers} layer{'s' * (layers > 1)}, {kind}", lambda n=layers, k=kind: row(n, k == "NRPM"), paper,  # type: ignore[misc]
            why=OTHER if layers == 3 else "trained here: the paper's weights of one and two layers are not published")
        for layers, both in PAPER.items() for kind, paper in zip(("LPM", "NRPM"), both, strict=True)
    ]  # fmt: skip
    claims = [
        Claim(f"{name}: NRPM beats LPM at every budget",
              lambda r, n=name: all(r[f"{n}, NRPM"][i] > r[f"{n}, LPM"][i] for i in range(1, len(COLUMNS))))  # type: ignore[misc]
        for name in ("1 layer", "2 layers", "3 layers")
    ]  # fmt: skip
    claims.append(Claim(
        "more layers make NRPM more robust at 0.05 to 0.2",
        lambda r: all(r["1 layer, NRPM"][i] < r["2 layers, NRPM"][i] < r["3 layers, NRPM"][i] for i in (1, 2, 3, 4)),
    ))  # fmt: skip
    return Experiment(
        "table-7", "MLPs of one, two and three layers, MNIST, FGSM", ("mlp",), COLUMNS, rows, claims,
        settings={"lambda": LAM, "tuning": TUNE},
        about=f"{lab.described('mlp')} Three layers as published, one and two trained naturally; NRPM starts at lambda "
        f"{LAM:g} and is fine-tuned on clean images (paradigm 3): the paper does not say under which attack.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
