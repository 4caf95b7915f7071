"""Options that several commands share, one name for one thing. Nothing here imports torch, so that help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shtab

from timm_nrpm.choices import NORMS, PENALTIES
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.cli.values import number, number_or_none

STOPPED = "Start the same command again."


@dataclass(frozen=True)
class Command:
    """A command, beside its options.

    Attributes:
        run: The function that does it.
        useless: Options that have no effect in some calls.
        names: Flags of arguments of the library that have another name; and phrases, which are no identifiers, with
            what messages say in their place.
        stopped: How to go on after Ctrl-C; `{option}` stands for the value of an option.
    """

    run: Callable[[argparse.Namespace, Terminal], None]
    useless: tuple[Useless, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    stopped: str = STOPPED


def add_command(commands: Any, name: str, command: Command, summary: str, text: str, example: str) -> Any:
    """Add a command to the subparsers of `timm-nrpm`.

    Args:
        commands: The subparsers.
        name: Name of the command.
        command: What it does.
        summary: One line for the list of commands.
        text: A paragraph for the command's own help.
        example: Command lines that work as they stand.

    Returns:
        Its parser.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(command=command)
    return parser


class _Help(argparse.HelpFormatter):
    """Help whose paragraphs are filled, and whose example stays on its line, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return f"{text}\n" if text.startswith("example:") else super()._fill_text(text, width, indent)


def add_variant(group: Any) -> None:
    """Add the options that name a variant."""
    shown = "a reprogrammed model: a folder, or owner/name on the Hub"
    group.add_argument("--variant", metavar="VARIANT", help=shown).complete = shtab.DIRECTORY
    add_hub(group)


def add_hub(group: Any) -> None:
    """Add the options of whatever is read from the Hub."""
    group.add_argument("--revision", help="branch, tag, commit or refs/pr/1 of it on the Hub (default: main)")
    group.add_argument("--offline", action="store_true", help="read the cache of the Hub alone, without the network")


def add_model(parser: argparse.ArgumentParser, lam: float, *, plain: bool = False, variant: bool = True) -> None:
    """Add the options of the model.

    Args:
        parser: The parser of a command.
        lam: The default of lambda.
        plain: Whether `--lam none` is a plain model.
        variant: Whether a variant may be given in its place.
    """
    model = _add_base(parser, "timm's name of a model that is reprogrammed (default: resnet8_digits, the bundled one)")
    none = ", or none for the plain model" if plain else ""
    model.add_argument(
        "--lam",
        type=number_or_none if plain else number,
        default=lam,
        metavar="LAMBDA",
        help=f"lambda of every layer, from 0, the robust estimate, to 1, the plain layer{none} (default: {lam:g})",
    )
    model.add_argument(
        "--iterations", type=int, default=3, metavar="K", help="the paper's K, steps of the estimate (default: 3)"
    )
    model.add_argument(
        "--estimator-eps",
        type=number,
        default=1e-3,
        metavar="X",
        help="what the estimate adds to every distance, in units of one product (default: 1e-3)",
    )
    model.add_argument("--penalty", default="l1", choices=PENALTIES, help="penalty of the estimate (default: l1)")
    words = "estimate in standard units, which calibration takes from images: --estimator-eps 0.3 to 2 suits them"
    model.add_argument("--standardize", action="store_true", help=words)
    model.add_argument(
        "--layers", nargs="+", metavar="GLOB", help="layers to reprogram; or first:N, the first N (default: all)"
    )
    if variant:
        add_variant(parser.add_argument_group("or a variant, which has all of this"))
    else:
        parser.set_defaults(variant=None, revision=None, offline=False)


def add_plain_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model that is given as it is; inside it is one with every lambda at 1."""
    _add_base(parser, "timm's name of the model (default: resnet8_digits, the bundled one)")
    parser.set_defaults(lam=1.0, iterations=3, estimator_eps=1e-3, penalty="l1", layers=None, standardize=False)
    parser.set_defaults(variant=None, revision=None, offline=False)


