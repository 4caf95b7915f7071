"""What was given on the command line and what is a default, and options that have no effect, which are refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class WrongCall(ValueError):
    """Options that do not go together."""


@dataclass(frozen=True)
class Useless:
    """Options that have no effect in some calls.

    Args:
        options: The names under which argparse keeps them.
        when: Whether they have none, of the arguments of a call, defaults included.
        why: The reason, in the error message; `{name}` stands for an argument.
    """

    options: tuple[str, ...]
    when: Callable[[argparse.Namespace], bool]
    why: str


def flag_of(parser: argparse.ArgumentParser, option: str) -> str:
    """How an option is written on the command line."""
    return next(action.option_strings[-1] for action in parser._actions if action.dest == option)


def keep_defaults_apart(parser: argparse.ArgumentParser) -> None:
    """Let the parser give the options that were given alone, and remember the defaults for :func:`completed`."""
    # argparse would parse the mark of an absent positional argument as if somebody had typed it.
    actions = [a for a in parser._actions if a.option_strings and a.default is not argparse.SUPPRESS]
    parser.set_defaults(defaults={action.dest: action.default for action in actions})
    for action in actions:
        action.default = argparse.SUPPRESS


def completed(
    args: argparse.Namespace, parser: argparse.ArgumentParser, rules: Sequence[Useless] = ()
) -> argparse.Namespace:
    """The arguments with the defaults of what was not given.

    Args:
        args: What `parser` gave after :func:`keep_defaults_apart`.
        parser: The parser of the command.
        rules: Options that have no effect in some calls.

    Raises:
        WrongCall: Options that were given and have no effect.
    """
    given = args.defaults.keys() & vars(args).keys()
    args = argparse.Namespace(**{**args.defaults, **vars(args)})
    complaints = []
    for rule in rules:
        flags = [flag_of(parser, option) for option in rule.options if option in given]
        if flags and rule.when(args):
            have = "has" if len(flags) == 1 else "have"
            complaints.append(f"{_listed(flags)} {have} no effect: {rule.why.format(**vars(args))}")
    if complaints:
        raise WrongCall(" ".join(complaints))
    return args


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
