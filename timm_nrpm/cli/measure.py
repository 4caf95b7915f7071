"""`timm-nrpm certify` and `corrupt`: what a model is worth where nobody follows a gradient."""

from __future__ import annotations

import argparse
import json
from typing import Any

from timm_nrpm.cli import options
from timm_nrpm.cli.terminal import Terminal


def add_certify(commands: Any) -> None:
    """Add `timm-nrpm certify`."""
    names = {**options.NAMES, "resume": "--output", "another file": "another folder as --output"}
    stopped = "What is done is in {output}, and the same command goes on from it."
    parser = options.add_command(
        commands,
        "certify",
        options.Command(_certify, options.USELESS_FOR_MEASURING, names, stopped),
        "certify a radius around every image, by randomized smoothing",
        "Certify, for every image, a radius within which no change whatever moves the prediction of the smoothed "
        "model, and write a report and a picture. A run that was stopped goes on when it is started again.",
        "timm-nrpm certify --model resnet8_digits --lam 0.8 --sigma 0.25 --samples 5",
    )
    options.add_model(parser, 0.8, plain=True)
    options.add_calibration(options.add_images(parser, 100, "test", 100))
    noise = parser.add_argument_group("noise")
    sigma = "standard deviation of the noise, in pixels of [0, 1] (default: 0.25)"
    noise.add_argument("--sigma", type=options.number, default=0.25, metavar="X", help=sigma)
    noise.add_argument("--n0", type=int, default=100, metavar="N", help="samples that choose the class (default: 100)")
    n = "samples that bound its probability (default: 1000)"
    noise.add_argument("--n", type=int, default=1000, metavar="N", help=n)
    confidence = "probability that a certificate is right (default: 0.999)"
    noise.add_argument("--confidence", type=options.number, default=0.999, metavar="P", help=confidence)
    noise.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)")
    halves = "smooth two halves of the pixels, each by itself (dual randomized smoothing), with as many samples"
    noise.add_argument("--halves", action="store_true", help=halves)
    options.add_output(parser, "folder of the report", "certified")


def add_corrupt(commands: Any) -> None:
    """Add `timm-nrpm corrupt`."""
    parser = options.add_command(
        commands,
        "corrupt",
        options.Command(_corrupt, options.USELESS_FOR_MEASURING, options.NAMES),
        "measure accuracy under noise, blur, weather and compression",
        "Measure what the corruptions of ImageNet-C, and three of this package, cost a model and the plain one, and "
        "write a report and a picture.",
        "timm-nrpm corrupt --model resnet8_digits --kinds white_noise salt_and_pepper --severities 1 3 --samples 50",
    )
    options.add_model(parser, 0.8, plain=True)
    options.add_calibration(options.add_images(parser, 100, "test", 500))
    corruptions = parser.add_argument_group("corruptions")
    kinds = "their names, such as fog or white_noise (default: the 15 of ImageNet-C)"
    corruptions.add_argument("--kinds", nargs="+", metavar="KIND", help=kinds)
    severities = "from 1 to 5 (default: all five)"
    corruptions.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N", help=severities)
    seed = "seed of what is random in them (default: 0)"
    corruptions.add_argument("--seed", type=int, default=0, metavar="N", help=seed)
    options.add_output(parser, "folder of the report", "corrupted")


def _certify(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli import inputs
    from timm_nrpm.evaluation.certification import certify
    from timm_nrpm.evaluation.halves import certify_halves

    inputs.make_folder(args.output)
    model, loader = inputs.measured(args, terminal)
    written = args.output / f"{'halves' if args.halves else 'sigma'}-{args.sigma:g}.json"
    report = (certify_halves if args.halves else certify)(
        model,
        loader,
        args.sigma,
        n0=args.n0,
        n=args.n,
        confidence=args.confidence,
        seed=args.seed,
        batch_size=args.batch_size,
        name=inputs.described_model(args, model),
        resume=written.with_suffix(".jsonl"),
        progress=terminal.progress,
    )
    _write(report, written, terminal)


def _corrupt(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli import inputs
    from timm_nrpm.evaluation.corruptions import IMAGENET_C, evaluate_corruptions

    inputs.make_folder(args.output)
    model, loader = inputs.measured(args, terminal)
    report = evaluate_corruptions(
        model,
        loader,
        args.kinds or IMAGENET_C,
        severities=args.severities,
        seed=args.seed,
        progress=terminal.progress,
    )
    _write(report, args.output / "corruptions.json", terminal)


def _write(report: Any, path: Any, terminal: Terminal) -> None:
    """Write a report and its picture, and print it."""
    from timm_nrpm.figures.plot import plot

    path.write_text(report.to_json() + "\n", encoding="utf-8")
    picture = plot(report, path.with_suffix(".png"))
    terminal.show(str(report))
    terminal.show(f"Written: {path}, {picture}")
    terminal.give({"file": str(path), "picture": str(picture), "report": json.loads(report.to_json())})