def _add_base(parser: argparse.ArgumentParser, bundled: str) -> Any:
    """Add the options that name a timm model, its weights and its images; return their group."""
    model: Any = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", default="resnet8_digits", help=bundled)
    weights = "its weights: safetensors, a state dict, timm's .pth.tar, or a file of the paper's authors"
    model.add_argument("--weights", metavar="FILE", help=weights).complete = shtab.FILE
    model.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    model.add_argument("--num-classes", type=int, metavar="N", help="give it a new classifier with N classes")
    size = "height, and width where it differs, of its images in pixels (default: the model's)"
    model.add_argument("--image-size", type=int, nargs="+", metavar="N", help=size)
    for name, what in (("--mean", "mean"), ("--std", "standard deviation")):
        text = f"{what} that pixels in [0, 1] are normalised by, one number per channel (default: the model's)"
        model.add_argument(name, type=number, nargs="+", metavar="X", help=text)
    return model


MODEL = (
    *("model", "weights", "no_pretrained", "num_classes", "image_size", "mean", "std"),
    *("lam", "iterations", "estimator_eps", "penalty", "layers", "standardize"),
)
"""Options that a variant brings along."""


def add_images(parser: argparse.ArgumentParser, batch_size: int, split: str, samples: int | None) -> Any:
    """Add the options of the images.

    Args:
        parser: The parser of a command.
        batch_size: The default of the batch size.
        split: The default split.
        samples: The default of the number of images drawn; None takes all.

    Returns:
        The group, for what a command takes beside them.
    """
    data: Any = parser.add_argument_group("images")
    data.add_argument("--data", default="digits", help="digits, folder, tar, torch/NAME or hfds/NAME (default: digits)")
    root = "folder or tar that holds the images"
    data.add_argument("--root", type=Path, metavar="PATH", help=root).complete = shtab.FILE
    labels = "labels of class folders: a .txt with one name per line, or a .json object"
    data.add_argument("--class-map", metavar="FILE", help=labels).complete = shtab.FILE
    data.add_argument("--split", default=split, metavar="NAME", help=f"split that is read (default: {split})")
    drawn = data.add_mutually_exclusive_group()
    most = "all" if samples is None else f"{samples} at most"
    drawn.add_argument(
        "--samples", type=int, default=samples, metavar="N", help=f"number of images drawn at random (default: {most})"
    )
    drawn.add_argument("--first", type=int, metavar="N", help="take the first N images, in their order, instead")
    data.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"images in a batch (default: {batch_size})"
    )
    data.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)")
    data.add_argument("--download", action="store_true", help="let torch/NAME download what is not there")
    return data


def add_calibration(data: Any) -> None:
    """Add the options of the images that a model is calibrated on."""
    data.add_argument(
        "--calibrate",
        type=int,
        default=1000,
        metavar="N",
        help="number of training images, at most, that the model is calibrated on first; 0 for none (default: 1000)",
    )
    data.add_argument("--training-split", default="train", metavar="NAME", help="split of those (default: train)")


def add_threat(group: Any, *, several: bool) -> None:
    """Add the options of what an attacker may change.

    Args:
        group: Where they are added.
        several: Whether `--eps` takes several bounds.
    """
    group.add_argument("--norm", default="Linf", choices=NORMS, help="norm of the change (default: Linf)")
    bounds = "largest change, in pixels of [0, 1]; under L0 a number of pixels, of a patch its side; under Linf 8/255 "
    bounds += "by default"
    if several:
        group.add_argument("--eps", type=number, nargs="+", metavar="EPS", help=bounds)
    else:
        group.add_argument("--eps", type=number, metavar="EPS", help=bounds)


def add_output(parser: argparse.ArgumentParser, text: str = "", default: str | None = None) -> None:
    """Add `--output`, if the command writes anything, and what every command has.

    Args:
        parser: The parser of a command, which has all its other options.
        text: What `--output` is; empty for a command that writes nothing.
        default: Its default, which the help shows.
    """
    positional = [str(action.metavar) for action in parser._get_positional_actions()]
    parser.usage = " ".join([parser.prog, "[OPTIONS]", *positional])
    output: Any = parser.add_argument_group("output")
    if text:
        shown = "" if default is None else f" (default: {default})"
        path = None if default is None else Path(default)
        action = output.add_argument("--output", type=Path, default=path, metavar="PATH", help=text + shown)
        action.complete = shtab.FILE
    output.add_argument("--json", action="store_true", help="print the result as one JSON object, and no text")
    output.add_argument("--quiet", action="store_true", help="show no progress bars and no notes")
    output.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")


