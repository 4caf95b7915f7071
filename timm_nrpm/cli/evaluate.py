"""`timm-nrpm evaluate`: arguments in, :func:`timm_nrpm.evaluate` and its pages out."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_nrpm.attacks.suites import SUITES
from timm_nrpm.attacks.threats import NORMS, Threat
from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.wording import called
from timm_nrpm.data.readers import FOLDERS
from timm_nrpm.models.reprogramming import lambdas, model_sha256, reprogrammed_layers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

SETTINGS = "settings.json"

SAME = (
    *("model", "lam", "iterations", "estimator_eps", "layers", "calibrate", "training_split"),
    *("data", "split", "samples", "first", "batch_size"),
)
"""Options that are the same for everything in one folder; of the weights it is their hash."""

SHOWN = (*SAME, "weights", "no_pretrained", "num_classes", "root", "class_map")
"""Options that a message names where another model or other images are evaluated into a folder."""


def _is_plain(args: argparse.Namespace) -> bool:
    return args.lam is None and not options.is_variant(args)


RULES = (
    *options.RULES,
    *options.split_rules("split", "training_split"),
    Useless(
        ("calibrate", "training_split"),
        options.is_variant,
        "{model} is a variant, which brings its own statistics. Leave them out.",
    ),
    Useless(
        ("iterations", "estimator_eps", "layers", "calibrate", "training_split", "no_control"),
        _is_plain,
        "with --lam none the model is plain. Leave them out, or give a number.",
    ),
    Useless(
        ("training_split",),
        lambda args: args.calibrate == 0 and not options.is_variant(args) and not _is_plain(args),
        "--calibrate 0 takes no images.",
    ),
    Useless(("queries",), lambda args: args.suite == "quick", "the suite quick has no random search."),
)
"""Options that have no effect in some calls."""

NAMES = {
    **options.NAMES,
    "resume": "--output",
    "another file": "another folder as --output",
    "control=False": "--no-control",
}
"""Flags of arguments of another name, and phrases that are said otherwise."""


def add_command(commands: Any) -> None:
    """Add it to the subparsers of `timm-nrpm`."""
    parser = commands.add_parser("evaluate", help="attack a model in every way there is, and report the worst case")
    parser.description = (
        "Evaluate a reprogrammed model, or a plain one with --lam none, under every attack of a suite; docs/attacks.md "
        "says what they are. A run that was stopped goes on when it is started again. Several processes: as for tune."
    )
    stopped = "What is done is in {output}, and the same command goes on from it."
    parser.set_defaults(run=_evaluate, useless=RULES, names=NAMES, stopped=stopped)
    options.add_model(parser, 0.8, plain=True)
    data = options.add_images(parser, batch_size=100)
    data.add_argument("--split", default="test", help="to evaluate on (default: test)")
    some = data.add_mutually_exclusive_group()
    some.add_argument("--samples", type=int, default=500, help="at most, drawn at random (default: 500)")
    some.add_argument("--first", type=int, help="the first so many images of the split, in their own order")
    data.add_argument("--calibrate", type=int, default=1000, help="at most so many training images (default: 1000)")
    data.add_argument("--training-split", default="train", help="where those are (default: train)")
    attack = parser.add_argument_group("attacks")
    attack.add_argument("--norm", default="Linf", choices=NORMS, help="what is bounded (default: Linf)")
    attack.add_argument(
        "--eps", type=options.number, nargs="+", default=[8 / 255], help="bounds in [0, 1] pixel units (default: 8/255)"
    )
    attack.add_argument("--suite", default="adaptive", choices=SUITES, help="(default: adaptive)")
    attack.add_argument("--steps", type=int, help="of each ascent (default: the suite's)")
    attack.add_argument("--queries", type=int, help="of each random search (default: the suite's)")
    attack.add_argument("--seed", type=int, default=0, help="of everything random in the attacks (default: 0)")
    attack.add_argument("--no-control", action="store_true", help="do not attack the plain model beside it")
    attack.add_argument(
        "--output", type=Path, default=Path("evaluated"), help="folder for reports (default: evaluated)"
    )


def _evaluate(args: argparse.Namespace) -> int:
    from timm_nrpm.evaluation.evaluate import evaluate, together
    from timm_nrpm.figures.report_folder import show

    threats = [Threat(args.norm, eps) for eps in args.eps]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {args.output} cannot be written to ({error}): give another folder.") from error
    with _processes() as (accelerator, device):
        main = accelerator is None or accelerator.is_main_process
        model = options.model_of(args).to(device)
        at_most = args.samples if args.first is None else None
        loader = options.images_of(args, model, args.split, at_most=at_most, first=args.first)
        _calibrate(args, model)
        together(accelerator, lambda: _claim(args, model) if main else {})
        reports = []
        for threat in threats:
            stem = args.output / f"{args.suite}-{threat.norm}-{threat.eps:.6g}"
            report = evaluate(
                model,
                loader,
                threat,
                args.suite,
                steps=args.steps,
                queries=args.queries,
                seed=args.seed,
                data=_described_images(args),
                control=not args.no_control,
                resume=f"{stem}.jsonl",
                accelerator=accelerator,
                progress=True,
            )
            reports.append(report)
            if main:
                Path(f"{stem}.json").write_text(json.dumps(report.to_dict()) + "\n")
                print(report)
        if main:
            title = f"{args.model}, {_described_model(model)}"
            print(f"Written: {show(reports, model, loader, args.output, title=title)}")
    return 0


@contextmanager
def _processes() -> Iterator[tuple[Accelerator | None, Any]]:
    """The processes that torchrun or accelerate started, None for one alone; and the device of this one."""
    import torch

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


def _calibrate(args: argparse.Namespace, model: nn.Module) -> None:
    """Calibrate a model that was reprogrammed just now on training images."""
    from timm_nrpm.models.calibration import calibrate_

    if not args.calibrate or options.is_variant(args) or not reprogrammed_layers(model):
        return
    with called(split="--training-split", samples="--calibrate"):
        training = options.images_of(args, model, args.training_split, at_most=args.calibrate)
    if options.is_undivided(args, args.training_split):
        options.note(
            f"{args.root} is not divided into splits, so the model is calibrated on images that are evaluated."
        )
    calibrate_(model, training)


def _claim(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Note in the folder whose evaluation it holds.

    Raises:
        ValueError: It holds results of another model, or on other images.
    """
    path = args.output / SETTINGS
    now = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name in SHOWN
    }
    now["sha256"] = model_sha256(model)
    if path.exists() and any(args.output.glob("*.jsonl*")):
        try:
            then = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}): give another folder as --output.") from error
        _compare(args.output, then, now)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return {}


