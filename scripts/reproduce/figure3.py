"""Figure 3: LeNet at every lambda (paradigm 1), MNIST, FGSM.

python scripts/reproduce/figure3.py --data DATA
"""

from __future__ import annotations

from experiment import Claim, Experiment, Measured, Row, main
from families import FAMILIES
from lab import Lab
from pictures import bars

NAME = "lenet_mnist"
COLUMNS = ("natural", *(f"{eps:g}" for eps in FAMILIES["lenet"].budgets))
LAMBDAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)


def experiment(lab: Lab) -> Experiment:
    def row(lam: float) -> Measured:
        return lab.measured("lenet", lab.reprogrammed("lenet", NAME, lam))

    rows = [Row(f"lambda {lam:g}", lambda lam=lam: row(lam)) for lam in LAMBDAS]  # type: ignore[misc]
    ours = [f"lambda {lam:g}" for lam in LAMBDAS[1:]]
    claims = (
        Claim("(ours) the LeNet trained naturally is above 98 % when clean", lambda r: r["lambda 1"][0] > 98),
        Claim("some lambda below 1 is more robust at every budget",
              lambda r: all(max(r[name][i] for name in ours) > r["lambda 1"][i] for i in range(1, len(COLUMNS)))),
        Claim("(ours) one and the same lambda is more robust at every budget from 0.1, and loses 3 points at most",
              lambda r: any(r["lambda 1"][0] - r[name][0] <= 3
                            and all(r[name][i] > r["lambda 1"][i] for i in range(2, len(COLUMNS))) for name in ours)),
    )  # fmt: skip
    return Experiment(
        "figure-3", "LeNet at every lambda, MNIST, FGSM", ("lenet",), COLUMNS, rows, claims, draw=bars,
        about=f"{lab.described('lenet')} LeNet trained naturally for {lab.efforts['lenet'].epochs} epochs; its "
        "convolutions reprogrammed, K = 1, eps = 1e-3. The paper gives no numbers with this figure.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
