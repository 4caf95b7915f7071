"""Table 5: ResNet-18 under five attacks, beside other defences, CIFAR-10.

python scripts/reproduce/table5.py --full --data DATA    # on a GPU; --quick has the narrow ResNet-18 alone
"""

from __future__ import annotations

from functools import reduce
from statistics import mean
from typing import Any

import torch
from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab
from table4 import NAME as NARROW
from table4 import TUNE_3, paradigm_3
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.attacks.efforts import EFFORTS, Effort
from timm_nrpm.attacks.suites import alone, attacks_of

NAME, THREAT = "resnet18_cifar", Threat("Linf", 8 / 255)
COLUMNS = ("natural", "PGD", "FGSM", "C&W", "AA", "average", "worst case")
PAPER = {
    "PGD-AT": (80.90, 44.35, 58.41, 46.72, 42.14, 47.91), "TRADES-2.0": (82.80, 48.32, 51.67, 40.65, 36.40, 44.26),
    "TRADES-0.2": (85.74, 32.63, 44.26, 26.70, 19.00, 30.65), "MART": (79.03, 48.90, 60.86, 45.92, 43.88, 49.89),
    "SAT": (63.28, 43.57, 50.13, 47.47, 39.72, 45.22), "AWP": (81.20, 51.60, 55.30, 48.00, 46.90, 50.45),
    "Paradigm 3": (80.43, 57.23, 70.23, 64.07, 64.60, 64.03),
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "PGD-AT": {},
    "TRADES-2.0": {"objective": "trades", "beta": 2.0}, "TRADES-0.2": {"objective": "trades", "beta": 0.2},
    "MART": {"objective": "mart"}, "SAT": {"objective": "sat", "target_start": 70}, "AWP": {"objective": "awp"},
}  # fmt: skip
QUICK = (25, Effort(20, 200, auto=20))
"""Number of images, and the effort of the attacks."""


def experiment(lab: Lab) -> Experiment:
    count, effort = QUICK if lab.mode == "quick" else (1000, EFFORTS["paper"])

    def row(model: nn.Module) -> Measured:
        attacks = attacks_of("paper", THREAT, effort, ("own",), 10)
        clean = lab.right("resnet", model, None, count, name="clean")
        correct = {
            attack.name: clean
            & lab.right("resnet", model, alone(attack, THREAT), count, name=f"{attack.name} {effort}")
            for attack in attacks
        }
        auto = reduce(torch.logical_and, (right for name, right in correct.items() if name.startswith("aa_")))
        four = [100 * float(right.float().mean()) for right in (correct["pgd"], correct["fgsm"], correct["cw"], auto)]
        worst = lab.worst("resnet", model, [THREAT])[1]
        return {"ours": [round(x, 1) for x in (100 * float(clean.float().mean()), *four, mean(four), worst)],
                "images": count}  # fmt: skip

    def other(settings: dict[str, Any]) -> nn.Module:
        return lab.trained("resnet", NAME, settings)

    def ours() -> nn.Module:
        model = lab.calibrated("resnet", lab.reprogrammed("resnet", NAME, 0.5))
        return lab.tuned("resnet", model, TUNE_3)

    needed = "the full-width ResNet-18 is trained for 200 epochs under attack, which takes a GPU (--full)"
    rows = [
        *(Row(name, lambda s=settings: row(other(s)), (*PAPER[name], None), full=needed)  # type: ignore[misc]
          for name, settings in OTHERS.items()),
        Row("Paradigm 3", lambda: row(ours()), (*PAPER["Paradigm 3"], None), full=needed),
        Row("narrow, published (PGD-AT)", lambda: row(lab.plain("resnet", NARROW))),
        Row("narrow, paradigm 3", lambda: row(paradigm_3(lab))),
    ]  # fmt: skip

    def best(column: int, name: str, others: list[str], ours: str = "") -> Claim:
        return Claim(
            f"{ours}{name} has the best accuracy under {COLUMNS[column]}",
            lambda r: all(r[name][column] > r[o][column] for o in others),
        )

    claims = [best(i, "Paradigm 3", list(OTHERS)) for i in range(1, 6)]
    claims += [best(i, "narrow, paradigm 3", ["narrow, published (PGD-AT)"], "(ours) ") for i in (4, 6)]
    return Experiment(
        "table-5", "ResNet-18 under five attacks beside other defences, CIFAR-10, Linf 8/255", ("resnet",), COLUMNS,
        rows, claims, settings={"images": count, "steps": effort.steps, "AA steps": effort.auto,
                                "queries": effort.queries},
        about=f"{count} images; AutoAttack with {effort.auto} steps and {effort.queries} queries, its parts taken "
        "together image by image; C&W is its loss under Linf, "
        "FGSM has no random start. The narrow ResNet-18 of Table 4 is not in the paper's "
        f"table. The worst case is over the adaptive suite, {lab.efforts['resnet'].worst} images, in a column of "
        "its own.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
