"""Figure 11: the same as Figure 5 for another image.

python scripts/reproduce/figure11.py --data DATA
"""

from __future__ import annotations

import figure5
from experiment import Experiment, main
from lab import Lab


def experiment(lab: Lab) -> Experiment:
    return figure5.experiment(lab, "figure-11", number=7)


if __name__ == "__main__":
    main(experiment)
