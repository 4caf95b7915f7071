"""Compare the adaptive suite with that of an older checkout: what each leaves and its time, by turns in one run.

    OMP_NUM_THREADS=1 python scripts/compare_suites.py --old CHECKOUT    # two minutes on one core

Both attack the bundled model at lambda 0.4 (K = 3, eps 1e-3), calibrated on the first 1000 training images, and its
plain model, under Linf 0.15 on the first 180 test images. CHECKOUT is a work tree of an older commit. Writes
results/suites.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES, ROUNDS = 180, 3

MEASURE = """
import inspect, json, time, torch, timm_nrpm
from timm_nrpm.data.loaders import digits
torch.set_num_threads(1)
(train, _), (pixels, labels) = digits("train"), digits("test")
model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.4).eval()
images = train[:1000]
if "mean" not in inspect.signature(timm_nrpm.calibrate_).parameters:  # older versions took normalised images
    images = (images - 0.5) / 0.5
timm_nrpm.calibrate_(model, [images])
data = [(pixels[:%d], labels[:%d])]
start = time.perf_counter()
report = timm_nrpm.evaluate(model, data, timm_nrpm.Threat("Linf", 0.15))
seconds = time.perf_counter() - start
run = {"seconds": seconds, "worst_case": report.worst_case, "plain": report.control.worst_case}
run["forwards"] = sum(attack.forwards for attack in report.attacks)
run["backwards"] = sum(attack.backwards for attack in report.attacks)
print(json.dumps(run))
"""


def measured(checkout: Path, images: int) -> dict[str, Any]:
    """Return what the package of a checkout measures, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE % (images, images)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return run


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "# The adaptive suite, before and now",
        "",
        "`scripts/compare_suites.py`: the bundled model at lambda 0.4, calibrated, Linf 0.15, "
        f"{content['images']} images, its plain model beside it; {content['rounds']} runs each, by turns, one thread, "
        f"torch {content['torch']}. Accuracies in %; passes are images that went through a model, of the reprogrammed "
        "model's attacks; seconds are medians, of both models.",
        "",
        "| | worst case | plain model's | forwards | backwards | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in content["runs"].items():
        first, seconds = runs[0], statistics.median(run["seconds"] for run in runs)
        shares = (f"**{100 * first['worst_case']:.1f}**", f"{100 * first['plain']:.1f}")
        lines.append(
            f"| {name} | "
            + " | ".join((*shares, f"{first['forwards']:,}", f"{first['backwards']:,}", f"{seconds:.1f}"))
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=Path, required=True, help="work tree of an older commit")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of test images (default: 180)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each suite (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    for _ in range(args.rounds):
        runs["before"].append(measured(args.old.resolve(), args.images))
        runs["now"].append(measured(ROOT, args.images))
    import torch

    content = {
        "images": args.images,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "cpu": platform.machine(),
        "runs": runs,
    }
    (args.out / "suites.json").write_text(json.dumps(content, indent=1) + "\n")
    text = markdown(content)
    (args.out / "suites.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
