"""Measure the published narrow ResNet-18, reprogrammed and plain, under ImageNet-C's corruptions.

    python scripts/reproduce/corruptions.py --weights tinyresnet18_cifar10_model.t7 --root CIFAR    # a few minutes

CIFAR holds train.tar and test.tar. Writes corruptions-resnet18.json and .png. The paper has no such numbers. They are
not comparable with CIFAR-10-C, whose severities were chosen for images of 32 pixels.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import timm
import torch
from torch import Tensor

from timm_nrpm import NRPMConfig, calibrate_, reprogram_
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.evaluation.corruptions import IMAGENET_C, SEVERITIES, SMALLEST, evaluate_corruptions
from timm_nrpm.figures.corruptions import draw_corruptions
from timm_nrpm.models.backbones import load_published_

RESULTS = Path(__file__).parents[2] / "results"
NAME = "resnet18_cifar_narrow"
SIDE = 32
KINDS = tuple(kind for kind in IMAGENET_C if SMALLEST[kind] <= SIDE)
LAM, K, EPS = 0.5, 1, 5e-4  # the paper's K and eps
LAYERS = tuple(f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2))  # as published
CALIBRATED = 1000
BATCH = 250


def images(root: Path, split: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return `count` images and labels in batches, chosen evenly from the split, since its tar is ordered by class."""
    dataset = pixel_loader("tar", root, split=split, input_size=(3, SIDE, SIDE)).dataset
    size = len(dataset)  # type: ignore[arg-type]  # these datasets have a length
    pairs = [dataset[i * size // count] for i in range(count)]
    # The memory layout decides the order of sums, and so their rounding.
    pixels = torch.stack([pixels for pixels, _ in pairs]).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([label for _, label in pairs])
    return list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="the authors' tinyresnet18_cifar10_model.t7")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds train.tar and test.tar")
    parser.add_argument("--images", type=int, default=100, help="number of test images, chosen evenly (default: 100)")
    parser.add_argument(
        "--severities", type=int, nargs="+", default=[1, 3, 5], choices=SEVERITIES, help="severities (default: 1 3 5)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plain = load_published_(timm.create_model(NAME), args.weights)
    model = reprogram_(plain, NRPMConfig(lam=LAM, iterations=K, eps=EPS, layers=LAYERS)).eval()
    calibrate_(model, [pixels for pixels, _ in images(args.root, "train", CALIBRATED)])
    report = evaluate_corruptions(
        model, images(args.root, "test", args.images), KINDS, tuple(args.severities), progress=True
    )
    settings = {"model": NAME, "lambda": LAM, "K": K, "eps": EPS, "layers": LAYERS, "calibrated on": CALIBRATED}
    settings |= {"images": args.images, "severities": args.severities, "kinds": KINDS}
    machine = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    content = {"settings": settings, "machine": machine, "report": json.loads(report.to_json())}
    (args.out / "corruptions-resnet18.json").write_text(json.dumps(content, indent=1) + "\n")
    draw_corruptions(report, args.out / "corruptions-resnet18.png")
    print(report)


if __name__ == "__main__":
    main()
