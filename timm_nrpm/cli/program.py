"""`timm-nrpm`: arguments in, the library's functions out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from timm_nrpm.cli import evaluate as evaluate_command
from timm_nrpm.cli import hub as hub_commands
from timm_nrpm.cli import options
from timm_nrpm.cli import tune as tune_command
from timm_nrpm.cli.given import WrongCall, completed, keep_defaults_apart
from timm_nrpm.cli.wording import message_of, worded

STOPPED = "Start the same command again."
"""How to go on after Ctrl-C, where a command says nothing else."""

NAMES: Mapping[str, dict[str, str]] = {
    "push": {"revision": "--branch", "datasets": "--dataset", "reports": "--report", "private=False": "--public"},
    "pull": {"local_files_only": "--offline"},
    "inspect": {"local_files_only": "--offline"},
}
"""Of the commands of the Hub, flags of arguments of another name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 0; 1 for a failure that is explained; 2 for a wrong call; and, as shells have it, 130 after
        Ctrl-C, 143 after SIGTERM, and 141 where nobody reads the output any more.
    """
    parser, commands = _parsers()
    args = parser.parse_args(arguments)
    command = commands[args.command]
    names = {**NAMES.get(args.command, {}), **getattr(args, "names", {})}
    try:
        with _terminable(), _worded_warnings(command, names):
            args = completed(args, command)
            status: int = args.run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, _Terminated) else signal.SIGINT
        again = getattr(args, "stopped", STOPPED).format(**{**args.defaults, **vars(args)})
        options.note(f"stopped. {again}")
        return 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 128 + signal.SIGPIPE
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"timm-nrpm: {message_of(error, command, names)}", file=sys.stderr)
        return 2 if isinstance(error, WrongCall) else 1


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    parser = argparse.ArgumentParser(prog="timm-nrpm", description="Reprogram pretrained timm models for robustness.")
    commands: Any = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    demo = commands.add_parser("demo", help="reprogram and attack the bundled digits model")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for the picture and the variant")
    demo.set_defaults(run=_demo)
    listing = commands.add_parser("models", help="architectures that can be reprogrammed whole")
    listing.add_argument("filter", nargs="?", default="", help="a wildcard, like 'resnet*'")
    listing.set_defaults(run=_models)
    tune_command.add_command(commands)
    evaluate_command.add_command(commands)
    hub_commands.add_commands(commands)
    for command in commands.choices.values():
        keep_defaults_apart(command)
    return parser, commands.choices


def _demo(args: argparse.Namespace) -> int:
    from timm_nrpm.cli.demo import run

    return 0 if run(args.output, Console()) else 1


def _models(args: argparse.Namespace) -> int:
    from timm_nrpm.models.registry import list_models

    names = list_models(args.filter)
    if not names:
        raise ValueError(f"no architecture matches {args.filter!r}: give timm's names, with * and ?.")
    print("\n".join(names))
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Meanwhile, SIGTERM ends a command as Ctrl-C does, unless somebody else waits for it or ignores it."""

    def stop(number: int, _: Any) -> None:
        raise _Terminated(number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _worded_warnings(command: argparse.ArgumentParser, names: Mapping[str, str]) -> Iterator[None]:
    """Meanwhile, warnings of this package are one line in the words of the command."""
    shown, package = warnings.showwarning, str(Path(__file__).parents[1])

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(package) or category.__module__.startswith("timm_nrpm"):
            print(f"timm-nrpm: warning: {worded(str(message), command, names)}", file=file or sys.stderr)
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


if __name__ == "__main__":
    sys.exit(main())
