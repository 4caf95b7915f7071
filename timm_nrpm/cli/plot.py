"""`timm-nrpm plot`: a picture of any result that was written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab

from timm_nrpm.cli import options
from timm_nrpm.cli.given import Useless
from timm_nrpm.cli.terminal import Terminal

if TYPE_CHECKING:
    from timm_nrpm.figures.plot import Result

USELESS = (
    Useless(
        ("revision", "offline"),
        lambda args: args.variant is None,
        "nothing is read from the Hub by its name. Give --variant with it.",
    ),
    Useless(
        ("variant",),
        lambda args: bool(args.results),
        "a picture is of files, or of a variant's lambdas. Leave one of them out.",
    ),
)


def add_plot(commands: Any) -> None:
    """Add `timm-nrpm plot`."""
    parser = options.add_command(
        commands,
        "plot",
        options.Command(_plot, USELESS, options.NAMES),
        "draw results, or the lambdas of a variant",
        "Draw what a command wrote: the JSON of evaluate, where several are accuracy over eps; of certify, one or "
        "several; of corrupt; of search; of tune; of subnetwork, one or several; or the lambdas of a variant.",
        "timm-nrpm plot evaluated/adaptive-Linf-0.1.json evaluated/adaptive-Linf-0.15.json --output curves.png",
    )
    results = "JSON files that commands wrote"
    parser.add_argument("results", nargs="*", type=Path, metavar="FILE", help=results).complete = shtab.FILE
    options.add_variant(parser)
    options.add_output(parser, "the picture, a .png or .svg", "plot.png")


def _plot(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.figures.plot import plot
    from timm_nrpm.hub.browsing import inspect

    if args.variant is not None:
        about = inspect(args.variant, revision=args.revision, local_files_only=args.offline)
        picture = plot(dict(about.lams), args.output)
    elif args.results:
        results: list[Any] = [result_in(path) for path in args.results]
        picture = plot(results[0] if len(results) == 1 else results, args.output)
    else:
        raise ValueError("there is nothing to draw: give the JSON files of results, or a variant as --variant.")
    terminal.show(str(picture))
    terminal.give({"picture": str(picture)})


def result_in(path: Path) -> Result:
    """The result in a JSON file.

    Raises:
        ValueError: The file holds no result of this package.
    """
    from timm_nrpm.evaluation.certificates import CertificationReport
    from timm_nrpm.evaluation.corruption_report import CorruptionReport
    from timm_nrpm.evaluation.history import History
    from timm_nrpm.evaluation.layer_worth import LayerRecommendation
    from timm_nrpm.evaluation.pareto import ParetoFront
    from timm_nrpm.evaluation.report import RobustnessReport
    from timm_nrpm.evaluation.subnetwork_report import SubnetworkReport
    from timm_nrpm.evaluation.trials import Advice

    kinds: Mapping[str, Callable[[str], Result]] = {
        "attacks": RobustnessReport.from_json,
        "sigma": CertificationReport.from_json,
        "untried": Advice.from_json,
        "early": SubnetworkReport.from_json,
        "worth": LayerRecommendation.from_json,
        "trials": ParetoFront.from_json,
        "evaluations": History.from_json,
        "corruption_errors": CorruptionReport.from_json,
    }
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        return next(read for key, read in kinds.items() if key in content)(text)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{path} holds no result that can be drawn: give a JSON file that advise, evaluate, certify, corrupt, "
            "search, tune or subnetwork wrote."
        ) from error
