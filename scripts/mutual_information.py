"""Mutual information by `timm_nrpm.mutual_information.edge` against closed forms, and beside other estimators.

    python scripts/mutual_information.py
    python scripts/mutual_information.py --reference EDGE_4_3_1.py    # with the code of EDGE's authors beside it

Writes results/mutual-information.md. scikit-learn's estimator by nearest neighbours stands beside the others where both
variables have one coordinate, if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
from torch import Tensor

from timm_nrpm.subnetworks.mutual_information import edge

ROOT = Path(__file__).parents[1]
SEEDS, COUNTS = 5, (1000, 10_000)
SIZES, CORRELATIONS = (1, 2, 3, 5, 10, 20, 64), (0.0, 0.3, 0.5, 0.9)
Estimator = Callable[[Tensor, Tensor], float]


def gaussians(count: int, size: int, correlation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two variables `[N, D]` whose coordinates correlate in pairs, the first one turned so that no pair shows."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(count, size, generator=generator) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return x @ turn, correlation * x + math.sqrt(1 - correlation**2) * noise


def theirs(path: Path) -> Estimator:
    """The estimator of EDGE's authors, with its default settings; it prints, and counts in bits."""
    sys.modules.setdefault("cvxpy", types.ModuleType("cvxpy"))  # which it imports and does not use by default
    np.asscalar = lambda array: array.item()  # type: ignore[attr-defined]  # NumPy has it no more
    spec = importlib.util.spec_from_file_location("edge_of_its_authors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(x: Tensor, y: Tensor) -> float:
        with contextlib.redirect_stdout(None):
            return float(module.EDGE(x.double().numpy(), y.double().numpy())) * math.log(2)

    return run


def neighbours(x: Tensor, y: Tensor) -> float:
    """scikit-learn's estimator (Kraskov et al.), for one coordinate each."""
    from sklearn.feature_selection import mutual_info_regression

    return float(mutual_info_regression(x.numpy(), y[:, 0].numpy(), random_state=0)[0])


def classes(count: int, distance: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Ten classes around ten centres at a distance, in ten coordinates, and what their Gaussians tell of the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=generator)
    x = torch.randn(count, 10, generator=generator) + distance * torch.nn.functional.one_hot(y, 10)
    posterior = (distance * x).log_softmax(1)[torch.arange(count), y]
    return x, y, math.log(10) + float(posterior.mean())


def of_classes() -> list[str]:
    """The rows of a discrete variable beside ten coordinates."""
    lines = ["| samples | distance | from the posterior | `edge` |", "|---|---|---|---|"]
    for count in COUNTS:
        for distance in (0.0, 1.0, 2.0, 6.0):
            drawn = [classes(count, distance, seed) for seed in range(SEEDS)]
            found = [edge(x, y) for x, y, _ in drawn]
            true = mean(each for *_, each in drawn)
            lines.append(f"| {count} | {distance:g} | {true:.3f} | {mean(found):.3f} ± {stdev(found):.3f} |")
    return lines


def cell(estimator: Estimator | None, count: int, size: int, correlation: float) -> str:
    """Mean and standard deviation over the seeds; a dash where the estimator does not apply."""
    if estimator is None:
        return "-"
    found = [estimator(*gaussians(count, size, correlation, seed)) for seed in range(SEEDS)]
    return f"{mean(found):.3f} ± {stdev(found):.3f}"


def table(reference: Estimator | None) -> list[str]:
    """The rows of all Gaussians."""
    has_neighbours = importlib.util.find_spec("sklearn") is not None
    names = ["samples", "coordinates", "correlation", "closed form", "`edge`", "nearest neighbours"]
    names += ["EDGE's authors"] if reference else []
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for count in COUNTS:
        for size in SIZES:
            for correlation in CORRELATIONS:
                true = abs(size / 2 * math.log(1 - correlation**2))
                row = [f"{count}", f"{size}", f"{correlation:g}", f"{true:.3f}", cell(edge, count, size, correlation)]
                row.append(cell(neighbours if size == 1 and has_neighbours else None, count, size, correlation))
                if reference:  # it takes seconds for a thousand samples
                    row.append(cell(reference if count == COUNTS[0] else None, count, size, correlation))
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    return lines


def times() -> list[str]:
    """Seconds over the number of samples, of ten coordinates."""
    lines = ["| samples | seconds |", "|---|---|"]
    for count in (10_000, 20_000, 50_000, 100_000, 200_000):
        x, y = gaussians(count, 10, 0.5, 0)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            edge(x, y)
            seconds.append(time.perf_counter() - start)
        lines.append(f"| {count} | {median(seconds):.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reference", type=Path, help="the file EDGE_4_3_1.py of EDGE's authors")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    reference = None if args.reference is None else theirs(args.reference)
    text = [
        "# Mutual information against closed forms", "",
        f"Gaussians whose coordinates correlate in pairs, the first variable turned at random, in nats: the mean of "
        f"{SEEDS} draws ± their standard deviation. `python scripts/mutual_information.py`.", "", *table(reference), "",
        "Ten classes, each with a Gaussian around a centre of its own in ten coordinates:", "", *of_classes(), "",
        "Time of `edge` for ten coordinates of correlation 0.5, the median of three:", "", *times(), "",
    ]  # fmt: skip
    (args.out / "mutual-information.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
