"""Which options were given and which have their default; options without effect are refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class WrongCall(ValueError):
    """Options were given that do not go together."""


@dataclass(frozen=True)
class Useless:
    """Options that have no effect in some calls.

    Args:
        options: Names under which argparse keeps the options.
        when: Function of the arguments of a call, defaults included, that tells whether the options have no effect.
        why: Reason, for the error message; `{name}` stands for the value of an argument.
    """

    options: tuple[str, ...]
    when: Callable[[argparse.Namespace], bool]
    why: str


def flag_of(parser: argparse.ArgumentParser, option: str) -> str:
    """The flag of an option, such as `--batch-size`."""
    return next(action.option_strings[-1] for action in parser._actions if action.dest == option)


def keep_defaults_apart(parser: argparse.ArgumentParser) -> None:
    """Make the parser return only options that were given, and keep the defaults for :func:`completed`."""
    # argparse would parse the mark of an absent positional argument as if somebody had typed it.
    actions = [a for a in parser._actions if a.option_strings and a.default is not argparse.SUPPRESS]
    parser.set_defaults(defaults={action.dest: action.default for action in actions})
    for action in actions:
        action.default = argparse.SUPPRESS


def completed(
    args: argparse.Namespace, parser: argparse.ArgumentParser, rules: Sequence[Useless] = ()
) -> argparse.Namespace:
    """Fill in the defaults of options that were not given.

    Args:
        args: Arguments from a parser that :func:`keep_defaults_apart` has changed.
        parser: Parser of the command.
        rules: Rules for options that have no effect in some calls.

    Raises:
        WrongCall: Options were given that have no effect.
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
