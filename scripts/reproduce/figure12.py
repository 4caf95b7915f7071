"""Figure 12: picture of Table 11.

python scripts/reproduce/figure12.py --resume --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from dataclasses import replace

import table11
from experiment import Experiment, main
from lab import Lab
from pictures import bars


def experiment(lab: Lab) -> Experiment:
    return replace(table11.experiment(lab), key="figure-12", draws="table-11", draw=bars)


if __name__ == "__main__":
    main(experiment)
