"""`timm-nrpm tune`: arguments in, :func:`timm_nrpm.tune` out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.wording import called
from timm_nrpm.config import GRADIENTS, OBJECTIVES, PARADIGMS, PRECISIONS, TuneConfig

if TYPE_CHECKING:
    from timm_nrpm.evaluation.history import History

CHANGED = {"output": "tuned", "calibrate": 1000}
"""Defaults of the command that are not the library's."""

CHOICES = {"paradigm": PARADIGMS, "objective": OBJECTIVES, "gradient": GRADIENTS, "precision": PRECISIONS}
PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": options.number_or_none, "str": str, "tuple": str}
ONE_STEP = ("clean", "fgsm", "clean+fgsm")

RULES = (
    *options.RULES,
    *options.split_rules("split", "validation_split"),
    Useless(("hflip",), lambda args: not args.augment, "images are mirrored with --augment alone."),
    Useless(
        ("lr", "weight_decay"),
        lambda args: args.paradigm == "lambda" and args.trainable is None,
        "lambda alone is tuned, which has --lam-lr. Give --paradigm all to tune weights too.",
    ),
    Useless(
        ("steps",),
        lambda args: args.objective in ONE_STEP or args.eps == 0,
        "the objective {objective} with eps {eps:g} takes no attack of several steps.",
    ),
    Useless(
        ("step_size", "gradient"),
        lambda args: args.objective == "clean" or args.eps == 0,
        "the objective {objective} with eps {eps:g} attacks no image.",
    ),
    Useless(
        ("eps",),
        lambda args: args.objective == "clean" and args.evaluate_eps is not None,
        "the objective clean attacks no image, and validation has --evaluate-eps.",
    ),
    Useless(
        ("beta",),
        lambda args: args.objective not in ("trades", "mart", "sat"),
        "the objective {objective} has no second term. Those of trades, mart and sat have.",
    ),
    Useless(
        ("weight_perturbation",),
        lambda args: args.objective != "awp",
        "the objective {objective} moves no weights. Give --objective awp with it.",
    ),
    Useless(
        ("target_momentum", "target_start"),
        lambda args: args.objective != "sat",
        "the objective {objective} has no soft targets. Give --objective sat with it.",
    ),
    Useless(
        ("warmup_epochs",),
        lambda args: args.schedule == "constant",
        "the schedule is constant. Give another --schedule with it.",
    ),
    Useless(("license",), lambda args: args.push_to is None, "nothing is pushed. Give --push-to with it."),
)
"""Options that have no effect in some calls."""

NAMES = {**options.NAMES, "another output": "another folder as --output", "drop_last": "--drop-last"}


def add_command(commands: Any) -> None:
    """Add it to the subparsers of `timm-nrpm`."""
    parser = commands.add_parser("tune", help="learn lambda, or everything, under attack (paradigms 2 and 3)")
    parser.description = (
        "Tune a reprogrammed model under attack. Several processes: accelerate launch or torchrun, with "
        "-m timm_nrpm.cli tune in place of timm-nrpm tune; on the CPU, ACCELERATE_USE_CPU=true torchrun "
        "--nproc_per_node 2 -m timm_nrpm.cli tune ..."
    )
    stopped = "The last checkpoint is in {output}, and the same command with --resume goes on from it."
    parser.set_defaults(run=_tune, useless=RULES, names=NAMES, stopped=stopped)
    options.add_model(parser, 0.5, plain=False)
    data = options.add_images(parser, batch_size=64)
    data.add_argument("--split", default="train", help="to tune on (default: train)")
    data.add_argument("--samples", type=int, help="tune on so many images, drawn at random (default: all)")
    data.add_argument("--validation-split", default="test", help="to evaluate on (default: test)")
    some = data.add_mutually_exclusive_group()
    some.add_argument("--validation-samples", type=int, default=500, help="at most, drawn at random (default: 500)")
    some.add_argument("--validation-first", type=int, help="evaluate on the first so many images, in their order")
    data.add_argument("--drop-last", action="store_true", help="leave out a last batch that is not full")
    data.add_argument("--augment", action="store_true", help="crop at random")
    data.add_argument("--hflip", type=options.number, default=0.0, help="with --augment, share of images mirrored")
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


def _notes(settings: type) -> dict[str, str]:
    """The first sentence on every setting, from the docstring, so that both say the same."""
    text = (settings.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    # Percent signs would be argparse's.
    texts = {name: re.sub(r":\w+:`|`", "", " ".join(note.split())).split(". ")[0].rstrip(".") for name, note in found}
    return {name: text.replace("%", "%%") for name, text in texts.items()}


def _tune(args: argparse.Namespace) -> int:
    from accelerate import PartialState

    from timm_nrpm.models.reprogramming import lambdas
    from timm_nrpm.tuning.tune import tune

    config = TuneConfig(**{field.name: getattr(args, field.name) for field in fields(TuneConfig)})
    model = options.model_of(args)
    loader = options.images_of(
        args,
        model,
        args.split,
        samples=args.samples,
        training=True,
        augment=args.augment,
        hflip=args.hflip,
        drop_last=args.drop_last,
    )
    first = args.validation_first
    at_most = args.validation_samples if first is None else None
    with called(split="--validation-split", samples="--validation-samples", first="--validation-first"):
        validation = options.images_of(args, model, args.validation_split, at_most=at_most, first=first)
    if options.is_undivided(args, args.validation_split):
        options.note(f"{args.root} is not divided into splits, so the validation images are among those tuned on.")
    before = lambdas(model)
    history = tune(model, loader, config, validation=validation, resume=args.resume, progress=True)
    if PartialState().is_main_process:
        _report(history, before, lambdas(model), Console())
    PartialState().destroy_process_group()
    return 0


def _report(history: History, before: dict[str, float], after: dict[str, float], console: Console) -> None:
    """What tuning did, as two tables."""
    c = history.config
    table = Table("layer", "lambda before", "after", title=f"paradigm {c.paradigm}, {c.objective}, Linf {c.eps:.4g}")
    for name, lam in after.items():
        table.add_row(name, f"{before[name]:.3f}", f"{lam:.3f}")
    console.print(table)
    if history.evaluations:
        table = Table(
            "step", "clean", "PGD own", "quick", "flags", title=f"validation, Linf {c.validation_eps:.4g}, in %"
        )
        for row in history.evaluations:
            shares = (f"{100 * share:.1f}" for share in (row.clean, row.own, row.quick))
            table.add_row(str(row.step), *shares, ", ".join(row.flags))
        console.print(table)
    if c.output is not None:
        console.print(f"Written: {c.output}/history.json, curves.png, variant/, checkpoints/", highlight=False)
