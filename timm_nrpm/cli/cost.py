"""`timm-nrpm cost`: what a reprogrammed model costs, before it is run."""

from __future__ import annotations

import argparse
import json
from typing import Any

from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal

RANDOM = Useless(
    ("weights", "no_pretrained"),
    lambda args: args.variant is None,
    "a model costs the same whatever its weights are, so they are random here. Leave them out.",
)
"""The rule for options that name weights, of which the cost does not depend."""


def add_cost(commands: Any) -> None:
    """Add `timm-nrpm cost`."""
    useless = (RANDOM, *options.USELESS_FOR_MODELS, *options.USELESS_FOR_PLAIN)
    parser = options.add_command(
        commands,
        "cost",
        options.Command(_cost, useless, {**options.NAMES, "batch": "--batch-size"}),
        "estimate what a reprogrammed model costs: products, time and memory",
        "Estimate the products, time and memory of a forward, layer by layer and in times the plain model, without "
        "running the reprogrammed model: from how fast this machine computes small layers, which takes two seconds.",
        "timm-nrpm cost --model resnet8_digits --lam 0.8 --layers first:4 --iterations 1",
    )
    options.add_model(parser, 0.8, plain=True)
    run = parser.add_argument_group("forward")
    run.add_argument("--batch-size", type=int, default=1, metavar="N", help="images in a batch (default: 1)")
    run.add_argument("--measured", action="store_true", help="run both models too, and measure their time and memory")
    options.add_output(parser)


def _cost(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.cli.inputs import model_of
    from timm_nrpm.evaluation.cost import cost

    args.no_pretrained = True
    model = model_of(args)  # which refuses other numbers of sizes than one or two
    size = None if args.image_size is None else (args.image_size[0], args.image_size[-1])
    report = cost(model, size, batch=args.batch_size, measured=args.measured)
    terminal.show(str(report))
    terminal.give({"report": json.loads(report.to_json()), "seconds": report.seconds, "slowdown": report.slowdown})
