"""Table 9: LeNet, plain and reprogrammed, SVHN, PGD-20.

python scripts/reproduce/table9.py --data DATA
"""

from __future__ import annotations

from experiment import Experiment, main
from lab import Lab
from lenets import plain_and_tuned

COLUMNS = ("0/255", "1/255", "2/255", "4/255", "8/255", "16/255", "32/255", "64/255")
PAPER = {
    "LPM-LeNet": (83.8, 68.6, 49.3, 27.1, 8.2, 3.0, 1.9, 1.3),
    "NRPM-LeNet": (83.2, 72.4, 54.6, 35.4, 20.1, 14.3, 11.8, 7.9),
}


def experiment(lab: Lab) -> Experiment:
    return plain_and_tuned(lab, "table-9", "SVHN", "svhn", "lenet_svhn", COLUMNS, PAPER)


if __name__ == "__main__":
    main(experiment)
