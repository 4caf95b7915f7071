"""Figure 9: the MLP under attacks of three norms, MNIST.

python scripts/reproduce/figure9.py --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab
from pictures import lines
from table7 import LAM, TUNE

from timm_nrpm import Threat
from timm_nrpm.attacks.efforts import EFFORTS
from timm_nrpm.attacks.suites import alone, attacks_of

NAME = "mlp3_mnist"
BUDGETS: dict[str, tuple[float, ...]] = {"L0": (5, 10, 20, 40), "L2": (0.5, 1, 2, 3), "Linf": (0.05, 0.1, 0.2, 0.3)}
"""Bounds: numbers of pixels for L0, pixel units of [0, 1] for the others."""


def experiment(lab: Lab) -> Experiment:
    def row(kind: str, norm: str) -> Measured:
        start = lab.reprogrammed("mlp", NAME, LAM)
        model = lab.plain("mlp", NAME) if kind == "LPM" else lab.tuned("mlp", start, TUNE)
        threats = [Threat(norm, eps) for eps in BUDGETS[norm]]
        attacks = [attacks_of("quick", threat, EFFORTS["quick"], ("own",), 10) for threat in threats]
        direct = [
            next(alone(attack, threat) for attack in suite if attack.name == "pgd")
            for suite, threat in zip(attacks, threats, strict=True)
        ]
        named = [(None, "clean"), *((run, f"pgd {norm} {eps}") for run, eps in zip(direct, BUDGETS[norm], strict=True))]
        ours = [lab.under("mlp", model, run, name=name) for run, name in named]
        return {"ours": ours, "worst case": lab.worst("mlp", model, threats)}

    def draw(result: dict[str, Any], path: Path) -> None:
        below = {norm: ["natural", *(f"{eps:g}" for eps in budgets)] for norm, budgets in BUDGETS.items()}
        lines(result, path, {norm: {kind: f"{kind}, {norm}" for kind in ("LPM", "NRPM")} for norm in BUDGETS}, below)

    columns = ("natural", *(" / ".join(f"{norm} {eps[i]:g}" for norm, eps in BUDGETS.items()) for i in range(4)))
    rows = [Row(f"{kind}, {norm}", lambda k=kind, n=norm: row(k, n)) for norm in BUDGETS for kind in ("LPM", "NRPM")]  # type: ignore[misc]
    claims = [
        Claim(f"NRPM beats LPM at every budget, {norm}",
              lambda r, n=norm: all(a > b for a, b in zip(r[f"NRPM, {n}"][1:], r[f"LPM, {n}"][1:], strict=True)))  # type: ignore[misc]
        for norm in BUDGETS
    ]  # fmt: skip
    return Experiment(
        "figure-9", "the MLP under attacks of three norms, MNIST", ("mlp",), columns, rows, claims, draw=draw,
        settings={"lambda": LAM, "tuning": TUNE, "budgets": BUDGETS},
        about=f"{lab.described('mlp')} LPM as published, NRPM by the fine-tuning of Table 7. Under the own gradient: "
        "greedy pixels (L0), PGD-20 (L2 and Linf). The paper gives no numbers with this figure; the authors' code "
        "takes one step, and under L0 brightens the pixels of the largest gradient.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
