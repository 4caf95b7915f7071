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

from timm_nrpm.attacks import PixelModel
from timm_nrpm.config import GRADIENTS, OBJECTIVES, PARADIGMS, PRECISIONS, NRPMConfig, TuneConfig
from timm_nrpm.hub_commands import add_commands
from timm_nrpm.suites import SUITES
from timm_nrpm.threats import NORMS
from timm_nrpm.transfers import REPO_ID

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
    listing = commands.add_parser("models", help="architectures that can be reprogrammed whole")
    listing.add_argument("filter", nargs="?", default="", help="a wildcard, like 'resnet*'")
    listing.set_defaults(run=_models)
    _add_tune(commands.add_parser("tune", help="learn lambda, or everything, under attack (paradigms 2 and 3)"))
    _add_evaluate(
        commands.add_parser("evaluate", help="attack a model in every way there is, and report the worst case")
    )
    add_commands(commands)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"timm-nrpm: {error}", file=sys.stderr)
        return 1


def _demo(args: argparse.Namespace) -> int:
    from timm_nrpm.demo import run

    return 0 if run(args.output, Console()) else 1


def _models(args: argparse.Namespace) -> int:
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
    _add_model(parser, 0.5)
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


def _add_model(parser: argparse.ArgumentParser, lam: float) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "model",
        nargs="?",
        default="resnet8_digits",
        help="timm's name, or a variant: a folder, or owner/name on the Hub (default: the bundled one)",
    )
    model.add_argument(
        "--weights", metavar="FILE", help="safetensors, a state dict, or what the paper's authors publish"
    )
    model.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    model.add_argument("--num-classes", type=int, help="give the model a new classifier")
    model.add_argument("--lam", type=_number, default=lam, help=f"lambda of every layer, at first (default: {lam:g})")
    model.add_argument("--iterations", type=int, default=3, help="the paper's K (default: 3)")
    model.add_argument("--estimator-eps", type=_number, default=1e-3, help="eps of the estimate (default: 1e-3)")
    model.add_argument("--layers", nargs="+", metavar="GLOB", help="which layers (default: all)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Evaluate a reprogrammed model, or a plain one with --lam none, under every attack of a suite; docs/attacks.md "
        "says what they are. A run that was stopped goes on when it is started again. Several processes: as for tune."
    )
    parser.set_defaults(run=_evaluate)
    _add_model(parser, 0.8)
    data = parser.add_argument_group("images")
    data.add_argument("--calibrate", type=int, default=1000, help="training images to calibrate with (default: 1000)")
    data.add_argument("--training-split", default="train", help="where those are (default: train)")
    data.add_argument("--data", default="digits", help="digits, folder, tar, torch/NAME or hfds/NAME (default: digits)")
    data.add_argument("--root", type=Path, help="where they are")
    data.add_argument("--split", default="test", help="to evaluate on (default: test)")
    data.add_argument("--samples", type=int, default=500, help="at most, drawn at random (default: 500)")
    data.add_argument("--batch-size", type=int, default=100, help="attacked at once (default: 100)")
    data.add_argument("--workers", type=int, default=0, help="processes that read, for each process (default: 0)")
    data.add_argument("--download", action="store_true", help="let torch/ download what is not there")
    attack = parser.add_argument_group("attacks")
    attack.add_argument("--norm", default="Linf", choices=NORMS, help="what is bounded (default: Linf)")
    attack.add_argument(
        "--eps", type=_number, nargs="+", default=[8 / 255], help="bounds in [0, 1] pixel units (default: 8/255)"
    )
    attack.add_argument("--suite", default="adaptive", choices=SUITES, help="(default: adaptive)")
    attack.add_argument("--steps", type=int, help="of each ascent (default: the suite's)")
    attack.add_argument("--queries", type=int, help="of each random search (default: the suite's)")
    attack.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    attack.add_argument("--no-control", action="store_true", help="do not attack the plain model beside it")
    attack.add_argument(
        "--output", type=Path, default=Path("evaluated"), help="folder for reports (default: evaluated)"
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


def _evaluate(args: argparse.Namespace) -> int:
    import json
    import os
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from timm_nrpm.calibration import calibrate_
    from timm_nrpm.data import pixel_loader
    from timm_nrpm.evaluation import evaluate
    from timm_nrpm.processes import check_processes
    from timm_nrpm.showing import show
    from timm_nrpm.threats import Threat

    threats = [Threat(args.norm, eps) for eps in args.eps]
    accelerator = None
    if "WORLD_SIZE" in os.environ:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        check_processes(accelerator)
    usual = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(args).to(usual if accelerator is None else accelerator.device)
    images: dict[str, Any] = {"name": args.data, "root": args.root, "model": model, "batch_size": args.batch_size}
    images |= {"workers": args.workers, "download": args.download}
    loader = pixel_loader(**images, split=args.split)
    if args.samples < len(loader.dataset):  # type: ignore[arg-type]
        loader = pixel_loader(**images, split=args.split, samples=args.samples)
    fresh = args.lam is not None and not _is_variant(args.model)
    if args.calibrate and fresh:
        net = PixelModel(model)
        training = pixel_loader(**images, split=args.training_split, samples=args.calibrate)
        calibrate_(model, [net.normalise(pixels.to(net.mean.device)) for pixels, _ in training])
    args.output.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {name: getattr(args, name) for name in ("suite", "steps", "queries", "seed")}
    options |= {"control": not args.no_control, "accelerator": accelerator, "progress": True}
    options["data"] = f"{args.data.removeprefix('torch/').removeprefix('hfds/')}, {args.split}"
    reports = []
    for threat in threats:
        stem = f"{args.suite}-{threat.norm}-{threat.eps:.6g}"
        reports.append(evaluate(model, loader, threat, **options, resume=args.output / f"{stem}.jsonl"))
        if accelerator is None or accelerator.is_main_process:
            print(reports[-1])
            (args.output / f"{stem}.json").write_text(json.dumps(reports[-1].to_dict()) + "\n")
    if accelerator is None or accelerator.is_main_process:
        print(f"Written: {show(reports, model, loader, args.output, title=f'{args.model}, lambda {args.lam}')}")
    if accelerator is not None:
        accelerator.state.destroy_process_group()
    return 0


def _is_variant(name: str) -> bool:
    return (Path(name) / "nrpm_config.json").is_file() or (bool(REPO_ID.fullmatch(name)) and not Path(name).exists())


def _model(args: argparse.Namespace) -> nn.Module:
    """The reprogrammed model, or the plain one where lambda is none."""
    from timm_nrpm.backbones import load_published_
    from timm_nrpm.base import create_plain
    from timm_nrpm.loading import from_pretrained
    from timm_nrpm.registry import create_model
    from timm_nrpm.reprogramming import reprogram_

    if _is_variant(args.model):
        return from_pretrained(args.model)
    settings: dict[str, Any] = {"lam": args.lam, "iterations": args.iterations, "eps": args.estimator_eps}
    settings["layers"] = args.layers
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    pretrained = args.weights is None and not args.no_pretrained
    if args.weights is None and args.lam is not None:
        return create_model(args.model, pretrained, **settings, **options)
    plain = create_plain(args.model, pretrained=pretrained, **options)
    if args.weights is not None:
        load_published_(plain, args.weights)
    return plain.eval() if args.lam is None else reprogram_(plain, NRPMConfig(**settings))


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
