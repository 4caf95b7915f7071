"""`timm-nrpm`: arguments in, the library's functions out."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from timm_nrpm.config import GRADIENTS, OBJECTIVES, PARADIGMS, PRECISIONS, NRPMConfig, TuneConfig

if TYPE_CHECKING:
    from torch import nn

    from timm_nrpm.history import History

CHANGED = {"output": "tuned", "calibrate": 1000}
"""Defaults of the command that are not the library's."""

CHOICES = {"paradigm": PARADIGMS, "objective": OBJECTIVES, "gradient": GRADIENTS, "precision": PRECISIONS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a failure that is explained, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="timm-nrpm", description="Reprogram pretrained timm models for robustness.")
    commands = parser.add_subparsers(required=True)
    demo = commands.add_parser("demo", help="reprogram and attack the bundled digits model")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder for the picture and the variant")
    demo.set_defaults(run=_demo)
    listing = commands.add_parser("list", help="architectures that can be reprogrammed whole")
    listing.add_argument("filter", nargs="?", default="", help="a wildcard, like 'resnet*'")
    listing.set_defaults(run=_list)
    _add_tune(commands.add_parser("tune", help="learn lambda, or everything, under attack (paradigms 2 and 3)"))
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"timm-nrpm: {error}", file=sys.stderr)
        return 1


def _demo(args: argparse.Namespace) -> int:
    from timm_nrpm.demo import run

    return 0 if run(args.output, Console()) else 1


def _list(args: argparse.Namespace) -> int:
    from timm_nrpm.registry import list_models

    names = list_models(args.filter)
    if not names:
        raise ValueError(f"no architecture matches {args.filter!r}: give timm's names, with * and ?.")
    print("\n".join(names))
    return 0


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tune a reprogrammed model under attack. Several processes: accelerate launch or torchrun, with "
        "-m timm_nrpm.cli tune in place of timm-nrpm tune; on the CPU, ACCELERATE_USE_CPU=true torchrun "
        "--nproc_per_node 2 -m timm_nrpm.cli tune ..."
    )
    parser.set_defaults(run=_tune)
    model = parser.add_argument_group("model")
    model.add_argument("model", nargs="?", default="resnet8_digits", help="timm's name (default: the bundled one)")
    model.add_argument(
        "--weights", metavar="FILE", help="safetensors, a state dict, or what the paper's authors publish"
    )
    model.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    model.add_argument("--num-classes", type=int, help="give the model a new classifier")
    model.add_argument("--lam", type=_number, default=0.5, help="lambda to start from (default: 0.5)")
    model.add_argument("--iterations", type=int, default=3, help="the paper's K (default: 3)")
    model.add_argument("--estimator-eps", type=_number, default=1e-3, help="eps of the estimate (default: 1e-3)")
    model.add_argument("--layers", nargs="+", metavar="GLOB", help="which layers (default: all)")
    data = parser.add_argument_group("images")
    data.add_argument("--data", default="digits", help="digits, folder, tar, torch/NAME or hfds/NAME (default: digits)")
    data.add_argument("--root", type=Path, help="where they are")
    data.add_argument("--split", default="train", help="to tune on (default: train)")
    data.add_argument("--validation-split", default="test", help="to evaluate on (default: test)")
    data.add_argument("--samples", type=int, help="tune on so many images, drawn at random (default: all)")
    data.add_argument("--validation-samples", type=int, default=500, help="at most (default: 500)")
    data.add_argument("--batch-size", type=int, default=64, help="of one process (default: 64)")
    data.add_argument("--augment", action="store_true", help="crop at random")
    data.add_argument("--hflip", type=_number, default=0.0, help="with --augment, share of images mirrored")
    data.add_argument("--workers", type=int, default=0, help="processes that read, for each process (default: 0)")
    data.add_argument("--download", action="store_true", help="let torch/ download what is not there")
    tuning = parser.add_argument_group("tuning")
    tuning.add_argument("--resume", action="store_true", help="go on from the last good checkpoint, if there is one")
    notes = _notes(TuneConfig)
    for field in fields(TuneConfig):
        default = CHANGED.get(field.name, field.default)
        tuning.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=next(parse for start, parse in PARSERS.items() if str(field.type).startswith(start)),
            default=default,
            choices=CHOICES.get(field.name),
            nargs="+" if str(field.type).startswith("tuple") else None,
            help=notes.get(field.name, "") + ("" if default in (None, ()) else f" (default: {default})"),
        )


