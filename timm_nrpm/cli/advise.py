"""`timm-nrpm advise`: a model, images and threats in, advice and the variant that follows from it out."""

from __future__ import annotations

import argparse
import json
from typing import Any

from timm_nrpm.choices import EFFORTS, NORMS
from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal

NAMES = {
    **options.NAMES,
    "resume": "--output",
    "another file": "another folder as --output",
    "adapt_(model, images) and calibrate_(model, images), which look at none": "timm-nrpm adapt and timm-nrpm "
    "calibrate, which look at none",
}
STOPPED = "What is done is in {output}, and the same command goes on from it."

USELESS = (
    *options.USELESS_FOR_MODELS,
    *options.USELESS_FOR_IMAGES,
    *options.useless_splits("split", "training_split"),
    Useless(("norm",), lambda args: args.eps is None, "no attack is asked for. Give --eps with it."),
    Useless(("severity",), lambda args: args.kinds is None, "no corruption is asked for. Give --kinds with it."),
    Useless(("training_split",), lambda args: args.train == 0, "--train 0 takes no images."),
)


def add_advise(commands: Any) -> None:
    """Add `timm-nrpm advise`."""
    parser = options.add_command(
        commands,
        "advise",
        options.Command(_advise, USELESS, NAMES, STOPPED),
        "find what to do with a model, by trying everything here on evidence",
        "Try everything that this package has on a plain model: adaptation, lambda, the estimate, tuning. Choose on "
        "some images and judge on others, and say in a table and one sentence what helps against each threat, how sure "
        "that is and what it costs. What helps is written as a variant. Without --eps and --kinds, the threats are the "
        "images as they are and an attack of Linf 8/255.",
        "timm-nrpm advise --model resnet8_digits --kinds white_noise --samples 240 --train 0 --seconds 5",
    )
    options.add_plain_model(parser)
    data = options.add_images(parser, 100, "test", 1000)
    training = "number of training images, at most, to calibrate and tune on; 0 for none (default: 5000)"
    data.add_argument("--train", type=int, default=5000, metavar="N", help=training)
    split = "split that those are from (default: train)"
    data.add_argument("--training-split", default="train", metavar="NAME", help=split)
    threats = parser.add_argument_group("threats")
    threats.add_argument("--norm", default="Linf", choices=NORMS, help="norm of an attack (default: Linf)")
    eps = "its bounds, in pixels of [0, 1]; under L0 numbers of pixels, of a patch its side"
    threats.add_argument("--eps", type=options.number, nargs="+", metavar="EPS", help=eps)
    kinds = "corruptions, such as fog or white_noise; none for the images as they are"
    threats.add_argument("--kinds", nargs="+", metavar="KIND", help=kinds)
    severity = "their severity, from 1 to 5 (default: 5)"
    threats.add_argument("--severity", type=int, default=5, metavar="N", help=severity)
    bounds = parser.add_argument_group("bounds")
    loss = "largest loss of clean accuracy, in points (default: 2)"
    bounds.add_argument("--clean-loss", type=options.number, default=2.0, metavar="X", help=loss)
    slow = "largest latency, in times the model's (default: 10)"
    bounds.add_argument("--slowdown", type=options.number, default=10.0, metavar="X", help=slow)
    effect = "smallest effect worth telling, in points, which sets how many images it takes (default: 5)"
    bounds.add_argument("--effect", type=options.number, default=5.0, metavar="X", help=effect)
    seconds = "time for each threat (default: 480)"
    bounds.add_argument("--seconds", type=options.number, default=480.0, metavar="N", help=seconds)
    effort = "how long attacks try (default: fast)"
    bounds.add_argument("--effort", default="fast", choices=EFFORTS, help=effort)
    seed = "seed of everything random (default: 0)"
    bounds.add_argument("--seed", type=int, default=0, metavar="N", help=seed)
    options.add_output(parser, "folder of the advice and the variants", "advised")


def _advise(args: argparse.Namespace, terminal: Terminal) -> None:
    import torch

    from timm_nrpm.advice.advise import DEFAULT_THREATS, advise, folder_of
    from timm_nrpm.attacks.threats import Threat
    from timm_nrpm.cli import inputs
    from timm_nrpm.evaluation.shifts import Shift
    from timm_nrpm.figures.plot import plot

    threats = [Threat(args.norm, eps) for eps in args.eps or ()]
    shifts = [Shift(kind, args.severity) for kind in args.kinds or ()]
    inputs.make_folder(args.output)
    model = inputs.model_of(args).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    report, selection, training = inputs.images_for_advice(args, model, terminal)
    found = advise(
        model,
        report,
        (*shifts, *threats) or DEFAULT_THREATS,
        selection=selection,
        training=training,
        clean_loss=args.clean_loss,
        slowdown=args.slowdown,
        effect=args.effect,
        seconds=args.seconds,
        effort=args.effort,
        seed=args.seed,
        folder=args.output,
        progress=terminal.progress,
    )
    for advice in found:
        folder = folder_of(args.output, advice.threat)
        terminal.show(f"{advice}\n")
        terminal.show(f"Written: {folder / 'advice.json'}, {plot(advice, folder / 'advice.png')}")
        if (folder / "variant").exists():
            terminal.show(f"To publish its variant: timm-nrpm push --variant {folder / 'variant'} OWNER/NAME")
        terminal.show("")
    terminal.give({"advice": [json.loads(advice.to_json()) for advice in found]})
