"""`python -m timm_nrpm.cli.script train.py ...`: a script of timm, or any other, that knows the `nrpm_*` models.

The script runs as by `python train.py ...`, after `import timm_nrpm` has added the models to timm's registry. So
`torchrun -m timm_nrpm.cli.script train.py ...` works as well.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = "usage: python -m timm_nrpm.cli.script SCRIPT.py [its arguments]"


def main(arguments: list[str]) -> None:
    """Run a script as a program of its own.

    Args:
        arguments: Path of the script, and its arguments.

    Raises:
        SystemExit: No script is given, or there is no such file; otherwise whatever the script raises.
    """
    if not arguments:
        sys.exit(USAGE)
    path = Path(arguments[0])
    if not path.is_file():
        sys.exit(f"{path} is no file: give the path of a script, such as train.py of timm's repository.\n{USAGE}")
    sys.argv = list(arguments)
    sys.path[0] = str(path.resolve().parent)  # in the place of the current folder, which -m puts there
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
