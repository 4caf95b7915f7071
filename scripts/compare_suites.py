"""Compare the adaptive suite with that of an older checkout: what each leaves and its time, by turns in one run.

    python scripts/compare_suites.py --old CHECKOUT --shared SHARED    # seven minutes on two cores

Two models are attacked, each with its plain model beside it: the bundled model at lambda 0.4 (K = 3, eps 1e-3),
calibrated on the first 1000 training images, under Linf 0.15 on the first 180 test images; and, if SHARED is given,
the published narrow ResNet-18 at lambda 0.5, calibrated, under Linf 8/255 on 100 images. CHECKOUT is a work tree of an
older commit; SHARED holds checkpoints/ and data/, see scripts/reproduce/worst_case.py. Writes results/suites.json and
.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DIGITS = """
try:
    from timm_nrpm.data.loaders import digits
except ImportError:  # older versions
    from timm_nrpm.data import digits
(train, _), (pixels, labels) = digits("train"), digits("test")
model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.4).eval()
images = train[:1000]
if "mean" not in inspect.signature(timm_nrpm.calibrate_).parameters:  # older versions took normalised images
    images = (images - 0.5) / 0.5
timm_nrpm.calibrate_(model, [images])
data, threat = [(pixels[:180], labels[:180])], timm_nrpm.Threat("Linf", 0.15)
"""

PUBLISHED = """
sys.path.insert(0, "scripts/reproduce")
import worst_case
(case,) = (case for case in worst_case.CASES if str(case) == "resnet18-0.5-calibrated")
model = worst_case.model_of(case, Path(sys.argv[1]))
data, threat = [worst_case.images("resnet18", Path(sys.argv[1]), "test", 100)], timm_nrpm.Threat("Linf", 8 / 255)
"""

MEASURE = """
import inspect, json, sys, time, torch, timm_nrpm
from pathlib import Path
torch.set_num_threads(%d)
%s
start = time.perf_counter()
report = timm_nrpm.evaluate(model, data, threat%s)
seconds = time.perf_counter() - start
run = {"seconds": seconds, "worst_case": report.worst_case, "plain": report.control.worst_case}
run["left"] = [bool(all(a.survived[i] is not False for a in report.attacks)) and bool(c) for i, c in
               enumerate(report.correct if hasattr(report, "correct") else report.clean)]
run["forwards"] = sum(attack.forwards for attack in report.attacks)
run["backwards"] = sum(attack.backwards for attack in report.attacks)
print(json.dumps(run))
"""


@dataclass(frozen=True)
class Case:
    """A model under attack.

    Attributes:
        title: Description of the model, its images and the threat.
        code: Code that makes `model`, `data` and `threat`.
        rounds: Number of runs of each suite.
    """

    title: str
    code: str
    rounds: int


CASES = {
    "digits": Case("The bundled model at lambda 0.4, Linf 0.15, 180 images", DIGITS, 3),
    "resnet18": Case("The published narrow ResNet-18 at lambda 0.5, Linf 8/255, 100 images", PUBLISHED, 1),
}


def measured(checkout: Path, case: Case, shared: Path | None, threads: int, effort: str) -> dict[str, Any]:
    """Return what the package of a checkout measures, in a process of its own."""
    argument = f", effort={effort!r}" if effort else ""  # which older versions did not have
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE % (threads, case.code, argument), str(shared)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True, check=True)
    run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return run


def markdown(content: dict[str, Any]) -> str:
    """Return the page of results: a table for each model."""
    lines = [
        "# The adaptive suite, before and now",
        "",
        f"`scripts/compare_suites.py`, by turns, threads: {content['threads']}, torch {content['torch']}, "
        f"{content['cpu']}. Each model's plain model is attacked beside it. Accuracies in %; passes are images that "
        "went through a model, of the reprogrammed model's attacks; seconds are medians, of both models.",
    ]
    for name, runs in content["runs"].items():
        lines += ["", f"## {CASES[name].title}", ""]
        lines += ["| | runs | worst case | plain model's | forwards | backwards | seconds | share |", "|" + "---|" * 8]
        medians = {when: statistics.median(run["seconds"] for run in several) for when, several in runs.items()}
        for when, several in runs.items():
            first = several[0]
            shares = (f"**{100 * first['worst_case']:.1f}**", f"{100 * first['plain']:.1f}")
            passes = (f"{first['forwards']:,}", f"{first['backwards']:,}")
            times = (f"{medians[when]:.1f}", f"{medians[when] / medians['before']:.2f}")
            lines.append("| " + " | ".join((when, str(len(several)), *shares, *passes, *times)) + " |")
        before, *later = (several[0]["left"] for several in runs.values())
        risen = [sum(late and not early for early, late in zip(before, left, strict=True)) for left in later]
        lines += ["", f"Images that are left and were not left before: {risen[0]}, and {risen[1]} with `fast`."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=Path, required=True, help="work tree of an older commit")
    parser.add_argument("--shared", type=Path, help="folder with checkpoints/ and data/ (default: the digits alone)")
    parser.add_argument("--threads", type=int, default=2, help="number of threads (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    shared = None if args.shared is None else args.shared.resolve()
    for name, case in CASES.items():
        if name == "resnet18" and shared is None:
            continue
        kinds = {"before": (args.old.resolve(), ""), "now": (ROOT, "default"), 'now, effort="fast"': (ROOT, "fast")}
        runs[name] = {when: [] for when in kinds}
        for _ in range(case.rounds):
            for when, (checkout, effort) in kinds.items():
                runs[name][when].append(measured(checkout, case, shared, args.threads, effort))
                print(name, when, f"{runs[name][when][-1]['seconds']:.1f} s", flush=True)
    import torch
    from bench import machine

    content = {"threads": args.threads, "torch": torch.__version__, "cpu": machine("cpu")["cpu"], "runs": runs}
    (args.out / "suites.json").write_text(json.dumps(content, indent=1) + "\n")
    text = markdown(content)
    (args.out / "suites.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
