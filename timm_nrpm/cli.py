"""`timm-nrpm`: arguments in, the library's functions out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a failure that is explained, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="timm-nrpm", description="Reprogram pretrained timm models for robustness.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="reprogram and attack the bundled digits model")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for the picture and the variant")
    listing = commands.add_parser("list", help="architectures that can be reprogrammed whole")
    listing.add_argument("filter", nargs="?", default="", help="a wildcard, like 'resnet*'")
    args = parser.parse_args(arguments)
    try:
        if args.command == "demo":
            from timm_nrpm.demo import run

            return 0 if run(args.output, Console()) else 1
        from timm_nrpm.registry import list_models

        names = list_models(args.filter)
        if not names:
            raise ValueError(f"no architecture matches {args.filter!r}: give timm's names, with * and ?.")
        print("\n".join(names))
        return 0
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"timm-nrpm: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
