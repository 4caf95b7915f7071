"""Every table and figure that this machine can measure, and results/README.md.

    python scripts/reproduce/all.py --quick --resume --data DATA --checkpoints CHECKPOINTS --authors CHECKOUT
    python scripts/reproduce/all.py --render    # the page alone, from the JSON files that are there

What cannot be had here is written down as not run, with its reason.
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
"""Files of results, and what measures them; Figures 1 and 2 are drawings of the method."""


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(MODULES), choices=MODULES, metavar="KEY", help="like table-4")
    parser.add_argument("--render", action="store_true", help="measure nothing, write results/README.md")
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
