"""Figure 6: certified accuracy by randomized smoothing, narrow ResNet-18, CIFAR-10.

python scripts/reproduce/figure6.py --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import Claim, Experiment, Measured, Row, main
from lab import Lab
from table4 import NAME, TUNE_3, paradigm_3

from timm_nrpm import certify
from timm_nrpm.evaluation.certificates import CertificationReport
from timm_nrpm.figures.certified import draw_certified

SIGMAS, RADII = (0.06, 0.12, 0.25), (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
EFFORT = {"quick": {"images": 40, "n0": 20, "n": 200}, "full": {"images": 500, "n0": 100, "n": 10_000}}


def experiment(lab: Lab) -> Experiment:
    effort = EFFORT[lab.mode]

    def row(kind: str, sigma: float) -> Measured:
        model = lab.plain("resnet", NAME) if kind == "LPM" else paradigm_3(lab)
        pixels, labels = lab.some("resnet", effort["images"])
        report = certify(model, [(pixels, labels)], sigma, n0=effort["n0"], n=effort["n"], name=kind)
        return {"ours": [round(100 * report.certified_accuracy(radius), 1) for radius in RADII],
                "images": effort["images"], "report": report.to_json()}  # fmt: skip

    def draw(result: dict[str, Any], path: Path) -> None:
        draw_certified([CertificationReport.from_json(r["report"]) for r in result["rows"].values()], path)

    rows = [Row(f"{kind}, sigma {sigma:g}", lambda k=kind, s=sigma: row(k, s)) for sigma in SIGMAS  # type: ignore[misc]
            for kind in ("LPM", "NRPM")]  # fmt: skip

    def more(sigma: float) -> Claim:
        def holds(r: Mapping[str, Sequence[float]]) -> bool:
            pairs = list(zip(r[f"NRPM, sigma {sigma:g}"], r[f"LPM, sigma {sigma:g}"], strict=True))
            return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

        return Claim(f"NRPM is certified for no fewer images at any radius, for more at some, sigma {sigma:g}", holds)

    claims = [more(sigma) for sigma in SIGMAS]
    return Experiment(
        "figure-6", "certified accuracy, narrow ResNet-18, CIFAR-10", ("resnet",), [f"radius {r:g}" for r in RADII],
        rows, claims, draw=draw, settings={"effort": effort, "sigmas": SIGMAS, "paradigm 3": TUNE_3},
        about=f"{effort['images']} images, {effort['n']} samples each (the method's authors take 100,000), L2 radius "
        "in pixel units. LPM as published, NRPM by paradigm 3 of Table 4; neither was trained under noise. A "
        "certificate follows no gradient, so it is its own worst case. The paper gives no numbers with this figure.",
    )  # fmt: skip


if __name__ == "__main__":
    main(experiment)
