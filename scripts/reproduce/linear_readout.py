"""The second paper (arXiv 2307.03803): Table 2, the logits of a robust network as a linear combination of the outputs
of its early layers (Algorithm 2).

    python scripts/reproduce/linear_readout.py --data DATA --checkpoints CHECKPOINTS

Measures the narrow ResNet-18 with its published robust weights. Writes results/linear-readout.json and .md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lab import Lab
from rich.progress import track
from torch import Tensor

from timm_nrpm import Threat
from timm_nrpm.attacks.library import Run, auto_attack, fgsm, pgd
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.attacked import attacked
from timm_nrpm.subnetworks.linear import LinearReadout, linear_readout
from timm_nrpm.subnetworks.splitting import split

ROOT = Path(__file__).parents[2]
NETWORK, IMAGES, BATCH, EPS = "resnet18_cifar_narrow", 600, 50, 8 / 255
EARLY = (17, 13, 9)
PAPER = {
    "clean": {17: (69.7, 61.59, 9.93), 13: (69.7, 60.64, 10.17), 9: (69.7, 58.47, 8.58)},
    "FGSM": {17: (43.08, 42.91, 14.67), 13: (43.08, 42.46, 12.77), 9: (43.08, 41.19, 8.07)},
    "PGD": {17: (38.63, 40.41, 8.91), 13: (38.63, 40.13, 10.1), 9: (38.63, 39.47, 6.82)},
    "AutoAttack": {17: (34.11, 48.5, 7.12), 13: (34.11, 48.29, 9.63), 9: (34.11, 47.15, 9.75)},
}
"""The paper's Table 2 in %, of a ResNet-18 eight times as wide: the network, the combination, and random weights."""


def right(net: PixelModel, pixels: Tensor, labels: Tensor) -> Tensor:
    """Which images a network is right on, `[B]`."""
    with torch.no_grad():
        return net(pixels).argmax(1).eq(labels)


def attacks(threat: Threat, classes: int) -> dict[str, Run]:
    """The attacks of the table by name; AutoAttack goes on with the images that a part of it has left."""
    parts = auto_attack(threat, classes).values()

    def together(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        changed = pixels.clone()
        for run in parts:
            left = right(net, changed, labels).nonzero()[:, 0]
            if len(left):
                found = run(net, pixels[left], labels[left], [seeds[place] for place in left.tolist()])
                broken = ~right(net, found, labels[left])
                changed[left[broken]] = found[broken]
        return changed

    return {"FGSM": fgsm(threat.eps), "PGD": pgd(threat, 10), "AutoAttack": together}


def measure(lab: Lab) -> dict[str, dict[int, LinearReadout]]:
    """Combine the outputs of the early layers on clean and on attacked test images."""
    model = lab.plain("resnet", NETWORK)
    net = PixelModel(model).to(lab.device).eval()
    pixels, labels = lab.images("cifar10", "test", IMAGES)
    order = [place for start in range(IMAGES // BATCH) for place in range(start, len(labels), IMAGES // BATCH)]
    images = list(zip(pixels[order].split(BATCH), labels[order].split(BATCH), strict=True))  # every class in each batch
    kinds = {"clean": images}
    for name, run in attacks(Threat("Linf", EPS), 10).items():
        kinds[name] = [attacked(net, [batch], run)[0] for batch in track(images, name)]
    parts = {early: split(model, 18 - early) for early in EARLY}
    return {
        name: {early: linear_readout(net, batches, each) for early, each in parts.items()}
        for name, batches in kinds.items()
    }


def page(found: dict[str, dict[int, LinearReadout]], network: str, images: int) -> str:
    """The page of the results."""
    lines = [
        "# The logits as a linear combination of early layers (Algorithm 2)", "",
        f"`{network}` with its published robust weights, {images} test images of CIFAR-10 in batches of {BATCH}, Linf "
        f"{EPS * 255:g}/255, in %. The combination is solved for each batch and averaged. Under *solved* it is judged "
        "on the very images that it was solved on, as in the paper; under *held out* on batches that it was not solved "
        "on (the even ones for the odd ones, and the reverse). In brackets, the paper's numbers of a ResNet-18 eight "
        "times as wide, on all test images.", "",
        "| attack | layers | outputs | A(F*) | solved | held out | random weights |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, rows in found.items():
        for early, row in rows.items():
            network_of_paper, solved, random = PAPER[name][early]
            cells = [
                f"{100 * row.network:.1f} [{network_of_paper:g}]", f"{100 * row.solved:.1f} [{solved:g}]",
                f"{100 * row.held_out:.1f}", f"{100 * row.random:.1f} [{random:g}]",
            ]  # fmt: skip
            lines.append(f"| {name} | {early} | {row.values} | {' | '.join(cells)} |")
    above = {
        kind: [name for name, rows in found.items() if all(getattr(row, kind) > row.network for row in rows.values())]
        for kind in ("solved", "held_out")
    }
    lines += [
        "", f"The combination is right on more images than the network, with any number of layers, under "
        f"{', '.join(above['solved']) or 'no attack'}; on images that it was not solved on, under "
        f"{', '.join(above['held_out']) or 'no attack'}. What is attacked is the network, never the combination: its "
        "own worst case is not in this table.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of published weights")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    with TemporaryDirectory() as kept:
        found = measure(Lab("quick", args.data, args.checkpoints, Path(kept)))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {name: {early: asdict(row) for early, row in each.items()} for name, each in found.items()}
    (args.out / "linear-readout.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "linear-readout.md").write_text(page(found, NETWORK, IMAGES))


if __name__ == "__main__":
    main()
