"""Figure 5: what an attack does to the embeddings of one image in LeNet, plain and reprogrammed, MNIST.

python scripts/reproduce/figure5.py --data DATA
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from experiment import Claim, Experiment, Measured, Row, main
from lab import BATCH, Lab
from table3 import EPS, LAM, NAME
from torch import Tensor, nn

from timm_nrpm.attacks.library import fgsm
from timm_nrpm.figures.diagnostics import draw_embeddings
from timm_nrpm.nn.pixel_model import PixelModel

ROWS = {"LPM": "LPM", "NRPM": "NRPM", "NRPM, attacked on the plain model": "LPM"}
"""For each row, the model on which its attack is made."""


def experiment(lab: Lab, key: str = "figure-5", number: int = 0) -> Experiment:
    """Return the experiment. It draws the `number`-th image that the attack breaks in LPM and not in NRPM."""

    def models() -> dict[str, nn.Module]:
        return {name: lab.reprogrammed("lenet", NAME, lam) for name, lam in (("LPM", 1.0), ("NRPM", LAM))}

    def seen(row: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
        both = models()
        pixels, labels = (part[:BATCH] for part in lab.some("lenet"))
        source = PixelModel(both[ROWS[row]]).eval()
        return both[row.split(",")[0]], pixels, fgsm(EPS)(source, pixels, labels, [0]), labels

    def right(row: str) -> tuple[Tensor, Tensor]:
        model, pixels, attacked, labels = seen(row)
        with torch.no_grad():
            clean, after = (PixelModel(model).eval()(x).argmax(1) == labels for x in (pixels, attacked))
        return clean, after & clean

    def measure(row: str) -> Measured:
        return {"ours": [round(100 * float(share.float().mean()), 1) for share in right(row)], "images": BATCH}

    def draw(result: dict[str, Any], path: Path) -> None:
        fooled, kept = right("LPM"), right("NRPM")
        candidates = (fooled[0] & ~fooled[1] & kept[1]).nonzero().flatten().tolist()
        if not candidates:
            return
        chosen = candidates[number % len(candidates)]
        attacked = {name: seen(name)[2][chosen : chosen + 1] for name in ("LPM", "NRPM")}
        pixels = lab.some("lenet")[0][chosen : chosen + 1]
        draw_embeddings(models(), pixels, attacked, path, ("conv1", "conv2", "fc1", "fc2"))

    claims = (
        Claim("the attack misleads LPM on most images, and NRPM on fewer",
              lambda r: r["LPM"][1] < r["LPM"][0] / 2 and r["NRPM"][1] > r["LPM"][1]),
        Claim("(ours) so does the attack made on the plain model",
              lambda r: r["NRPM, attacked on the plain model"][1] > r["LPM"][1]),
    )  # fmt: skip
    return Experiment(
        key, "embeddings of LeNet under attack, MNIST", ("lenet",), ("natural", f"FGSM, {EPS:g}"),
        [Row(row, lambda row=row: measure(row)) for row in ROWS], claims, draw=draw,  # type: ignore[misc]
        settings={"lambda": LAM, "eps": EPS, "images": BATCH, "picture": number},
        about=f"Accuracy in % of {BATCH} test images; lambda {LAM:g}, K = 1, eps = 1e-3. A picture is drawn of an "
        "image that the attack on LPM misleads and that on NRPM does not, if there is one.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
