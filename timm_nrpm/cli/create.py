"""`timm-nrpm models`, `create`, `calibrate` and `adapt`: variants with a fixed lambda."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from timm_nrpm.cli.options import (
    NAMES,
    USELESS_FOR_IMAGES,
    USELESS_FOR_MODELS,
    Command,
    add_command,
    add_images,
    add_model,
    add_output,
    useless_splits,
)
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.cli.values import number_or_auto
from timm_nrpm.models.provenance import HOW


def add_models(commands: Any) -> None:
    """Add `timm-nrpm models`."""
    parser = add_command(
        commands,
        "models",
        Command(_models),
        "list the architectures that can be reprogrammed whole",
        "List timm's architectures whose every convolutional and linear layer can be reprogrammed.",
        "timm-nrpm models 'resnet1*'",
    )
    parser.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="a wildcard, like 'resnet*'")
    parser.add_argument("--pretrained", action="store_true", help="list names with pretrained weights, tags included")
    add_output(parser)


def add_create(commands: Any) -> None:
    """Add `timm-nrpm create`."""
    parser = add_command(
        commands,
        "create",
        Command(_create, USELESS_FOR_MODELS, NAMES),
        "reprogram a model with a fixed lambda, and save the variant",
        "Reprogram a pretrained model with one lambda for all its layers, and save the variant in a folder: lambdas "
        "alone where the weights have a public name, and else the weights too. Its statistics are not calibrated yet.",
        "timm-nrpm create --model resnet8_digits --lam 0.8 --output variant",
    )
    add_model(parser, 0.8, variant=False)
    add_output(parser, "folder of the variant", "variant")


def add_calibrate(commands: Any) -> None:
    """Add `timm-nrpm calibrate`."""
    parser = add_command(
        commands,
        "calibrate",
        Command(_calibrate, (*USELESS_FOR_MODELS, *USELESS_FOR_IMAGES, *useless_splits("split")), NAMES),
        "re-estimate the statistics of a variant from images, and save it",
        "Move the statistics of a variant by the change that reprogramming made, from images alone, whose labels are "
        "not looked at; without that most of its clean accuracy is lost. A model is reprogrammed first.",
        "timm-nrpm calibrate --model resnet8_digits --lam 0.8 --samples 200 --output calibrated",
    )
    add_model(parser, 0.8)
    add_images(parser, 100, "train", 1000)
    add_output(parser, "folder of the calibrated variant (default: that of --variant, or variant)")


def add_adapt(commands: Any) -> None:
    """Add `timm-nrpm adapt`."""
    parser = add_command(
        commands,
        "adapt",
        Command(_adapt, (*USELESS_FOR_MODELS, *USELESS_FOR_IMAGES, *useless_splits("split")), NAMES),
        "move a model's statistics towards those of the images at hand, and save the variant",
        "Move the BatchNorm statistics of a model towards those of images that are not like its training images, such "
        "as noisy ones, without their labels. It costs no latency. With lambda 1, the default, all else stays the "
        "plain model's.",
        "timm-nrpm adapt --model resnet8_digits --split test --output adapted",
    )
    add_model(parser, 1.0)
    images = add_images(parser, 256, "test", 1000)
    images.add_argument(
        "--prior",
        type=number_or_auto,
        default="auto",
        metavar="N",
        help="number of images that the model's own statistics are worth; auto weighs each layer by how much more the "
        "images differ from its statistics than from each other (default: auto)",
    )
    images.add_argument(
        "--robust",
        default="mean",
        choices=HOW["adaptation"],
        help="how statistics are taken over images; l1 and median give single images less weight (default: mean)",
    )
    add_output(parser, "folder of the adapted variant (default: that of --variant, or variant)")


def _models(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.models.registry import list_models

    names = list_models(args.pattern, pretrained=args.pretrained)
    if not names:
        raise ValueError(f"no architecture matches {args.pattern!r}: give timm's names, with * and ?.")
    terminal.show("\n".join(names))
    terminal.give({"models": names})


def _create(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli.inputs import model_of
    from timm_nrpm.models.saving import save_loadable

    model = model_of(args)
    report_variant(args.output, save_loadable(model, args.output), model, terminal)


def _calibrate(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli.inputs import chosen_images, model_of
    from timm_nrpm.models.calibration import calibrate_
    from timm_nrpm.models.saving import save_loadable

    output = _output(args)
    model = model_of(args)
    calibrate_(model, chosen_images(args, model), progress=terminal.progress)
    report_variant(output, save_loadable(model, output), model, terminal)


def _adapt(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli.inputs import chosen_images, model_of
    from timm_nrpm.models.adaptation import Adaptation
    from timm_nrpm.models.saving import save_loadable

    output = _output(args)
    model = model_of(args)
    adaptation = Adaptation(model, prior=args.prior, robust=args.robust)
    adaptation.run(chosen_images(args, model), progress=terminal.progress)
    weights = adaptation.weights
    mean = sum(weights.values()) / len(weights)
    terminal.show(
        f"{adaptation.images} images weigh {mean:.0%} in the statistics, on average over {len(weights)} layers."
    )
    report_variant(output, save_loadable(model, output), model, terminal)


def _output(args: argparse.Namespace) -> Path:
    """The folder of the result: `--output`, that of the variant, or a new one."""
    if args.output is not None:
        return Path(args.output)
    return Path(args.variant) if args.variant is not None and Path(args.variant).is_dir() else Path("variant")


def report_variant(folder: Path, full: bool, model: Any, terminal: Terminal) -> None:
    """Say where a variant is, and what it holds."""
    from timm_nrpm.models.reprogramming import lambdas

    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    held = "with its weights, which have no public name" if full else "without its weights"
    terminal.show(f"{folder}: {size:,} bytes, {held}. Evaluate it by timm-nrpm evaluate --variant {folder}")
    terminal.give({"variant": str(folder), "bytes": size, "full": full, "lambdas": lambdas(model)})
