"""Ablations that the paper leaves out: eps, the penalty and the width, on MLPs, MNIST, FGSM.

    python scripts/reproduce/ablations.py --data DATA --checkpoints CHECKPOINTS

K is in Table 8, depth in Tables 7 and 11, the norm of the attack in Figure 9.
"""

from __future__ import annotations

from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab
from table1 import COLUMNS, NAME

LAM = 0.5
EPSILONS = (5e-2, 5e-3, 5e-4, 5e-5, 5e-6)
PENALTIES = {"huber": {"delta": 1e-3}, "mcp": {"gamma": 1e-2}, "huber-mcp": {"delta": 1e-3, "gamma": 1e-2}}
"""Penalties and their thresholds, in units of one product; most products are below 0.01 here."""
WIDTHS = (16, 64)


def experiment(lab: Lab) -> Experiment:
    def wide(width: int, lam: float) -> Measured:
        return lab.measured("mlp", lab.reprogrammed("mlp", "mlp2_mnist", lam, build={"widths": (width,)}))

    rows = [
        Row(f"eps {eps:g}", lambda eps=eps: lab.measured("mlp", lab.reprogrammed("mlp", NAME, LAM, eps=eps)))  # type: ignore[misc]
        for eps in EPSILONS
    ]
    rows += [
        Row(f"{name}, {', '.join(f'{key} {value:g}' for key, value in zone.items())}",
            lambda n=name, z=zone: lab.measured("mlp", lab.reprogrammed("mlp", NAME, LAM, penalty=n, **z)))  # type: ignore[misc]
        for name, zone in PENALTIES.items()
    ]  # fmt: skip
    rows += [
        Row(f"width {width}, lambda {lam:g}", lambda w=width, lam=lam: wide(w, lam))  # type: ignore[misc]
        for width in WIDTHS for lam in (1.0, LAM)
    ]  # fmt: skip
    small, large = f"eps {EPSILONS[-1]:g}", f"eps {EPSILONS[0]:g}"
    claims = (
        Claim(f"(ours) {small} looks more robust than {large} at every budget",
              lambda r: all(r[small][i] > r[large][i] for i in range(1, len(COLUMNS)))),
        *(Claim(f"(ours) width {w}: lambda {LAM:g} beats the plain model at every budget",
                lambda r, w=w: all(r[f"width {w}, lambda {LAM:g}"][i] > r[f"width {w}, lambda 1"][i]  # type: ignore[misc]
                                   for i in range(1, len(COLUMNS))))
          for w in WIDTHS),
    )  # fmt: skip
    return Experiment(
        "ablations", "eps, penalty and width, MLPs, MNIST, FGSM", ("mlp",), COLUMNS, rows, claims,
        settings={"lambda": LAM, "epsilons": EPSILONS, "penalties": PENALTIES, "widths": WIDTHS},
        about=f"{lab.described('mlp')} Lambda {LAM:g}, K = 1; eps and penalty on the published MLP (eps = 5e-5 "
        "where not said), width on 784-width-10, trained naturally.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
