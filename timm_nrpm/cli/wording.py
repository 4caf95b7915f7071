"""Messages of the library in the words of the command line: flags instead of the names of Python's arguments."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

WORD = r"True|False|None|[A-Z]+\b"
TEXT = r"'[^']*'|\"[^\"]*\""
NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?: / \d+)?"
SEVERAL = r"\([^()]*\)|\[[^\[\]]*\]"
ARGUMENT = re.compile(rf"(?<![\w./-])(\w+)=({WORD}|{TEXT}|{NUMBER}|{SEVERAL})?(?![\w(\[{{<])")
"""An argument of Python in a message, with its value or without."""

BARE = re.compile(r"(?<![\w./='\"-])([a-z]+(?:_[a-z]+)+)(?![\w=/(]|\.\w)")
"""A name of several words in the middle of a sentence."""

COMMON = {
    "timm_nrpm.list_models()": "timm-nrpm models",
    ", or pretrained_cfg_overlay=dict(file=FILE)": "",
    "8 / 255": "8/255",
    "give token=, or log in by": "log in by",
}
"""Phrases that are said otherwise in every command."""


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Meanwhile, arguments of the library come from these flags, which the message of an error names.

    Args:
        **names: The flag of each argument, as `eps="--estimator-eps"`.
    """
    try:
        yield
    except Exception as error:
        vars(error)["flags"] = {**names, **getattr(error, "flags", {})}
        raise


def worded(text: str, parser: argparse.ArgumentParser, names: Mapping[str, str]) -> str:
    """A message in the words of a command.

    Args:
        text: The message.
        parser: The parser of the command, whose options are the flags of the arguments of the same name.
        names: Flags of arguments of another name; and phrases, which are no names, with what stands in their place.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> _ = parser.add_argument("--batch-size")
        >>> worded("batch_size=0 is too small, and root=. is missing", parser, {"root": "--images"})
        '--batch-size 0 is too small, and --images is missing'
    """
    phrases = {phrase: said for phrase, said in {**COMMON, **names}.items() if not phrase.isidentifier()}
    for phrase, said in phrases.items():
        text = text.replace(phrase, said)
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    flags |= {name: flag for name, flag in names.items() if name.isidentifier()}

    def argument(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in flags:
            return match[0]
        if value in (None, "True", "None"):
            return flags[name]
        if value == "False":
            return f"no {flags[name]}"
        return f"{flags[name]} {_written(value)}"

    text = ARGUMENT.sub(argument, text)
    return BARE.sub(lambda match: flags.get(match[1], match[1]), text)


def _written(value: str) -> str:
    """A value of Python as it is written on the command line."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value.replace(" ", "")  # 8 / 255, or FILE
    values = found if isinstance(found, (list, tuple)) else [found]
    return " ".join(shlex.quote(str(one)) for one in values)


def message_of(error: BaseException, parser: argparse.ArgumentParser, names: Mapping[str, str]) -> str:
    """What an error says, in the words of a command, without the traceback of a process that read images."""
    text = str(error) or repr(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return worded(text, parser, {**names, **getattr(error, "flags", {})})
