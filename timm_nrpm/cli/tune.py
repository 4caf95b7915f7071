"""`timm-nrpm tune`: arguments in, :func:`timm_nrpm.tune` out."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.table import Table

from timm_nrpm.choices import (
    GRADIENTS,
    OBJECTIVES,
    OPTIMIZERS,
    PARADIGMS,
    PRECISIONS,
    SCHEDULES,
    TEMPERED,
    TUNED_NORMS,
)
from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.cli.values import number, number_or_none
from timm_nrpm.cli.wording import called
from timm_nrpm.config import TuneConfig

if TYPE_CHECKING:
    from timm_nrpm.evaluation.history import History

ONE_STEP = ("clean", "fgsm", "clean+fgsm")
TWO_TERMS = ("trades", "mart", "sat", "weat", "srat", "comp-sum")
UNTAUGHT = tuple(name for name in OBJECTIVES if name != "teacher")
"""Objectives without a teacher, which is a model and so has no place on a command line."""

USELESS = (
    *options.USELESS_FOR_MODELS,
    *options.USELESS_FOR_IMAGES,
    *options.useless_splits("split", "validation_split"),
    Useless(("hflip",), lambda args: not args.augment, "images are mirrored with --augment alone."),
    Useless(
        ("lr", "weight_decay"),
        lambda args: args.paradigm == "lambda" and args.trainable is None,
        "lambda alone is tuned, which has --lam-lr. Give --paradigm all to tune weights too.",
    ),
    Useless(
        ("steps",),
        lambda args: args.objective in ONE_STEP or args.eps == 0,
        "the objective {objective} takes no attack of several steps, nor does --eps 0.",
    ),
    Useless(
        ("step_size", "gradient"),
        lambda args: args.objective == "clean" or args.eps == 0,
        "the objective {objective} attacks no image, nor does --eps 0.",
    ),
    Useless(
        ("eps",),
        lambda args: args.objective == "clean" and args.evaluate_eps is not None,
        "the objective clean attacks no image, and validation has --evaluate-eps.",
    ),
    Useless(
        ("beta",),
        lambda args: args.objective not in TWO_TERMS,
        "the objective {objective} has no second term. Those of trades, mart, sat, weat, srat and comp-sum have.",
    ),
    Useless(
        ("temperature",),
        lambda args: args.objective not in TEMPERED,
        "the objective {objective} has no temperature. Those of kl-dro and srat have.",
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

NAMES = {**options.NAMES, "another output": "another folder as --output", "drop_last": "--drop-last"}

TEXT = (
    "Tune a reprogrammed model by adversarial training: lambda alone (paradigm 2) or everything (paradigm 3), and "
    "write checkpoints, a history, a picture and the tuned variant into a folder. Several processes share the images: "
    'start "accelerate launch -m timm_nrpm.cli tune ..." or "torchrun --nproc_per_node 2 -m timm_nrpm.cli tune ...", '
    "on the CPU with ACCELERATE_USE_CPU=true before the latter."
)


def add_tune(commands: Any) -> None:
    """Add `timm-nrpm tune`."""
    stopped = "The last checkpoint is in {output}, and the same command with --resume goes on from it."
    parser = options.add_command(
        commands,
        "tune",
        options.Command(_tune, USELESS, NAMES, stopped),
        "learn lambda, or everything, under attack",
        TEXT,
        "timm-nrpm tune --model resnet8_digits --epochs 1 --eps 0.15 --steps 2 --samples 128 --output tuned",
    )
    options.add_model(parser, 0.5)
    data = options.add_images(parser, 64, "train", None)
    validation = "split that is evaluated (default: test)"
    data.add_argument("--validation-split", default="test", metavar="NAME", help=validation)
    drawn = data.add_mutually_exclusive_group()
    samples = "number of its images drawn at random (default: 500 at most)"
    drawn.add_argument("--validation-samples", type=int, default=500, metavar="N", help=samples)
    first = "take its first N images, in their order, instead"
    drawn.add_argument("--validation-first", type=int, metavar="N", help=first)
    data.add_argument("--drop-last", action="store_true", help="leave out a last batch that is not full")
    data.add_argument("--augment", action="store_true", help="crop at random")
    hflip = "with --augment, share of images that are mirrored (default: 0)"
    data.add_argument("--hflip", type=number, default=0.0, metavar="SHARE", help=hflip)
    _add_objective(parser.add_argument_group("what is learned, and under which attack"))
    _add_schedule(parser.add_argument_group("how it is learned"))
    _add_run(parser.add_argument_group("what is kept"))
    options.add_output(parser, "folder of the run", "tuned")


def _add_objective(group: Any) -> None:
    group.add_argument(
        "--paradigm",
        default="lambda",
        choices=PARADIGMS,
        help="lambda: one number per layer, weights frozen (paradigm 2); all: lambda and weights (3) (default: lambda)",
    )
    group.add_argument(
        "--trainable", nargs="+", metavar="GLOB", help="parameters that are tuned instead, as '*.lam' 'layer4.*'"
    )
    still = "modules that stay in evaluation mode, as '*.bn*' for statistics that do not move"
    group.add_argument("--still", nargs="+", default=(), metavar="GLOB", help=still)
    loss = (
        "loss; clean+fgsm is the sum of the two, weat weights images by energy, kl-dro the worst most, srat reweights "
    )
    loss += "classes of unequal size and separates them, comp-sum is smooth in the margins (default: pgd)"
    group.add_argument("--objective", default="pgd", choices=UNTAUGHT, help=loss)
    norm = "norm of the change in the inner attack (default: Linf)"
    group.add_argument("--norm", default="Linf", choices=TUNED_NORMS, help=norm)
    eps = "bound of the change, under Linf of a pixel of [0, 1]; 0 attacks nothing (default under Linf: 8/255)"
    group.add_argument("--eps", type=number, metavar="EPS", help=eps)
    group.add_argument("--steps", type=int, default=7, metavar="N", help="steps of the inner attack (default: 7)")
    size = "size of one step, in pixels of [0, 1] (default: a quarter of eps; for one step, eps)"
    group.add_argument("--step-size", type=number, metavar="X", help=size)
    group.add_argument(
        "--gradient",
        default="own",
        choices=GRADIENTS,
        help="gradient that the inner attack follows: the model's own; bpda, of the linear maps behind the estimates; "
        "plain, of the model at lambda 1; or a mixture of the three (default: own)",
    )
    beta = (
        "weight of the second term of trades, mart, sat, weat, srat and comp-sum (default: 6; srat: 1; comp-sum: 0.3)"
    )
    group.add_argument("--beta", type=number, metavar="X", help=beta)
    temperature = "temperature of kl-dro's weights or of srat's similarities (default: 1; srat: 0.1)"
    group.add_argument("--temperature", type=number, metavar="X", help=temperature)
    awp = "size of awp's step in a weight, relative to its norm (default: 0.01)"
    group.add_argument("--weight-perturbation", type=number, default=0.01, metavar="X", help=awp)
    momentum = "share of a soft target of sat that stays at each update (default: 0.9)"
    group.add_argument("--target-momentum", type=number, default=0.9, metavar="SHARE", help=momentum)
    start = "epoch, from 0, at which sat's targets begin to move (default: 1)"
    group.add_argument("--target-start", type=int, default=1, metavar="N", help=start)


def _add_schedule(group: Any) -> None:
    group.add_argument("--epochs", type=int, default=5, metavar="N", help="passes over the images (default: 5)")
    optimizer = "optimizer, one of timm's (default: sgd)"
    group.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS, help=optimizer)
    lr = "learning rate of everything but lambda (default: 0.01)"
    group.add_argument("--lr", type=number, default=0.01, metavar="X", help=lr)
    group.add_argument(
        "--lam-lr", type=number, default=0.01, metavar="X", help="learning rate of lambda (default: 0.01)"
    )
    decay = "weight decay of weights, never of lambda (default: 5e-4)"
    group.add_argument("--weight-decay", type=number, default=5e-4, metavar="X", help=decay)
    calibrate = "training images that the model is calibrated on, first and after epochs; 0: none (default: 1000)"
    group.add_argument("--calibrate", type=int, default=1000, metavar="N", help=calibrate)
    schedule = "course of the learning rates (default: cosine)"
    group.add_argument("--schedule", default="cosine", choices=SCHEDULES, help=schedule)
    warmup = "epochs of linear warm-up (default: 0)"
    group.add_argument("--warmup-epochs", type=int, default=0, metavar="N", help=warmup)
    clip = "largest norm of the gradient, of lambda and of the rest each, or none (default: 1)"
    group.add_argument("--clip", type=number_or_none, default=1.0, metavar="X", help=clip)
    patience = "steps in a row whose gradient may be non-finite before the run is given up (default: 10)"
    group.add_argument("--patience", type=int, default=10, metavar="N", help=patience)
    accumulate = "batches whose mean gradient makes one step (default: 1)"
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help=accumulate)
    precision = "no: float32; bf16: autocast, the estimate still in float32 (default: no)"
    group.add_argument("--precision", default="no", choices=PRECISIONS, help=precision)
    seed = "seed of the images' order, augmentation, attacks and dropout (default: 0)"
    group.add_argument("--seed", type=int, default=0, metavar="N", help=seed)


def _add_run(group: Any) -> None:
    group.add_argument("--resume", action="store_true", help="go on from the last good checkpoint, if there is one")
    every = "steps between two checkpoints (default: 100)"
    group.add_argument("--checkpoint-every", type=int, default=100, metavar="N", help=every)
    group.add_argument("--keep", type=int, default=3, metavar="N", help="checkpoints that are kept (default: 3)")
    steps = "steps of PGD on the validation images (default: 10)"
    group.add_argument("--evaluate-steps", type=int, default=10, metavar="N", help=steps)
    eps = "bound of the change of their pixels, in the same norm (default: that of training, or under Linf 8/255)"
    group.add_argument("--evaluate-eps", type=number, metavar="EPS", help=eps)
    rows = "steps between two rows of the history (default: 1)"
    group.add_argument("--log-every", type=int, default=1, metavar="N", help=rows)
    trackers = "trackers that accelerate knows, such as tensorboard"
    group.add_argument("--trackers", nargs="+", default=(), metavar="NAME", help=trackers)
    push = "owner/name on the Hub that the variant is sent to with every checkpoint"
    group.add_argument("--push-to", metavar="REPO", help=push)
    group.add_argument(
        "--license", metavar="ID", help="its licence, an identifier that the Hub knows (default: the base's)"
    )


def _tune(args: argparse.Namespace, terminal: Terminal) -> None:
    from accelerate import PartialState

    from timm_nrpm.cli import inputs
    from timm_nrpm.models.reprogramming import lambdas
    from timm_nrpm.models.saving import complete
    from timm_nrpm.tuning.tune import tune

    config = TuneConfig(**{field.name: getattr(args, field.name) for field in fields(TuneConfig)})
    model = inputs.model_of(args)
    loader = inputs.images_of(
        args,
        model,
        args.split,
        samples=args.samples,
        first=args.first,
        training=True,
        augment=args.augment,
        hflip=args.hflip,
        drop_last=args.drop_last,
    )
    first = args.validation_first
    at_most = args.validation_samples if first is None else None
    with called(split="--validation-split", samples="--validation-samples", first="--validation-first"):
        validation = inputs.images_of(args, model, args.validation_split, at_most=at_most, first=first)
    if options.is_undivided(args, args.validation_split):
        terminal.note(f"{args.root} is not divided into splits, so the validation images are among those tuned on.")
    before = lambdas(model)
    history = tune(model, loader, config, validation=validation, resume=args.resume, progress=terminal.progress)
    if PartialState().is_main_process:
        complete(model, args.output / "variant")
        _report(history, before, lambdas(model), terminal)
    PartialState().destroy_process_group()


def _report(history: History, before: dict[str, float], after: dict[str, float], terminal: Terminal) -> None:
    """What tuning did, as two tables."""
    c = history.config
    table = Table(
        "layer", "lambda before", "after", title=f"paradigm {c.paradigm}, {c.objective}, {c.norm} {c.eps:.4g}"
    )
    for name, lam in after.items():
        table.add_row(name, f"{before[name]:.3f}", f"{lam:.3f}")
    terminal.show(table)
    if history.evaluations:
        table = Table(
            "step", "clean", "PGD own", "quick", "flags", title=f"validation, {c.norm} {c.validation_eps:.4g}, in %"
        )
        for row in history.evaluations:
            shares = (f"{100 * share:.1f}" for share in (row.clean, row.own, row.quick))
            table.add_row(str(row.step), *shares, ", ".join(row.flags))
        terminal.show(table)
    terminal.show(f"Written: {c.output}/history.json, curves.png, variant/, checkpoints/")
    terminal.give({"variant": f"{c.output}/variant", "lambdas": after, "history": history.to_dict()})
