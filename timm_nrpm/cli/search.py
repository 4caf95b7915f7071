"""`timm-nrpm search`: arguments in, :func:`timm_nrpm.search_lambda`, its front and its best variant out."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal

USELESS = (
    *options.USELESS_FOR_MODELS,
    *options.USELESS_FOR_IMAGES,
    *options.useless_splits("split", "training_split"),
    Useless(
        ("lam",),
        lambda args: args.variant is None,
        "lambda is what is searched for. Give --layers to choose the layers it is searched for.",
    ),
    Useless(("training_split",), lambda args: args.calibrate == 0, "--calibrate 0 takes no images."),
)

NAMES = {
    **options.NAMES,
    "layerwise=False": "--one-lambda",
    "calibration": "--calibrate",
    "bound": "--clean-loss",
    "resume": "--output",
    "another file": "another folder as --output",
}


STOPPED = "What is done is in {output}, and the same command goes on from it."


def add_search(commands: Any) -> None:
    """Add `timm-nrpm search`."""
    parser = options.add_command(
        commands,
        "search",
        options.Command(_search, USELESS, NAMES, STOPPED),
        "search lambda, one for all layers and one for each, without training",
        "Try lambdas, calibrate each, and keep the best under quick attacks whose loss of clean accuracy is bounded: "
        "the front of all that were tried, its picture, and the best as a variant. What that is worth, timm-nrpm "
        "evaluate tells on other images.",
        "timm-nrpm search --model resnet8_digits --eps 0.15 --budget 6 --one-lambda --samples 40 --steps 3",
    )
    options.add_model(parser, 0.8)
    data = options.add_images(parser, 100, "train", 500)
    options.add_calibration(data)
    search = parser.add_argument_group("search")
    options.add_threat(search, several=False)
    budget = "settings that are tried, the plain model included (default: 50)"
    search.add_argument("--budget", type=int, default=50, metavar="N", help=budget)
    search.add_argument("--one-lambda", action="store_true", help="search one lambda for all layers alone")
    loss = "largest loss of clean accuracy, in points (default: 2)"
    search.add_argument("--clean-loss", type=options.number, default=2.0, metavar="X", help=loss)
    search.add_argument("--steps", type=int, default=20, metavar="N", help="steps of PGD (default: 20)")
    seed = "seed of the search and of PGD (default: 0)"
    search.add_argument("--seed", type=int, default=0, metavar="N", help=seed)
    options.add_output(parser, "folder of the front and the variant", "searched")


def _search(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.attacks.threats import Threat
    from timm_nrpm.cli import inputs
    from timm_nrpm.cli.wording import called
    from timm_nrpm.evaluation.search import search_lambda
    from timm_nrpm.figures.plot import plot
    from timm_nrpm.models.calibration import calibrate_
    from timm_nrpm.models.reprogramming import record_of, reprogram_
    from timm_nrpm.models.saving import save_loadable

    threat = Threat(args.norm, args.eps)
    inputs.make_folder(args.output)
    model = inputs.model_of(args).eval()
    loader = inputs.chosen_images(args, model)
    calibration = None
    if args.calibrate:
        with called(split="--training-split", samples="--calibrate"):
            calibration = inputs.images_of(args, model, args.training_split, at_most=args.calibrate)
    front = search_lambda(
        model,
        loader,
        threat,
        budget=args.budget,
        layerwise=not args.one_lambda,
        bound=args.clean_loss,
        calibration=calibration,
        steps=args.steps,
        seed=args.seed,
        resume=args.output / "search.jsonl",
        progress=terminal.progress,
    )
    file = args.output / "front.json"
    file.write_text(front.to_json() + "\n", encoding="utf-8")
    picture = plot(front, args.output / "front.png")
    reprogram_(model, replace(record_of(model).config, lam=front.best.lams))
    if calibration is not None:
        calibrate_(model, calibration)
    save_loadable(model, args.output / "variant")
    terminal.show(str(front))
    terminal.show(f"Written: {file}, {picture}, {args.output / 'variant'}")
    terminal.give(
        {"variant": str(args.output / "variant"), "picture": str(picture), "front": json.loads(front.to_json())}
    )
