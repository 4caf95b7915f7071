"""Table 8: the number of iterations K, MLP 784-256-64-10, MNIST, FGSM.

python scripts/reproduce/table8.py --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from typing import Any

from experiment import Claim, Experiment, Row, main
from lab import Lab
from table1 import COLUMNS, NAME, OTHER
from table1 import PAPER as TABLE_1

LAMBDAS, ITERATIONS = (0.9, 0.8, 0.7, 0.6, 0.5), (0, 1, 2, 3, 4)
LATER = {
    0.9: ((90.7, 76.1, 44.0, 26.8, 18.0, 13.4, 9.3), (90.7, 82.1, 56.7, 37.4, 26.3, 19.9, 16.3),
          (90.6, 83.5, 61.1, 42.7, 29.4, 22.7, 18.0)),
    0.8: ((90.4, 81.1, 56.2, 36.2, 26.0, 19.3, 15.5), (90.3, 81.4, 61.8, 42.9, 31.8, 23.7, 19.5),
          (90.3, 82.5, 64.3, 45.6, 33.1, 25.3, 22.0)),
    0.7: ((89.1, 80.3, 56.4, 39.7, 28.4, 21.4, 18.5), (88.9, 80.3, 61.8, 44.0, 33.2, 24.4, 19.2),
          (88.4, 79.6, 61.3, 43.6, 33.9, 26.3, 21.4)),
    0.6: ((86.2, 77.1, 56.2, 39.3, 29.2, 22.6, 17.1), (85.5, 75.9, 55.8, 40.2, 30.7, 23.1, 18.8),
          (84.0, 74.7, 56.2, 39.6, 29.4, 22.1, 18.7)),
    0.5: ((80.3, 71.0, 53.5, 37.0, 26.9, 21.5, 16.4), (79.0, 69.6, 53.7, 38.1, 29.2, 23.2, 19.5),
          (77.7, 66.6, 51.2, 37.9, 29.7, 23.7, 19.8)),
}  # fmt: skip


def name_of(lam: float, iterations: int) -> str:
    return f"lambda {lam:g}, K = {iterations}"


def experiment(lab: Lab) -> Experiment:
    def paper(lam: float, iterations: int) -> tuple[float, ...]:
        if iterations < 2:  # K = 0 is the plain model, K = 1 is Table 1
            return TABLE_1[lam if iterations else 1.0]
        return LATER[lam][iterations - 2]

    def measured(lam: float, iterations: int) -> dict[str, Any]:
        lam = lam if iterations else 1.0  # the same plain model, measured once
        return lab.measured("mlp", lab.reprogrammed("mlp", NAME, lam, iterations=max(1, iterations)))

    rows = [
        Row(name_of(lam, k), lambda lam=lam, k=k: measured(lam, k), paper(lam, k), why=OTHER)  # type: ignore[misc]
        for lam in LAMBDAS for k in ITERATIONS
    ]  # fmt: skip
    budgets = range(1, len(COLUMNS))
    claims = tuple(
        Claim(f"at lambda {lam:g}, K = 4 is more robust than K = 1 at every budget, and less accurate when clean",
              lambda r, lam=lam: r[name_of(lam, 4)][0] < r[name_of(lam, 1)][0]  # type: ignore[misc]
              and all(r[name_of(lam, 4)][i] > r[name_of(lam, 1)][i] for i in budgets))
        for lam in LAMBDAS[:3]
    )  # fmt: skip
    return Experiment(
        "table-8", "the number of iterations K, MLP, MNIST, FGSM", ("mlp",), COLUMNS, rows, claims,
        about=f"{lab.described('mlp')} The published weights; eps = 5e-5. Figure 10 draws these numbers.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
