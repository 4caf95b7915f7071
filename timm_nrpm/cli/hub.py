"""`timm-nrpm push`, `pull`, `inspect` and `list`: what the Hub has to do with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from timm_nrpm.checks import printable

BAR = 20
"""Characters of a lambda of 1."""


def add_commands(commands: Any) -> None:
    """Add them to the subparsers of `timm-nrpm`."""
    push = commands.add_parser("push", help="publish a variant with its card")
    push.add_argument("folder", type=Path, help="that holds it, such as tuned/variant")
    push.add_argument("repo", help="owner/name on the Hub; made if it is not there, private")
    push.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[],
        help="JSON that `timm-nrpm evaluate` wrote of it (default: what is there of this very model)",
    )
    push.add_argument("--license", help="an identifier that the Hub knows (default: the base's)")
    push.add_argument("--dataset", nargs="+", default=[], help="on the Hub, that it was trained on")
    push.add_argument(
        "--public", action="store_true", help="let others see a new repository; refuse one that is private"
    )
    push.add_argument("--branch", help="commit to it, and make it if it is not there (default: main)")
    push.add_argument("--pull-request", action="store_true", help="open one, instead of committing")
    push.add_argument("--message", default="Publish a reprogrammed model", help="of the commit")
    push.add_argument("--dry-run", action="store_true", help="show the files and send nothing")
    push.set_defaults(run=_push)
    pull = commands.add_parser("pull", help="copy a variant from the Hub into a folder")
    pull.add_argument("repo", help="owner/name on the Hub")
    pull.add_argument(
        "folder", type=Path, nargs="?", help="made, or replaced if it holds a variant (default: its name)"
    )
    pull.set_defaults(run=_pull)
    look = commands.add_parser("inspect", help="show lambdas, base and flags of a variant, without its weights")
    look.add_argument("repo", help="owner/name on the Hub, or a folder")
    look.set_defaults(run=_inspect)
    for command in (pull, look):
        command.add_argument("--revision", help="a branch, tag, commit or refs/pr/1 (default: main)")
        command.add_argument("--offline", action="store_true", help="take what is in the cache, and ask nobody")
    listing = commands.add_parser("list", help="variants that somebody published")
    listing.add_argument("author", help="a user or an organization on the Hub")
    listing.set_defaults(run=_list)


def _push(args: argparse.Namespace) -> int:
    from timm_nrpm.evaluation.report import RobustnessReport
    from timm_nrpm.hub.publishing import push_to_hub

    reports = [_read(path, RobustnessReport) for path in args.report] or None
    options = {"license": args.license, "datasets": args.dataset, "private": False if args.public else None}
    options |= {"revision": args.branch, "pull_request": args.pull_request, "commit_message": args.message}
    print(push_to_hub(args.folder, args.repo, reports=reports, dry_run=args.dry_run, **options))
    return 0


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report that `timm-nrpm evaluate` wrote: {error!r}.") from error


def _pull(args: argparse.Namespace) -> int:
    from timm_nrpm.hub.browsing import pull

    folder = args.folder or Path(args.repo.rpartition("/")[2])
    pull(args.repo, folder, revision=args.revision, local_files_only=args.offline)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size:,} bytes. Load it by timm_nrpm.from_pretrained({str(folder)!r}).")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from timm_nrpm.hub.browsing import inspect

    about = inspect(args.repo, revision=args.revision, local_files_only=args.offline)
    console, base = Console(markup=False), about.base
    console.print(f"{about.name}{f' at {about.commit[:12]}' if about.commit else ''}", highlight=False)
    weights = "tuned weights" if base.tuned else "weights untouched"
    held = "in it" if about.is_full else "not in it"
    said = base.name or f"{base.architecture}, weights without a public name"
    console.print(
        f"base: {said}{f' at {base.revision[:12]}' if base.revision else ''}; {weights}, {held}", highlight=False
    )
    shown = ", ".join(
        f"{key} {value}" for key, value in about.settings.items() if key in ("iterations", "eps", "penalty")
    )
    console.print(f"estimate: {shown}", highlight=False)
    table = Table("layer", "lambda", "")
    for layer, lam in about.lams.items():
        table.add_row(Text(printable(layer)), f"{lam:.3f}", "█" * round(BAR * lam))
    console.print(table)
    for report in about.reports:
        low, high = (100 * share for share in report.interval())
        console.print(
            f"{report.threat}, {report.samples} images{f' ({printable(report.data)})' if report.data else ''}: clean "
            f"{100 * report.accuracy():.1f} %, worst case {100 * report.worst_case:.1f} % ({low:.1f} to {high:.1f})"
            + (f", at lambda 1 {100 * report.control.worst_case:.1f} %" if report.control else ""),
            highlight=False,
        )
    said = f"flags: {', '.join(about.flags) or 'none'}" if about.reports else about.note
    console.print(printable(said), highlight=False)
    return 0


def _list(args: argparse.Namespace) -> int:
    from timm_nrpm.hub.browsing import list_variants

    found = list_variants(args.author)
    if not found:
        print(f"{args.author} has published no variant that you may see.")
        return 0
    table = Table("repository", "base", "seen by", "changed")
    for listed in found:
        table.add_row(
            listed.repo_id, Text(printable(listed.base or "")), "some" if listed.private else "all", listed.modified
        )
    Console().print(table)
    return 0
