"""Table 6 and Figure 8: MLP-Mixers of two, four and eight blocks, plain and reprogrammed, CIFAR-10, PGD-20.

python scripts/reproduce/table6.py --data DATA
"""

from __future__ import annotations

from typing import Any

from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab

COLUMNS = ("natural", "1/255", "2/255", "3/255", "4/255", "8/255")
PAPER = {
    "LPM-MLP-Mixer-2": (77.45, 38.55, 10.39, 2.24, 0.34, 0.0),
    "NRPM-MLP-Mixer-2": (76.86, 64.27, 49.62, 37.22, 27.99, 15.73),
    "LPM-MLP-Mixer-4": (78.61, 35.99, 9.35, 1.45, 0.19, 0.0),
    "NRPM-MLP-Mixer-4": (77.51, 66.72, 51.73, 39.43, 30.88, 18.31),
    "LPM-MLP-Mixer-8": (78.98, 40.55, 12.81, 3.27, 0.73, 0.01),
    "NRPM-MLP-Mixer-8": (78.32, 66.82, 52.73, 40.37, 32.66, 20.61),
}  # fmt: skip
LAM = 0.5
TUNE: dict[str, Any] = {"paradigm": "all", "objective": "clean", "optimizer": "adamw", "lr": 0.0005, "lam_lr": 0.0005}
TUNED_ON = 2500


def experiment(lab: Lab) -> Experiment:
    def row(title: str) -> Measured:
        name = f"mixer{title[-1]}_cifar"
        if title.startswith("LPM"):
            return lab.measured("mixer", lab.plain("mixer", name))
        start = lab.reprogrammed("mixer", name, LAM, calibrated=True)
        return lab.measured("mixer", lab.tuned("mixer", start, TUNE, TUNED_ON if lab.mode == "quick" else None))

    effort = lab.efforts["mixer"]
    rows = [
        Row(title, lambda title=title: row(title), paper,  # type: ignore[misc]
            full="" if title.endswith("2") else "quick mode takes the two blocks alone",
            why=f"trained for {effort.epochs} epochs on {effort.samples or 50000} images, and the paper names neither "
            "the widths of its Mixers nor how NRPM was fine-tuned")
        for title, paper in PAPER.items()
    ]  # fmt: skip
    claims = tuple(
        Claim(f"NRPM-MLP-Mixer-{blocks} beats LPM at every budget",
              lambda r, b=blocks: all(r[f"NRPM-MLP-Mixer-{b}"][i] > r[f"LPM-MLP-Mixer-{b}"][i] for i in range(1, 6)))  # type: ignore[misc]
        for blocks in (2, 4, 8)
    )  # fmt: skip
    return Experiment(
        "table-6", "MLP-Mixers, plain and reprogrammed, CIFAR-10, PGD-20", ("mixer",), COLUMNS, rows, claims,
        settings={"lambda": LAM, "tuning": TUNE, "tuned on": TUNED_ON},
        about=f"{lab.described('mixer')} Patches of 4, 128 channels, trained naturally; NRPM at lambda {LAM:g}, K = 1, "
        "eps = 1e-3, calibrated, then paradigm 3 on clean images. The attack takes "
        "steps of 2/255. Figure 8 draws these numbers.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
