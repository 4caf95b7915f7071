"""Compare AutoAttack by torchattacks' own class, by the suite `standard` and by its authors' code (the suite
`autoattack`, left out where it is not installed) with the suite `adaptive`, on the bundled model.

    OMP_NUM_THREADS=1 python scripts/compare_autoattack.py      # four minutes on one core

Writes results/autoattack.json and .md. All images are attacked in one batch.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torchattacks
from torch import Tensor, nn

import timm_nrpm
from timm_nrpm import Threat, evaluate
from timm_nrpm.attacks.library import ORIGINALS
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.modes import attackable
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

RESULTS = Path(__file__).parents[1] / "results"
SUITES = ("standard", "autoattack", "adaptive")


def by_torchattacks(model: nn.Module, pixels: Tensor, labels: Tensor, threat: Threat) -> dict[str, Any]:
    """Return the accuracy under torchattacks' own class, its seconds, and the accuracy after each of its attacks."""
    net, start = PixelModel(model), time.perf_counter()
    attack = torchattacks.AutoAttack(net, norm=threat.norm, eps=threat.eps, n_classes=10, seed=0)
    four = attack._autoattack
    four._multi_atk_records, four._accumulate_multi_atk_records = [0] * (1 + len(four.attacks)), True
    with attackable(net):
        attacked = attack(pixels, labels).detach()
    seconds = time.perf_counter() - start
    assert threat.allows(pixels, attacked).all()
    with torch.no_grad():
        right = (net(attacked).argmax(1) == labels).double().mean().item()
    counts = four._multi_atk_records[1:]
    after = {name: count / len(labels) for name, count in zip(ORIGINALS, counts, strict=True)}
    return {"accuracy": right, "seconds": seconds, "after": after}


def by_suite(suite: str, model: nn.Module, pixels: Tensor, labels: Tensor, threat: Threat) -> dict[str, Any] | None:
    """Return the same for a suite of this package; None if the suite is not installed."""
    if suite == "autoattack" and find_spec("autoattack") is None:
        return None
    report = evaluate(model, [(pixels, labels)], threat, suite, control=False, progress=True)
    left, after = report.correct, {"clean": report.accuracy()}
    for attack in report.attacks:
        left = tuple(was and now is not False for was, now in zip(left, attack.survived, strict=True))
        after[attack.name] = sum(left) / len(left)
    return {"accuracy": report.worst_case, "seconds": report.seconds, "after": after}


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "# AutoAttack by torchattacks and by its authors, and the suite `adaptive`",
        "",
        "`scripts/compare_autoattack.py`: the bundled model, plain, under "
        f"{content['threat']} on the first {content['images']} of the digits' test images; accuracy in %. "
        f"Measured with {', '.join(f'{key} {value}' for key, value in content['machine'].items())}.",
        "",
        "| | accuracy | seconds | after each attack |",
        "|---|---|---|---|",
    ]
    for name, row in content["rows"].items():
        cells = ["not installed", "", ""]
        if row is not None:
            after = ", ".join(f"{attack} {100 * share:.1f}" for attack, share in row["after"].items())
            cells = [f"**{100 * row['accuracy']:.1f}**", f"{row['seconds']:.0f}", after]
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--images", type=int, default=180, help="number of test images (default: the first 180)")
    parser.add_argument("--eps", type=float, default=0.12, help="Linf bound in pixel units (default: 0.12)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, threat = timm.create_model(DIGITS, pretrained=True).eval(), Threat("Linf", args.eps)
    pixels, labels = (part[: args.images] for part in digits("test"))
    rows: dict[str, Any] = {"torchattacks.AutoAttack": by_torchattacks(model, pixels, labels, threat)}
    rows |= {suite: by_suite(suite, model, pixels, labels, threat) for suite in SUITES}
    machine = {"torch": torch.__version__, "torchattacks": torchattacks.__version__}
    machine |= {"timm_nrpm": timm_nrpm.__version__, "cpu": platform.machine(), "threads": torch.get_num_threads()}
    content = {"model": DIGITS, "images": len(labels), "threat": str(threat), "machine": machine, "rows": rows}
    (args.out / "autoattack.json").write_text(json.dumps(content, indent=1) + "\n")
    text = markdown(content)
    (args.out / "autoattack.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
