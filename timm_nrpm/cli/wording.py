"""Messages of the library in the terms of the command line: flags in place of the names of Python's arguments."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

WORD = r"True|False|None|[A-Z]+\b"
TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?: / \d+)?"
SEVERAL = rf"\((?:{TEXT}|[^()'\"])*\)|\[(?:{TEXT}|[^\[\]'\"])*\]"
ARGUMENT = re.compile(rf"(?<![\w./-])(\w+)=({WORD}|{TEXT}|{NUMBER}|{SEVERAL})?(?![\w(\[{{<])")
"""Pattern of a Python argument in a message, with its value or without."""

BARE = re.compile(r"(?<![\w./='\"-])([a-z]+(?:_[a-z]+)+)(?![\w=/(]|\.\w)")
"""Pattern of a bare argument name of several words in a sentence."""

EITHER = re.compile(f"{ARGUMENT.pattern}|{BARE.pattern}")
"""Pattern of both, so that what stands in a value is no name."""

COMMON = {
    "timm_nrpm.list_models()": "timm-nrpm models",
    ", or pretrained_cfg_overlay=dict(file=FILE)": "",
    "8 / 255": "8/255",
    "give token=, or run": "run",
}
"""Phrases that every command replaces, and what it replaces them by."""


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Note on errors raised inside which flags the arguments of the library came from, so that messages name these.

    Args:
        **names: Flag of each argument, as in `eps="--estimator-eps"`.
    """
    try:
        yield
    except Exception as error:
        vars(error)["flags"] = {**names, **getattr(error, "flags", {})}
        raise


def worded(text: str, parser: argparse.ArgumentParser, names: Mapping[str, str]) -> str:
    """A message in the terms of a command.

    Args:
        text: Message of the library.
        parser: Parser of the command. An argument with the name of an option becomes that option's flag.
        names: Flags of arguments that have another name; and phrases, which are no identifiers, with their
            replacements.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--batch-size")
        >>> worded("batch_size=0 is too small, and root= is missing", parser, {"root": "--images"})
        '--batch-size 0 is too small, and --images is missing'
    """
    phrases = {phrase: words for phrase, words in {**COMMON, **names}.items() if not phrase.isidentifier()}
    for phrase, words in phrases.items():
        text = text.replace(phrase, words)
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    flags |= {name: flag for name, flag in names.items() if name.isidentifier()}

    def argument(match: re.Match[str]) -> str:
        name, value, bare = match.groups()
        if bare is not None:
            return flags.get(bare, bare)
        if name not in flags:
            return match[0]
        if value in (None, "True", "None"):
            return flags[name]
        if value == "False":
            return f"no {flags[name]}"
        return f"{flags[name]} {_written(value)}"

    return EITHER.sub(argument, text)


def _written(value: str) -> str:
    """A Python value as one types it on the command line."""
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value.replace(" ", "")  # 8 / 255, or FILE
    values = parsed if isinstance(parsed, (list, tuple)) else [parsed]
    return " ".join(shlex.quote(str(item)) for item in values)


def message_of(error: BaseException, parser: argparse.ArgumentParser, names: Mapping[str, str]) -> str:
    """The message of an error in the terms of a command, without the traceback of a worker process that read images."""
    text = str(error) or repr(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return worded(text, parser, {**names, **getattr(error, "flags", {})})
