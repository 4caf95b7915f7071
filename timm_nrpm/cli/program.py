"""`timm-nrpm`: arguments in, the library's functions out."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

import shtab

from timm_nrpm.cli import advise, cost, create, evaluate, export, hub, measure, options, plot, search, subnetwork, tune
from timm_nrpm.cli.given import WrongCall, completed, keep_defaults_apart
from timm_nrpm.cli.options import Command
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.cli.wording import message_of, worded
from timm_nrpm.errors import HubError, Unreachable, WeightsUnavailable
from timm_nrpm.version import __version__

WRONG, FAILED = 2, 1
"""Exit status where what was given has to change, and where something failed that may not fail again."""

PACKAGES = ("torch", "timm", "huggingface_hub", "accelerate", "torchattacks", "numpy")
"""Packages whose versions a report of a fault has to state."""

UNUSABLE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
"""Errors of the operating system about a path that was given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 0; 2 where what was given has to change; 1 where something failed that may not fail again; and,
        as shells have it, 130 after Ctrl-C, 143 after SIGTERM, and 141 where nobody reads the output.
    """
    parser, commands = _parsers()
    args, unknown = parser.parse_known_args(arguments)
    if args.version:
        _print_versions(args.json)
        return 0
    if args.command_name is None:
        parser.print_help()
        return WRONG
    parser = commands[args.command_name]
    if unknown:
        parser.error(_about(unknown, parser))
    command: Command = args.command
    try:
        with _terminable(), _worded_warnings(parser, command.names):
            args = completed(args, parser, command.useless)
            command.run(args, Terminal(args.json, args.quiet))
            sys.stdout.flush()
            return 0
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, _Terminated) else signal.SIGINT
        again = command.stopped.format(**{**args.defaults, **vars(args)})
        print(f"timm-nrpm: stopped. {again}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return 128 + signal.SIGPIPE
    except Exception as error:
        if getattr(args, "traceback", False):
            traceback.print_exc()
        print(f"timm-nrpm: {_explained(error, parser, command.names)}", file=sys.stderr)
        return WRONG if _is_users(error) else FAILED


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands."""
    parser = _Parser(
        prog="timm-nrpm",
        description="Reprogram pretrained timm models for robustness, and measure what that is worth.",
        epilog="timm-nrpm COMMAND --help shows the options of a command and an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version; with --json, of all that matters")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    shtab.add_argument_to(parser, "--print-completion", help="print the completion script of a shell, for its startup")
    commands: Any = parser.add_subparsers(dest="command_name", metavar="COMMAND", parser_class=_Parser)
    advise.add_advise(commands)
    create.add_models(commands)
    cost.add_cost(commands)
    create.add_create(commands)
    create.add_calibrate(commands)
    create.add_adapt(commands)
    search.add_search(commands)
    tune.add_tune(commands)
    subnetwork.add_subnetwork(commands)
    evaluate.add_evaluate(commands)
    measure.add_certify(commands)
    measure.add_corrupt(commands)
    export.add_export(commands)
    plot.add_plot(commands)
    hub.add_push(commands)
    hub.add_pull(commands)
    hub.add_inspect(commands)
    hub.add_list(commands)
    demo = options.add_command(
        commands,
        "demo",
        Command(_demo),
        "reprogram, attack, save and load the bundled model, in two minutes",
        "Reprogram the bundled model of handwritten digits with several lambdas, calibrate it, attack it, and save and "
        "load a variant.",
        "timm-nrpm demo --output demo",
    )
    options.add_output(demo, "folder of the picture and the variant", "demo")
    for command in commands.choices.values():
        keep_defaults_apart(command)
    return parser, commands.choices


class _Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"timm-nrpm: {message}. See {self.prog} --help.\n")


def _about(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """A message about words on the command line that a command does not know."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    parts = []
    for before, word in pairwise(["", *unknown]):
        if before.startswith("-") and not word.startswith("-"):
            continue  # the value of what is not known
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        if near and word.startswith("-"):
            parts.append(f"{word} is not known: did you mean {near[0]}?"[:-1])
        elif not word.startswith("-") and "--model" in known:
            parts.append(f"{word} has no flag before it: a model is --model {word}, a variant --variant {word}")
        else:
            parts.append(f"{word} is not known")
    return "; ".join(parts)


def _is_users(error: Exception) -> bool:
    """Whether what was given has to change, rather than the network, the disk or the machine."""
    if isinstance(error, HubError):
        return not isinstance(error, (Unreachable, WeightsUnavailable))
    return isinstance(error, (WrongCall, ValueError, ImportError, *UNUSABLE))


def _explained(error: Exception, parser: argparse.ArgumentParser, names: Mapping[str, str]) -> str:
    """The message of an error in the terms of the command; for an unforeseen one, how to report it."""
    if isinstance(error, (ValueError, RuntimeError, ImportError, OSError)):
        return message_of(error, parser, names)
    return (
        f"{error!r}, which should not have happened. Start it again with --traceback, and report what that shows with "
        "what timm-nrpm --version --json prints."
    )


def _print_versions(as_json: bool) -> None:
    """The version; as JSON, also those of what this package builds on, and the machine's."""
    if not as_json:
        print(f"timm-nrpm {__version__}")
        return
    import platform

    versions: dict[str, object] = {"timm_nrpm": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions |= {"platform": platform.platform(), "gpu": gpu, "threads": torch.get_num_threads()}
    Terminal(json=True).give(versions)


def _demo(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli.demo import run

    run(args.output, terminal)


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, unless it has another handler or is ignored."""

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
    """Print warnings of this package on one line, in the terms of the command."""
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
