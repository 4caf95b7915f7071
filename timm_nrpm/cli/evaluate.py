"""`timm-nrpm evaluate`: arguments in, :func:`timm_nrpm.evaluate` and its pages out."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_nrpm.choices import EFFORTS, SUITES
from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal

if TYPE_CHECKING:
    from torch import nn

SETTINGS = "settings.json"

SAME = (
    *("variant", "model", "image_size", "mean", "std", "lam", "iterations", "estimator_eps", "penalty", "layers"),
    *("standardize", "calibrate", "training_split", "data", "split", "samples", "first", "batch_size"),
)
"""Options that must agree for all results in one folder; weights must agree by their hash."""

SHOWN = (*SAME, "weights", "revision", "no_pretrained", "num_classes", "root", "class_map")
"""Options that the message names if another model or other images are evaluated into a folder."""

USELESS = (
    *options.USELESS_FOR_MEASURING,
    Useless(("no_control",), options.is_plain, "with --lam none the model is plain, and is its own control."),
    Useless(("queries",), lambda args: args.suite == "quick", "the suite quick has no random search."),
    Useless(("effort",), lambda args: args.suite != "adaptive", "the suite {suite} has the numbers of its authors."),
)

NAMES = {
    **options.NAMES,
    "resume": "--output",
    "another file": "another folder as --output",
}


def add_evaluate(commands: Any) -> None:
    """Add `timm-nrpm evaluate`."""
    stopped = "What is done is in {output}, and the same command goes on from it."
    parser = options.add_command(
        commands,
        "evaluate",
        options.Command(_evaluate, USELESS, NAMES, stopped),
        "attack a model in every way there is, and report the worst case",
        "Attack a reprogrammed model, or a plain one with --lam none, by every attack of a suite, and write a page, "
        "pictures and a JSON report for each bound into a folder. A run that was stopped goes on when it is started "
        "again. What the attacks leave of the plain model is kept in the user's cache for other lambdas. Several "
        "processes share the images: see timm-nrpm tune --help.",
        "timm-nrpm evaluate --model resnet8_digits --lam 0.8 --eps 0.1 0.15 --samples 20 --effort fast",
    )
    options.add_model(parser, 0.8, plain=True)
    options.add_calibration(options.add_images(parser, 100, "test", 500))
    attack = parser.add_argument_group("attacks")
    options.add_threat(attack, several=True)
    attack.add_argument("--suite", default="adaptive", choices=SUITES, help="which attacks (default: adaptive)")
    effort = "how long the adaptive suite tries (default: default)"
    attack.add_argument("--effort", default="default", choices=EFFORTS, help=effort)
    attack.add_argument("--steps", type=int, metavar="N", help="steps of each ascent (default: the suite's)")
    queries = "queries of each random search (default: the suite's)"
    attack.add_argument("--queries", type=int, metavar="N", help=queries)
    attack.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the attacks (default: 0)")
    attack.add_argument("--no-control", action="store_true", help="do not attack the plain model beside it")
    options.add_output(parser, "folder of the reports", "evaluated")


def _evaluate(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.attacks.threats import Threat
    from timm_nrpm.cli import inputs
    from timm_nrpm.evaluation.evaluate import evaluate
    from timm_nrpm.evaluation.sharing import together
    from timm_nrpm.figures.report_folder import show

    threats = [Threat(args.norm, eps) for eps in args.eps] if args.eps else [Threat(args.norm)]
    inputs.make_folder(args.output)
    with inputs.processes() as (accelerator, device):
        main = accelerator is None or accelerator.is_main_process
        model = inputs.model_of(args).to(device)
        loader = inputs.chosen_images(args, model)
        inputs.calibrate(args, model, terminal)
        together(accelerator, lambda: _claim(args, model) if main else None)
        reports = []
        for threat in threats:
            stem = args.output / f"{args.suite}-{threat.norm}-{threat.eps:.6g}"
            report = evaluate(
                model,
                loader,
                threat,
                args.suite,
                effort=args.effort,
                steps=args.steps,
                queries=args.queries,
                seed=args.seed,
                data=inputs.described_images(args),
                control=not args.no_control,
                controls=_controls(),
                resume=f"{stem}.jsonl",
                accelerator=accelerator,
                progress=terminal.progress,
            )
            reports.append(report)
            if main:
                Path(f"{stem}.json").write_text(json.dumps(report.to_dict()) + "\n")
                terminal.show(str(report))
        if main:
            page = show(reports, model, loader, args.output, title=inputs.described_model(args, model))
            terminal.show(f"Written: {page}")
            terminal.give({"page": str(page), "reports": [report.to_dict() for report in reports]})


def _controls() -> Path | None:
    """The folder in the user's cache that keeps results of plain models, None where there can be none."""
    from timm_nrpm.nn.kernels.compiling import cache_folder

    with suppress(RuntimeError, OSError):  # no home directory, or one that cannot be written
        folder = cache_folder() / "controls"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None


def _claim(args: argparse.Namespace, model: nn.Module) -> None:
    """Write into the output folder what is evaluated there.

    Raises:
        ValueError: The folder holds results of another model or on other images.
    """
    from timm_nrpm.models.reprogramming import model_sha256

    path = args.output / SETTINGS
    now: dict[str, object] = {
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


def _compare(output: Path, then: dict[str, object], now: dict[str, object]) -> None:
    """Raise a ValueError if the settings of two evaluations are not those of one."""
    if all(then.get(name) == now[name] for name in (*SAME, "sha256")):
        return
    changed = [name for name in SHOWN if then.get(name) != now[name]]
    listed = [f"--{name.replace('_', '-')} {_typed(then.get(name))} then, {_typed(now[name])} now" for name in changed]
    raise ValueError(
        f"{output} holds an evaluation of something else ({'; '.join(listed) or 'the weights or statistics differ'}): "
        "give another folder as --output, or what it had."
    )


def _typed(value: object) -> str:
    """A value of a flag as one types it."""
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
