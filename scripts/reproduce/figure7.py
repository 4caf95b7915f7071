"""Figure 7: picture of Table 12.

python scripts/reproduce/figure7.py --resume --data DATA --checkpoints CHECKPOINTS
"""

from __future__ import annotations

from dataclasses import replace

import table12
from experiment import Experiment, main
from lab import Lab
from pictures import bars


def experiment(lab: Lab) -> Experiment:
    return replace(table12.experiment(lab), key="figure-7", draws="table-12", draw=bars)


if __name__ == "__main__":
    main(experiment)
