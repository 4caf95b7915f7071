"""Table 10: LeNet, plain and reprogrammed, ImageNet10, PGD-20.

python scripts/reproduce/table10.py --data DATA
"""

from __future__ import annotations

from experiment import Experiment, main
from lab import Lab
from lenets import plain_and_tuned

COLUMNS = ("0/255", "2/255", "4/255", "8/255")
PAPER = {
    "LPM-LeNet": (53.72, 13.11, 7.67, 3.89),
    "NRPM-LeNet": (53.55, 15.06, 13.68, 12.50),
}


def experiment(lab: Lab) -> Experiment:
    return plain_and_tuned(lab, "table-10", "ImageNet10", "imagenet10", "lenet_imagenet10", COLUMNS, PAPER)


if __name__ == "__main__":
    main(experiment)
