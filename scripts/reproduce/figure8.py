"""Figure 8: picture of Table 6.

python scripts/reproduce/figure8.py --resume --data DATA
"""

from __future__ import annotations

from dataclasses import replace

import table6
from experiment import Experiment, main
from lab import Lab
from pictures import bars


def experiment(lab: Lab) -> Experiment:
    return replace(table6.experiment(lab), key="figure-8", draws="table-6", draw=bars)


if __name__ == "__main__":
    main(experiment)