def is_undivided(args: argparse.Namespace, split: str) -> bool:
    """Whether the images are one folder or tar that is read whole, whatever the split."""
    from timm_nrpm.data.classes import place_of
    from timm_nrpm.data.readers import FOLDERS

    if args.data.lower() not in FOLDERS or args.root is None or not args.root.exists():
        return False
    try:
        return place_of(args.root, split) == args.root
    except ValueError:  # divided, and without that split
        return False


def is_plain(args: argparse.Namespace) -> bool:
    """Whether the model is a plain one."""
    return args.lam is None and args.variant is None


USELESS_FOR_MODELS = (
    Useless(
        MODEL,
        lambda args: args.variant is not None,
        "{variant} is a variant, which has weights, layers and lambdas of its own. Leave them out, or give its base as "
        "--model to reprogram that anew.",
    ),
    Useless(
        ("no_pretrained",),
        lambda args: args.weights is not None and args.variant is None,
        "the weights are those of --weights. Leave one of them out.",
    ),
    Useless(
        ("revision", "offline"),
        lambda args: args.variant is None,
        "nothing is read from the Hub by its name. Give --variant with it.",
    ),
)
"""Options of the model that have no effect in some calls."""

USELESS_FOR_IMAGES = (
    Useless(
        ("root",),
        lambda args: args.data == "digits",
        "the digits come with scikit-learn. Give --data folder, tar or torch/NAME with it.",
    ),
    Useless(
        ("download",),
        lambda args: not args.data.lower().startswith("torch/"),
        "{data} is not among torchvision's datasets, torch/NAME.",
    ),
)
"""Options of the images that have no effect in some calls."""

USELESS_FOR_CALIBRATION = (
    Useless(
        ("calibrate", "training_split"),
        lambda args: args.variant is not None,
        "{variant} is a variant, which brings its own statistics. Leave them out.",
    ),
    Useless(
        ("training_split",),
        lambda args: args.calibrate == 0 and args.variant is None and not is_plain(args),
        "--calibrate 0 takes no images.",
    ),
)
"""Options of calibration that have no effect in some calls."""

USELESS_FOR_PLAIN = (
    Useless(
        ("iterations", "estimator_eps", "penalty", "layers", "standardize", "calibrate", "training_split"),
        is_plain,
        "with --lam none the model is plain. Leave them out, or give a number.",
    ),
)
"""Options that have no effect on a plain model."""


def useless_splits(*options: str) -> tuple[Useless, ...]:
    """The rule for every option that names a split: one folder without splits is read whole."""
    why = "{root} is one set of class folders, which is read whole. Give as --root the folder that holds the splits."

    def of(option: str) -> Useless:
        return Useless((option,), lambda args: is_undivided(args, getattr(args, option)), why)

    return tuple(map(of, options))


USELESS_FOR_MEASURING = (
    *USELESS_FOR_MODELS,
    *USELESS_FOR_IMAGES,
    *useless_splits("split", "training_split"),
    *USELESS_FOR_CALIBRATION,
    *USELESS_FOR_PLAIN,
)
"""All of these, for commands that measure a model, reprogrammed or plain, on the images of one split."""

NAMES = {
    "checkpoint_path": "--weights",
    " with pretrained=False": "",
    "name": "--data",
    "input_size": "--image-size",
    "local_files_only": "--offline",
    "timm_nrpm.calibrate_(model, images)": "timm-nrpm calibrate",
    "a folder that save_pretrained wrote": "the folder of a variant, or owner/name on the Hub",
    "Build that model and give it as base=.": "Save it with its weights: save_pretrained(model, folder, full=True).",
    "(C, H, W)": "H W",
}
"""Flags of arguments with another name, and replaced phrases, for commands that take a model and images."""
