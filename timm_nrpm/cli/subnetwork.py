"""`timm-nrpm subnetwork`: a network and images in, what a robust early part is worth to the rest out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab

from timm_nrpm.checks import check_number
from timm_nrpm.choices import OPTIMIZERS, TUNED_NORMS
from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.cli.wording import called
from timm_nrpm.config import TuneConfig

if TYPE_CHECKING:
    from timm_nrpm.evaluation.subnetwork_report import SubnetworkReport

NAMES = {
    **options.NAMES,
    "another file": "another folder as --output",
    "Give more images, of every class": "Give more training images as --train, of every class",
    "epochs": "--late-epochs",
    "suites": "--attacks",
    "robust": "--robust-weights",
}
STOPPED = "What is done is in {output}, and the same command goes on from it."

ATTACKS = {"quick": "FGSM and PGD", "standard": "AutoAttack", "adaptive": "the worst case"}
"""Suites of attacks, and what they measure."""

GIVEN = "the robust network is given. Leave --robust-weights out to train it."

USELESS = (
    *options.USELESS_FOR_MODELS,
    *options.USELESS_FOR_IMAGES,
    *options.useless_splits("split", "training_split"),
    Useless(("epochs",), lambda args: args.robust_weights is not None, GIVEN),
    Useless(("lr",), lambda args: args.robust_weights is not None and not args.natural_epochs, GIVEN),
)


def add_subnetwork(commands: Any) -> None:
    """Add `timm-nrpm subnetwork`."""
    parser = options.add_command(
        commands,
        "subnetwork",
        options.Command(_subnetwork, USELESS, NAMES, STOPPED),
        "find whether a robust early part of a network is enough",
        "Make a network robust by adversarial training, give its last layers their natural weights back, and tune "
        "those alone behind the robust early part, until the network is as robust as it was (Algorithm 1 of "
        "arXiv 2307.03803). Trials end on some images, and the networks are compared on others. Several processes "
        "share the work: see timm-nrpm tune --help.",
        "timm-nrpm subnetwork --model resnet8_digits --late 2 --eps 0.1 --epochs 1 --steps 1 --trials 1 "
        "--late-epochs 1 --samples 40 --attacks quick",
    )
    options.add_plain_model(parser)
    data = options.add_images(parser, 64, "test", 400)
    training = "number of training images, at most (default: 5000)"
    data.add_argument("--train", type=int, default=5000, metavar="N", help=training)
    split = "split that those are from (default: train)"
    data.add_argument("--training-split", default="train", metavar="NAME", help=split)
    _add_networks(parser.add_argument_group("the networks"))
    _add_attack(parser.add_argument_group("attacks"))
    options.add_output(parser, "folder of the result and of all weights", "subnetwork")


def _add_networks(group: Any) -> None:
    late = "number of layers of the late part, counted from the output"
    group.add_argument("--late", type=int, required=True, metavar="N", help=late)
    natural = "epochs of training on clean images, for a model without weights (default: 0)"
    group.add_argument("--natural-epochs", type=int, default=0, metavar="N", help=natural)
    robust = "weights of the robust network (default: it is trained)"
    group.add_argument("--robust-weights", metavar="FILE", help=robust).complete = shtab.FILE
    group.add_argument("--epochs", type=int, default=10, metavar="N", help="epochs of its training (default: 10)")
    group.add_argument("--lr", type=options.number, default=0.01, metavar="X", help="its learning rate (default: 0.01)")
    optimizer = "optimizer, one of timm's (default: momentum)"
    group.add_argument("--optimizer", default="momentum", choices=OPTIMIZERS, help=optimizer)
    group.add_argument("--trials", type=int, default=3, metavar="N", help="late parts that are tuned (default: 3)")
    epochs = "epochs of each, at most, with a learning rate of 0.001 (default: 10)"
    group.add_argument("--late-epochs", type=int, default=10, metavar="N", help=epochs)
    tolerance = "points under PGD by which a network may be worse than the robust one (default: 1)"
    group.add_argument("--tolerance", type=options.number, default=1.0, metavar="X", help=tolerance)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")


def _add_attack(group: Any) -> None:
    norm = "norm of the change, in training and of all attacks (default: Linf)"
    group.add_argument("--norm", default="Linf", choices=TUNED_NORMS, help=norm)
    eps = "its bound, under Linf of a pixel of [0, 1] (default under Linf: 8/255)"
    group.add_argument("--eps", type=options.number, metavar="EPS", help=eps)
    group.add_argument("--steps", type=int, default=10, metavar="N", help="steps of PGD in training (default: 10)")
    attacks = "; ".join(f"{name}: {what}" for name, what in ATTACKS.items())
    group.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS, help=f"{attacks} (default: all)")


def _subnetwork(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli import inputs
    from timm_nrpm.models.reprogramming import plain_copy
    from timm_nrpm.models.weights import load_published_
    from timm_nrpm.nn.wrappers import copied
    from timm_nrpm.subnetworks.semirobust import semirobust

    inputs.make_folder(args.output)
    with inputs.processes() as (accelerator, device):
        model = inputs.model_of(args).eval().to(device)
        robust = None
        if args.robust_weights is not None:
            with called(weights="--robust-weights"):
                robust = load_published_(copied(plain_copy(model)), args.robust_weights)
        report, selection, training = inputs.images_for_advice(args, model, terminal)
        if training is None:
            raise ValueError("train=0 leaves no images to train on: give --train 1000, or leave it out.")
        check_number("tolerance", args.tolerance, least=0, most=100, why=" of points")
        with called(epochs="--epochs"):
            config = TuneConfig(
                paradigm="all", norm=args.norm, eps=args.eps, steps=args.steps, epochs=args.epochs, lr=args.lr,
                optimizer=args.optimizer, seed=args.seed,
            )  # fmt: skip
        result = semirobust(
            model,
            training,
            selection,
            report,
            args.late,
            robust=robust,
            natural_epochs=args.natural_epochs,
            config=config,
            trials=args.trials,
            epochs=args.late_epochs,
            tolerance=args.tolerance / 100,
            suites=tuple(args.attacks),
            folder=args.output,
            accelerator=accelerator,
            progress=terminal.progress,
        )
        if accelerator is None or accelerator.is_main_process:
            _show(result, args.output, terminal)


def _show(result: SubnetworkReport, folder: Path, terminal: Terminal) -> None:
    """Print the result, and write it and its picture into the folder."""
    from timm_nrpm.figures.plot import plot

    terminal.show(f"{result}\n")
    (folder / "subnetwork.json").write_text(result.to_json() + "\n", encoding="utf-8")
    picture = plot(result, folder / "subnetwork.png")
    terminal.show(f"Written: {folder / 'subnetwork.json'}, {picture}")
    terminal.give({"subnetwork": json.loads(result.to_json())})