def _number(text: str) -> float | None:
    """A number, also as a fraction, 8/255; or none."""
    if text.lower() == "none":
        return None
    try:
        return float(Fraction(text))
    except ZeroDivisionError as error:
        raise ValueError(text) from error


PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": _number, "str": str, "tuple": str}


def _notes(settings: type) -> dict[str, str]:
    """The first sentence on every setting, from the docstring, so that both say the same."""
    text = (settings.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    # Percent signs would be argparse's.
    texts = {name: re.sub(r":\w+:`|`", "", " ".join(note.split())).split(". ")[0].rstrip(".") for name, note in found}
    return {name: text.replace("%", "%%") for name, text in texts.items()}


def _tune(args: argparse.Namespace) -> int:
    from accelerate import PartialState

    from timm_nrpm.data import pixel_loader
    from timm_nrpm.reprogramming import lambdas
    from timm_nrpm.tuning import tune

    model = _model(args)
    images: dict[str, Any] = {"name": args.data, "root": args.root, "model": model, "batch_size": args.batch_size}
    images |= {"workers": args.workers, "download": args.download}
    loader = pixel_loader(
        **images, split=args.split, samples=args.samples, training=True, augment=args.augment, hflip=args.hflip
    )
    validation = pixel_loader(**images, split=args.validation_split)
    if args.validation_samples < len(validation.dataset):  # type: ignore[arg-type]
        validation = pixel_loader(**images, split=args.validation_split, samples=args.validation_samples)
    config = TuneConfig(**{field.name: getattr(args, field.name) for field in fields(TuneConfig)})
    before = lambdas(model)
    history = tune(model, loader, config, validation=validation, resume=args.resume, progress=True)
    if PartialState().is_main_process:
        _report(history, before, lambdas(model), Console())
    PartialState().destroy_process_group()
    return 0


def _model(args: argparse.Namespace) -> nn.Module:
    """The reprogrammed model."""
    from timm_nrpm.backbones import load_published_
    from timm_nrpm.base import create_plain
    from timm_nrpm.registry import create_model
    from timm_nrpm.reprogramming import reprogram_

    settings: dict[str, Any] = {"lam": args.lam, "iterations": args.iterations, "eps": args.estimator_eps}
    settings["layers"] = args.layers
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    if args.weights is None:
        return create_model(args.model, not args.no_pretrained, **settings, **options)
    plain = create_plain(args.model, pretrained=False, **options)
    return reprogram_(load_published_(plain, args.weights), NRPMConfig(**settings))


def _report(history: History, before: dict[str, float], after: dict[str, float], console: Console) -> None:
    """What tuning did, as two tables."""
    c = history.config
    table = Table("layer", "lambda before", "after", title=f"paradigm {c.paradigm}, {c.objective}, Linf {c.eps:.4g}")
    for name, lam in after.items():
        table.add_row(name, f"{before[name]:.3f}", f"{lam:.3f}")
    console.print(table)
    if history.evaluations:
        table = Table(
            "step", "clean", "PGD own", "worst", "flags", title=f"validation, Linf {c.validation_eps:.4g}, in %"
        )
        for row in history.evaluations:
            shares = (f"{100 * share:.1f}" for share in (row.clean, row.own, row.worst_case))
            table.add_row(str(row.step), *shares, ", ".join(row.flags))
        console.print(table)
    if c.output is not None:
        console.print(f"Written: {c.output}/history.json, curves.png, variant/, checkpoints/", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
