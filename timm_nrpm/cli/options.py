"""What `timm-nrpm tune` and `evaluate` both take: a model, and images."""

from __future__ import annotations

import argparse
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.wording import called
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data.classes import place_of
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.data.readers import FOLDERS
from timm_nrpm.models.backbones import load_published_
from timm_nrpm.models.creation import create_plain
from timm_nrpm.models.downloads import REPO_ID
from timm_nrpm.models.loading import from_pretrained
from timm_nrpm.models.registry import create_model
from timm_nrpm.models.reprogramming import reprogram_

NAMES = {"checkpoint_path": "--weights", " with pretrained=False": "", "name": "--data"}
"""Flags of arguments of another name, and phrases that are said otherwise."""


def number(text: str) -> float:
    """A number, also as a fraction, 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, such as 0.03 or 8/255") from error


def number_or_none(text: str) -> float | None:
    """A number, or none."""
    return None if text.lower() == "none" else number(text)


def add_model(parser: argparse.ArgumentParser, lam: float, *, plain: bool) -> None:
    """Add the options of the model.

    Args:
        parser: The parser of a command.
        lam: The default of lambda.
        plain: Whether `--lam none` is a plain model.
    """
    model = parser.add_argument_group("model")
    model.add_argument(
        "model",
        nargs="?",
        default="resnet8_digits",
        help="timm's name, or a variant: a folder, or owner/name on the Hub (default: the bundled one)",
    )
    model.add_argument(
        "--weights", metavar="FILE", help="safetensors, a state dict, a checkpoint of timm's or of the paper's authors"
    )
    model.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    model.add_argument("--num-classes", type=int, help="give the model a new classifier")
    model.add_argument(
        "--lam",
        type=number_or_none if plain else number,
        default=lam,
        help=f"lambda of every layer{', or none for the plain model' if plain else ', at first'} (default: {lam:g})",
    )
    model.add_argument("--iterations", type=int, default=3, help="the paper's K (default: 3)")
    model.add_argument("--estimator-eps", type=number, default=1e-3, help="eps of the estimate (default: 1e-3)")
    model.add_argument(
        "--layers", nargs="+", metavar="GLOB", help="which layers; or first:N, the first N (default: all)"
    )


def add_images(parser: argparse.ArgumentParser, batch_size: int) -> Any:
    """Add the options of the images; the group, for what a command takes beside them."""
    data = parser.add_argument_group("images")
    data.add_argument("--data", default="digits", help="digits, folder, tar, torch/NAME or hfds/NAME (default: digits)")
    data.add_argument("--root", type=Path, help="where they are")
    data.add_argument("--class-map", metavar="FILE", help="labels of class folders: a .txt of names, or a .json object")
    data.add_argument("--batch-size", type=int, default=batch_size, help=f"of one process (default: {batch_size})")
    data.add_argument("--workers", type=int, default=0, help="processes that read, for each process (default: 0)")
    data.add_argument("--download", action="store_true", help="let torch/ download what is not there")
    return data


def is_variant(args: argparse.Namespace) -> bool:
    """Whether the model is a variant: a folder, or a repository on the Hub."""
    name = args.model
    return (Path(name) / "nrpm_config.json").is_file() or (bool(REPO_ID.fullmatch(name)) and not Path(name).exists())


def is_undivided(args: argparse.Namespace, split: str) -> bool:
    """Whether the images are one folder or tar that is read whole, whatever the split."""
    if args.data.lower() not in FOLDERS or args.root is None or not args.root.exists():
        return False
    try:
        return place_of(args.root, split) == args.root
    except ValueError:  # divided, and without that split
        return False


RULES = (
    Useless(
        ("weights", "no_pretrained", "num_classes", "lam", "iterations", "estimator_eps", "layers"),
        is_variant,
        "{model} is a variant, which has weights, layers and lambdas of its own. Leave them out, or name its base to "
        "reprogram that anew.",
    ),
    Useless(
        ("no_pretrained",),
        lambda args: args.weights is not None and not is_variant(args),
        "the weights are those of --weights. Leave one of them out.",
    ),
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
"""Options of the model and of the images that have no effect in some calls."""


def split_rules(*options: str) -> tuple[Useless, ...]:
    """The rule for every option that names a split: one folder without splits is read whole."""
    why = "{root} is one set of class folders, which is read whole. Give as --root the folder that holds the splits."

    def of(option: str) -> Useless:
        return Useless((option,), lambda args: is_undivided(args, getattr(args, option)), why)

    return tuple(map(of, options))


def model_of(args: argparse.Namespace) -> nn.Module:
    """The reprogrammed model, or the plain one where lambda is none."""
    if is_variant(args):
        return from_pretrained(args.model)
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    pretrained = args.weights is None and not args.no_pretrained
    with called(eps="--estimator-eps"):
        config = None
        if args.lam is not None:
            layers = args.layers[0] if args.layers and len(args.layers) == 1 else args.layers  # "first:4" stands alone
            config = NRPMConfig(args.lam, args.iterations, args.estimator_eps, layers=layers)
        if args.weights is None and config is not None:
            settings: dict[str, Any] = {"lam": config.lam, "iterations": config.iterations, "eps": config.eps}
            return create_model(args.model, pretrained, layers=config.layers, **settings, **options)
        plain = create_plain(args.model, pretrained=pretrained, **options)
        if args.weights is not None:
            load_published_(plain, args.weights)
        return plain.eval() if config is None else reprogram_(plain, config)


def images_of(
    args: argparse.Namespace,
    model: nn.Module,
    split: str,
    *,
    samples: int | None = None,
    at_most: int | None = None,
    first: int | None = None,
    training: bool = False,
    augment: bool = False,
    hflip: float = 0.0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """The images of a split.

    Args:
        args: The arguments of the command.
        model: The model, whose size and classes they get.
        split: The name of the split.
        samples, first, training, augment, hflip, drop_last: As for `pixel_loader`.
        at_most: Number of images drawn at random if there are more.
    """

    def loader(samples: int | None) -> DataLoader[Any]:
        return pixel_loader(
            args.data,
            args.root,
            split=split,
            model=model,
            batch_size=args.batch_size,
            training=training,
            augment=augment,
            hflip=hflip,
            workers=args.workers,
            samples=samples,
            first=first,
            class_map=args.class_map,
            download=args.download,
            drop_last=drop_last,
        )

    found = loader(samples)
    if at_most is not None and (at_most < 1 or at_most < len(found.dataset)):  # type: ignore[arg-type]
        return loader(at_most)
    return found


def note(text: str) -> None:
    """Tell the user something on stderr; of several processes one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"timm-nrpm: {text}", file=sys.stderr)
