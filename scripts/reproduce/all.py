"""Measure every table and figure that this machine can, and write results/README.md.

    python scripts/reproduce/all.py --quick --resume --data DATA --checkpoints CHECKPOINTS --authors CHECKOUT
    python scripts/reproduce/all.py --render    # only the page, from the JSON files that are there
    python scripts/reproduce/all.py --full --minutes 9 --out OUT --data DATA --checkpoints CHECKPOINTS

With --minutes a run stops after so long with exit status 75, and the same command goes on where it was, in the middle
of a model's training or of an attack: time on a GPU that is lent by the quarter of an hour adds up. What has to come
along is the folder OUT, with what it keeps in OUT/.kept.

What cannot be measured here is listed as not run, with the reason.
"""

from __future__ import annotations

import sys
from importlib import import_module

from experiment import arguments, lab_of
from verdicts import page, read, summary

TABLES, FIGURES = range(1, 13), range(3, 13)
MODULES = {
    **{f"table-{n}": f"table{n}" for n in TABLES},
    **{f"figure-{n}": f"figure{n}" for n in FIGURES},
    "ablations": "ablations",
    "parity": "parity",
}
"""Modules by the key of their result; Figures 1 and 2 are drawings of the method."""


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=list(MODULES), choices=MODULES, metavar="KEY", help="run these alone, like table-4"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, only write results/README.md")
    args = parser.parse_args()
    lab = lab_of(args)
    for key in () if args.render else args.only:
        try:
            result = import_module(MODULES[key]).experiment(lab).run(lab, args.out, resume=args.resume)
        except ValueError as error:
            sys.exit(f"{key}: {error}")
        print(f"{key}: {summary(result)}", flush=True)
    results, missing = read(args.out, list(MODULES))
    (args.out / "README.md").write_text(page(results, missing))
    print(args.out / "README.md")


if __name__ == "__main__":
    main()
