"""Figure 4: adversarial fine-tuning of LeNet, plain and reprogrammed, epoch by epoch, MNIST, FGSM.

python scripts/reproduce/figure4.py --data DATA
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiment import Claim, Experiment, Measured, Row, main
from figure3 import COLUMNS, NAME
from lab import Lab
from torch import nn

from timm_nrpm.figures import canvas

LAM, EPS = 0.3, 0.3
TUNE: dict[str, Any] = {"paradigm": "all", "objective": "clean+fgsm", "eps": EPS, "optimizer": "momentum", "lr": 0.01,
                        "lam_lr": 0.001, "schedule": "constant", "epochs": 1}  # fmt: skip
QUICK = (3, 10_000)
"""Numbers of epochs and of images per epoch."""


def experiment(lab: Lab) -> Experiment:
    epochs, samples = QUICK if lab.mode == "quick" else (10, None)

    def tuned(kind: str, epoch: int) -> nn.Module:
        model = lab.reprogrammed("lenet", NAME, LAM if kind == "NRPM" else 1.0)
        for number in range(epoch):
            settings = {**TUNE, "seed": number}
            if kind == "LPM":
                settings["trainable"] = ("*.weight", "*.bias")
            model = lab.tuned("lenet", model, settings, samples)
        return model

    def row(kind: str, epoch: int) -> Measured:
        return lab.measured("lenet", tuned(kind, epoch))

    def draw(result: dict[str, Any], path: Path) -> None:
        figure = canvas.figure(8.4, 3.8)
        for panel, column in zip(figure.subplots(1, 2), (0, -1), strict=True):
            for kind, (colour, marker, _) in zip(("LPM", "NRPM"), canvas.STYLES, strict=False):
                measured = [result["rows"][f"{kind}, epoch {e}"] for e in range(epochs + 1)]
                for measure, line in (("ours", "-"), ("worst case", "--")):
                    label = kind if measure == "ours" else f"{kind}, worst case"
                    heights = [row[measure][column] if measure in row else float("nan") for row in measured]
                    panel.plot(range(epochs + 1), heights, line, color=colour, marker=marker, markersize=4, label=label)
            panel.set(title=f"budget {result['columns'][column]}", xlabel="epoch", ylabel="accuracy, %", ylim=(-2, 102))
            panel.set_xticks(range(epochs + 1))
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
        figure.savefig(path, dpi=120)

    rows = [Row(f"{kind}, epoch {e}", lambda k=kind, e=e: row(k, e)) for kind in ("LPM", "NRPM")  # type: ignore[misc]
            for e in range(epochs + 1)]  # fmt: skip

    def above(column: int, what: str) -> Claim:
        return Claim(
            f"NRPM is above LPM after every epoch, {what}",
            lambda r: all(r[f"NRPM, epoch {e}"][column] > r[f"LPM, epoch {e}"][column] for e in range(1, epochs + 1)),
        )

    return Experiment(
        "figure-4", "adversarial fine-tuning of LeNet, MNIST, FGSM", ("lenet",), COLUMNS, rows,
        (above(0, "clean"), above(-1, f"at {EPS:g}")), draw=draw,
        settings={"tuning": TUNE, "lambda": LAM, "epochs": epochs, "samples": samples},
        about=f"{lab.described('lenet')} The naturally trained LeNet of Figure 3, tuned on "
        f"clean images and, summed, under FGSM at {EPS:g}, "
        f"{samples or 60000} images an epoch; NRPM starts at lambda {LAM:g} and learns it. "
        "The paper gives no numbers with this figure.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