def _compare(output: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a ValueError if the settings of two evaluations are not those of one."""
    if all(then.get(name) == now[name] for name in (*SAME, "sha256")):
        return
    changed = [name for name in SHOWN if then.get(name) != now[name]]
    listed = [f"{name}={then.get(name)!r} then, {now[name]!r} now" for name in changed]
    raise ValueError(
        f"{output} holds an evaluation of something else ({'; '.join(listed) or 'the weights or statistics differ'}): "
        "give another folder as --output, or what it had."
    )


def _described_images(args: argparse.Namespace) -> str:
    """What is evaluated on, in words, for the report."""
    name = args.data.removeprefix("torch/").removeprefix("hfds/")
    if args.data.lower() in FOLDERS:
        name = args.root.resolve().stem if args.root.is_file() else args.root.resolve().name
    words = [name] if options.is_undivided(args, args.split) else [name, args.split]
    return ", ".join(words if args.first is None else [*words, f"the first {args.first}"])


def _described_model(model: nn.Module) -> str:
    """The lambdas of a model, in words."""
    if not reprogrammed_layers(model):
        return "plain"
    lams = sorted(lambdas(model).values())
    low, high = (f"{lam:.3g}" for lam in (lams[0], lams[-1]))
    return f"lambda {low}" if low == high else f"lambda {low} to {high}"
