"""A real model from weights to a file: `results/real-model.md` and `.json`.

    python scripts/real_model.py --shared SHARED      # about ten minutes on an idle machine

timm's `tf_efficientnet_lite0` with its ImageNet weights is reprogrammed at several lambdas and calibrated on several
numbers of unlabelled photos; its accuracy on 213 labelled ones, its cost, and its export follow. A run that was stopped
goes on with what results/real-model.json holds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from adaptation_bases import photos, predictions
from bench import ROOT
from PIL import Image
from rich.progress import track
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import timm_nrpm
from timm_nrpm import NRPMConfig
from timm_nrpm.deployment.export import export
from timm_nrpm.evaluation.cost import cost
from timm_nrpm.evaluation.trials import Effect
from timm_nrpm.nn.wrappers import copied

LAMBDAS = (0.9, 0.8, 0.5, 0.0)
COUNTS = (0, 8, 32, 96)


def unlabelled(shared: Path, model: nn.Module) -> Tensor:
    """The photos without labels, `[N, 3, 224, 224]` in [0, 1], as timm's transform cuts them."""
    config = resolve_model_data_config(model)
    transform = create_transform(
        config["input_size"], mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )  # fmt: skip
    files = sorted((shared / "data" / "photos-unlabelled").glob("*.jpg"))
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files]).clamp(0, 1)


def right(model: nn.Module, pixels: Tensor, labels: Tensor) -> str:
    """A digit for each photo, 1 where the model is right."""
    return "".join(str(int(each)) for each in predictions(model, pixels) == labels)


def share(digits: str) -> float:
    return 100 * digits.count("1") / len(digits)


def markdown(found: dict[str, Any]) -> str:
    """The page of results."""
    plain, rows = found["plain"], found["rows"]
    lines = [
        "# A real model: `tf_efficientnet_lite0` on photos", "",
        f"ImageNet weights, {len(plain)} labelled photos of 136 classes, estimates of K = 3 with eps 1e-3 in all "
        f"layers; the plain model is right on {share(plain):.1f} %. Accuracy in %, by lambda and number of unlabelled "
        "photos that calibrated the model, with the difference from plain and its paired 95 % interval in points:", "",
        "| lambda | " + " | ".join(f"{count} photos" if count else "not calibrated" for count in COUNTS) + " |",
        "|---" * (1 + len(COUNTS)) + "|",
    ]  # fmt: skip
    for lam in LAMBDAS:
        cells = []
        for count in COUNTS:
            digits = rows.get(f"{lam} {count}")
            cells.append("" if digits is None else f"{share(digits):.1f}, {Effect.of(digits, plain)}")
        lines.append(f"| {lam:g} | {' | '.join(cells)} |")
    if "cost" in found:
        lines += ["", f"At lambda 0.8: {found['cost']}", "", f"Exported: `{found['export']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    base = photos(args.shared)
    pixels, labels = base.reported
    images = unlabelled(args.shared, base.model)
    file = args.out / "real-model.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}

    def keep() -> None:
        file.write_text(json.dumps(found, indent=1) + "\n")
        (args.out / "real-model.md").write_text(markdown(found))

    if "plain" not in found:
        found["plain"] = right(base.model, pixels, labels)
    cells = [(lam, count) for lam in LAMBDAS for count in COUNTS if f"{lam} {count}" not in found["rows"]]
    for lam, count in track(cells, "Calibrating"):
        model = timm_nrpm.reprogram_(copied(base.model), NRPMConfig(lam=lam))
        if count:
            timm_nrpm.calibrate_(model, list(images[:count].split(32)))
        found["rows"][f"{lam} {count}"] = right(model, pixels, labels)
        keep()
    if "export" not in found:
        model = timm_nrpm.reprogram_(copied(base.model), NRPMConfig(lam=0.8))
        timm_nrpm.calibrate_(model, list(images.split(32)))
        found["cost"] = str(cost(model)).splitlines()[0]
        with tempfile.TemporaryDirectory() as folder:
            done = export(model, Path(folder) / "model.onnx", example=images[:2], pixels=True)
            found["export"] = str(done).replace(f"{folder}/", "")
        keep()
    print(markdown(found))


if __name__ == "__main__":
    main()
