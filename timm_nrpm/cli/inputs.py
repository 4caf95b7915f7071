"""The model and the images that the options of a command name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from timm_nrpm.cli.options import is_undivided
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.cli.wording import called
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.data.readers import FOLDERS
from timm_nrpm.ensembles.folders import from_pretrained
from timm_nrpm.models.calibration import calibrate_
from timm_nrpm.models.creation import create_plain
from timm_nrpm.models.registry import create_model
from timm_nrpm.models.reprogramming import lambdas, reprogram_, reprogrammed_layers
from timm_nrpm.models.weights import load_published_
from timm_nrpm.nn.pixel_model import PixelModel

if TYPE_CHECKING:
    from accelerate import Accelerator


def model_of(args: argparse.Namespace) -> nn.Module:
    """The variant, the model reprogrammed anew, or the plain one where lambda is none."""
    if args.variant is not None:
        return from_pretrained(args.variant, revision=args.revision, local_files_only=args.offline)
    arguments = _arguments_of_timm(args)
    model = _new_model(args, arguments)
    PixelModel(model)  # which refuses a normalisation of other pixels than those in [0, 1]
    return model


def _new_model(args: argparse.Namespace, arguments: dict[str, Any]) -> nn.Module:
    """The model of `--model` or `--weights`, reprogrammed or plain."""
    pretrained = args.weights is None and not args.no_pretrained
    with called(eps="--estimator-eps"):
        config = None if args.lam is None else _config_of(args)
        if args.weights is None and config is not None:
            return create_model(
                args.model,
                pretrained,
                lam=config.lam,
                iterations=config.iterations,
                eps=config.eps,
                penalty=config.penalty,
                layers=config.layers,
                standardize=config.standardize,
                **arguments,
            )
        plain = create_plain(args.model, pretrained=pretrained, **arguments)
        if args.weights is not None:
            load_published_(plain, args.weights)
        return plain.eval() if config is None else reprogram_(plain, config)


def _config_of(args: argparse.Namespace) -> NRPMConfig:
    layers = args.layers[0] if args.layers and len(args.layers) == 1 else args.layers  # "first:4" stands alone
    lam, eps, standardize = args.lam, args.estimator_eps, args.standardize
    return NRPMConfig(lam, args.iterations, eps, args.penalty, layers=layers, standardize=standardize)


def _arguments_of_timm(args: argparse.Namespace) -> dict[str, Any]:
    """What `timm.create_model` is given beside the name; images are described where a variant records it."""
    images: dict[str, Any] = {}
    known = timm.get_pretrained_cfg(args.model.removeprefix("nrpm_"))
    channels = known.input_size[0] if known is not None else 3
    for name in ("mean", "std"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, channels):
            raise ValueError(f"{name}={tuple(values)}: give one number, or one for each of the {channels} channels.")
    if args.image_size is not None:
        if len(args.image_size) > 2 or min(args.image_size) < 1:
            raise ValueError(f"image_size={args.image_size} is not allowed: give a height, or a height and a width.")
        images["input_size"] = (channels, args.image_size[0], args.image_size[-1])
    images |= {name: tuple(getattr(args, name)) for name in ("mean", "std") if getattr(args, name) is not None}
    arguments: dict[str, Any] = {} if args.num_classes is None else {"num_classes": args.num_classes}
    return {**arguments, "pretrained_cfg_overlay": images} if images else arguments


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

    images = loader(samples)
    if at_most is not None and (at_most < 1 or at_most < len(images.dataset)):  # type: ignore[arg-type]
        return loader(at_most)
    return images


def chosen_images(args: argparse.Namespace, model: nn.Module) -> DataLoader[Any]:
    """The images of `--split` that `--samples` or `--first` chooses."""
    at_most = args.samples if args.first is None else None
    return images_of(args, model, args.split, at_most=at_most, first=args.first)


def images_for_advice(
    args: argparse.Namespace, model: nn.Module, terminal: Terminal
) -> tuple[DataLoader[Any], DataLoader[Any], DataLoader[Any] | None]:
    """The images of a split to judge on, others to choose on, and training images, if there are any.

    Those to judge on are what `--samples` with their number draws in any other command, so that `timm-nrpm evaluate`
    finds the same numbers.
    """
    if args.first is None:
        count = len(images_of(args, model, args.split).dataset)  # type: ignore[arg-type]
        whole = images_of(args, model, args.split, samples=count).dataset
        undivided = args.train > 0 and is_undivided(args, args.training_split)
        used = min(args.samples, count // 2 if undivided else count)
    else:
        whole, undivided = images_of(args, model, args.split, first=args.first).dataset, False
        count = used = args.first
    report, selection = (
        DataLoader(Subset(whole, rows), args.batch_size, num_workers=args.workers)
        for rows in (range(used // 2), range(used // 2, used))
    )
    if not args.train:
        return report, selection, None
    if undivided:
        rest = range(used, min(count, used + args.train))
        terminal.note(
            f"{args.root} is not divided into splits: of its {count} images, {used // 2} are judged on, "
            f"{used - used // 2} are chosen on, and {len(rest)} are trained on."
        )
        generator = torch.Generator().manual_seed(args.seed)
        images = DataLoader(
            Subset(whole, rest), args.batch_size, shuffle=True, num_workers=args.workers, generator=generator
        )
        return report, selection, images
    with called(split="--training-split", samples="--train"):
        return report, selection, images_of(args, model, args.training_split, at_most=args.train, training=True)


def calibration_images(args: argparse.Namespace, model: nn.Module, terminal: Terminal) -> Iterable[Any] | None:
    """The images that `--calibrate` and `--training-split` choose; None for a variant or a plain model."""
    if not args.calibrate or args.variant is not None or not reprogrammed_layers(model):
        return None
    with called(split="--training-split", samples="--calibrate"):
        images = images_of(args, model, args.training_split, at_most=args.calibrate)
    if is_undivided(args, args.training_split):
        terminal.note(
            f"{args.root} is not divided into splits, so the model is calibrated on images that are evaluated."
        )
    return images


def calibrate(args: argparse.Namespace, model: nn.Module, terminal: Terminal) -> None:
    """Calibrate a model that was reprogrammed just now on training images."""
    images = calibration_images(args, model, terminal)
    if images is not None:
        calibrate_(model, images, progress=terminal.progress)


@contextmanager
def processes() -> Iterator[tuple[Accelerator | None, Any]]:
    """The processes that torchrun or accelerate started, None for one alone; and the device of this one."""
    if "WORLD_SIZE" not in os.environ:
        yield None, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from timm_nrpm.jobs.processes import check_processes

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_processes(accelerator)
    try:
        yield accelerator, accelerator.device
    finally:
        accelerator.state.destroy_process_group()


def make_folder(output: Path) -> None:
    """Make the folder of the results before anything is computed.

    Raises:
        OSError: It cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--output {output} cannot be written to ({error}): give another folder.") from error


def measured(args: argparse.Namespace, terminal: Terminal) -> tuple[nn.Module, DataLoader[Any]]:
    """The model in evaluation mode, calibrated if it was reprogrammed just now, and the images it is measured on."""
    model = model_of(args).eval()
    loader = chosen_images(args, model)
    calibrate(args, model, terminal)
    return model, loader


def described_images(args: argparse.Namespace) -> str:
    """What the images are, in words, for a report."""
    name = args.data.removeprefix("torch/").removeprefix("hfds/")
    if args.data.lower() in FOLDERS:
        name = args.root.resolve().stem if args.root.is_file() else args.root.resolve().name
    words = [name] if is_undivided(args, args.split) else [name, args.split]
    return ", ".join(words if args.first is None else [*words, f"the first {args.first}"])


def described_model(args: argparse.Namespace, model: nn.Module) -> str:
    """The name of a model and its lambdas, in words."""
    name = args.variant or args.model
    if not reprogrammed_layers(model):
        return f"{name}, plain"
    lams = sorted(lambdas(model).values())
    low, high = (f"{lam:.3g}" for lam in (lams[0], lams[-1]))
    return f"{name}, lambda {low}" if low == high else f"{name}, lambda {low} to {high}"
