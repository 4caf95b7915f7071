"""Figure 10: picture of Table 8, with a panel for each lambda.

python scripts/reproduce/figure10.py --resume --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import table8
from experiment import Experiment, main
from lab import Lab
from pictures import lines


def experiment(lab: Lab) -> Experiment:
    def draw(result: dict[str, Any], path: Path) -> None:
        panels = {
            f"lambda {lam:g}": {f"K = {k}": table8.name_of(lam, k) for k in table8.ITERATIONS}
            for lam in sorted(table8.LAMBDAS)
        }
        lines(result, path, panels)

    return replace(table8.experiment(lab), key="figure-10", draws="table-8", draw=draw)


if __name__ == "__main__":
    main(experiment)
