"""`timm-nrpm push`, `pull`, `inspect` and `list`: what the Hub has to do with."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab
from rich.table import Table
from rich.text import Text

from timm_nrpm.checks import printable
from timm_nrpm.cli import options
from timm_nrpm.cli.given import WrongCall
from timm_nrpm.cli.terminal import Terminal

if TYPE_CHECKING:
    from timm_nrpm.evaluation.report import RobustnessReport
    from timm_nrpm.hub.browsing import Description

BAR = 20
"""Characters of a lambda of 1."""

NAMES = {
    "local_files_only": "--offline",
    "datasets": "--dataset",
    "reports": "--report",
    "tags": "--tag",
    "allow_removal": "--yes",
    "commit_message": "--message",
    "repo_id": "--variant",
    "folder": "--output",
}


def add_push(commands: Any) -> None:
    """Add `timm-nrpm push`."""
    push = options.add_command(
        commands,
        "push",
        options.Command(_push, names={**NAMES, "repo_id": "REPO"}),
        "publish a variant with its card",
        "Publish a variant on the Hub with a card that is written from its reports, in one commit. The repository is "
        "made, private, if it is not there.",
        "timm-nrpm push --variant variant me/resnet8-nrpm --dry-run",
    )
    variant = "the folder of the variant, such as tuned/variant"
    push.add_argument("--variant", type=Path, required=True, metavar="FOLDER", help=variant).complete = shtab.DIRECTORY
    push.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    reports = "JSON that timm-nrpm evaluate wrote of it (default: what is there of this very model)"
    push.add_argument("--report", type=Path, nargs="+", default=[], metavar="FILE", help=reports).complete = shtab.FILE
    push.add_argument("--license", metavar="ID", help="an identifier that the Hub knows (default: the base's)")
    dataset = "datasets on the Hub that it was trained on"
    push.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help=dataset)
    push.add_argument("--tag", nargs="+", default=[], metavar="NAME", help="tags of the card, beside those it has")
    collection = "add the repository to a collection: its slug, or a title, of which one is made if there is none"
    push.add_argument("--collection", metavar="TITLE", help=collection)
    seen = "who may read the repository, also if it is there already (default: what it is; a new one is private)"
    push.add_argument("--visibility", choices=("public", "private"), help=seen)
    push.add_argument("--revision", help="branch to commit to, made if it is not there (default: main)")
    push.add_argument("--pull-request", action="store_true", help="open a pull request instead of committing")
    message = "first line of the commit"
    push.add_argument("--message", default="Publish a reprogrammed model", metavar="TEXT", help=message)
    push.add_argument("--yes", action="store_true", help="let go what the push would take away, without asking")
    push.add_argument("--dry-run", action="store_true", help="show the files and send nothing")
    options.add_output(push)


def add_pull(commands: Any) -> None:
    """Add `timm-nrpm pull`."""
    pull = options.add_command(
        commands,
        "pull",
        options.Command(_pull, names=NAMES),
        "copy a variant from the Hub into a folder",
        "Copy a variant and its card from the Hub into a folder: all of it, of one commit, or nothing.",
        "timm-nrpm pull --variant me/resnet8-nrpm --output copy",
    )
    pull.add_argument("--variant", required=True, metavar="REPO", help="owner/name on the Hub")
    options.add_hub(pull)
    output = "folder, made, or replaced if it holds a variant (default: the repository's name)"
    options.add_output(pull, output)


def add_inspect(commands: Any) -> None:
    """Add `timm-nrpm inspect`."""
    look = options.add_command(
        commands,
        "inspect",
        options.Command(_inspect, names=NAMES),
        "show lambdas, base and flags of a variant, without its weights",
        "Show what a variant holds and what it was found to be worth, without its weights or those of its base.",
        "timm-nrpm inspect --variant variant",
    )
    variant = "a folder, or owner/name on the Hub"
    look.add_argument("--variant", required=True, metavar="VARIANT", help=variant).complete = shtab.DIRECTORY
    options.add_hub(look)
    options.add_output(look)


def add_list(commands: Any) -> None:
    """Add `timm-nrpm list`."""
    listing = options.add_command(
        commands,
        "list",
        options.Command(_list, names=NAMES),
        "list the variants that somebody published",
        "List the variants that a user or an organization has published on the Hub, as far as you may see them.",
        "timm-nrpm list me",
    )
    listing.add_argument("author", metavar="AUTHOR", help="a user or an organization on the Hub")
    options.add_output(listing)


def _push(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.hub.publishing import push_to_hub

    def agree(lost: tuple[str, ...]) -> bool:
        if args.yes or not terminal.can_ask:
            return bool(args.yes)
        if not terminal.ask(f"{args.repo} would lose:", lost, "Push all the same?"):
            raise WrongCall(f"nothing was sent to {args.repo}.")
        return True

    published = push_to_hub(
        args.variant,
        args.repo,
        reports=[_read(path) for path in args.report] or None,
        license=args.license,
        datasets=args.dataset,
        tags=args.tag,
        collection=args.collection,
        visibility=args.visibility,
        revision=args.revision,
        pull_request=args.pull_request,
        commit_message=args.message,
        allow_removal=agree,
        dry_run=args.dry_run,
    )
    terminal.show(str(published))
    terminal.give(asdict(published))


def _read(path: Path) -> RobustnessReport:
    from timm_nrpm.evaluation.report import RobustnessReport

    try:
        return RobustnessReport.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report that timm-nrpm evaluate wrote: {error!r}.") from error


def _pull(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.hub.browsing import pull

    folder = args.output or Path(args.variant.rpartition("/")[2])
    pull(args.variant, folder, revision=args.revision, local_files_only=args.offline)
    size = sum(file.stat().st_size for file in folder.iterdir())
    terminal.show(f"{folder}: {size:,} bytes. Evaluate it by timm-nrpm evaluate --variant {folder}")
    terminal.give({"variant": str(folder), "bytes": size})


def _inspect(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.hub.browsing import inspect

    about = inspect(args.variant, revision=args.revision, local_files_only=args.offline)
    _show(about, terminal)
    terminal.give({**asdict(about), "flags": about.flags, "reports": [report.to_dict() for report in about.reports]})


def _show(about: Description, terminal: Terminal) -> None:
    """A description as text."""
    base = about.base
    terminal.show(f"{about.name}{f' at {about.commit[:12]}' if about.commit else ''}")
    weights = "tuned weights" if base.tuned else "weights untouched"
    held = "in it" if about.is_full else "not in it"
    name = base.name or f"{base.architecture}, weights without a public name"
    revision = f" at {base.revision[:12]}" if base.revision else ""
    terminal.show(f"base: {name}{revision}; {weights}, {held}")
    estimate = about.estimator
    units = " in standard units" if about.standardize else ""
    terminal.show(f"estimate: iterations {estimate.iterations}, eps {estimate.eps}{units}, penalty {estimate.penalty}")
    if about.statistics:
        terminal.show(f"statistics: {', then '.join(map(str, about.statistics))}")
    table = Table("layer", "lambda", "")
    for layer, lam in about.lams.items():
        table.add_row(Text(printable(layer)), f"{lam:.3f}", "█" * round(BAR * lam))
    terminal.show(table)
    for report in about.reports:
        low, high = (100 * share for share in report.interval())
        data = f" ({printable(report.data)})" if report.data else ""
        control = f", at lambda 1 {100 * report.control.worst_case:.1f} %" if report.control else ""
        terminal.show(
            f"{report.threat}, {report.samples} images{data}: clean {100 * report.accuracy():.1f} %, "
            f"worst case {100 * report.worst_case:.1f} % ({low:.1f} to {high:.1f}){control}"
        )
    terminal.show(printable(f"flags: {', '.join(about.flags) or 'none'}" if about.reports else about.note))


def _list(args: argparse.Namespace, terminal: Terminal) -> None:
    from timm_nrpm.hub.browsing import list_variants

    variants = list_variants(args.author)
    if not variants:
        terminal.show(f"{args.author} has published no variant that you may see.")
    else:
        table = Table("repository", "base", "visibility", "changed")
        for one in variants:
            visibility = "private" if one.private else "public"
            table.add_row(one.repo_id, Text(printable(one.base or "not public")), visibility, one.modified)
        terminal.show(table)
    terminal.give({"variants": [asdict(one) for one in variants]})
