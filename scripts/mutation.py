"""Mutation testing: would the tests notice if the code that everything rests on were wrong?

    python scripts/mutation.py                               # hours; killed, it goes on where it was
    python scripts/mutation.py --subjects flags --sample 150
    python scripts/mutation.py --subjects flags --again      # those that survived, after tests were added
    python scripts/mutation.py --page                        # only writes results/ from what is there

mutmut changes one thing at a time (a number, an operator, an argument, a text) and runs the tests that reach the
changed function; a change that no test notices has survived. Each subject has a copy of the tracked files in
build/mutation, where mutmut keeps what it found: functions whose source changed are tested anew. Tests that compile are
left out, since Dynamo does not trace the calls that count, and so are those in processes of their own, which mutmut
does not see: a folder that a stranger made up, say.

Writes results/mutation.json, with every survivor, and results/mutation.md. The `why` of a survivor in the JSON is
written by hand, and kept as long as the change is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm_nrpm.evaluation.intervals import exact

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutation"
RESULT = ROOT / "results" / "mutation.json"
KILLED = ("killed", "timeout", "segfault")
PENDING = ("not checked", "check was interrupted by user")


class Subject(NamedTuple):
    """What is changed, and the tests that should notice: files and folders, and what pytest's -k takes."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    chosen: str = ""


SUBJECTS = {
    "estimator": Subject(
        ("nn/estimator", "nn/functional", "nn/fitted"),
        ("tests/nn",),
        "not graph and not inductor and not compiled and not exported_for",
    ),
    "layers": Subject(
        ("nn/reprogrammed", "nn/layers", "nn/convolutions"),
        ("tests/nn",),
        "not graph and not inductor and not compiled and not exported_for",
    ),
    "format": Subject(
        ("models/format", "models/loading", "models/loadable", "models/saving"),
        tuple(f"tests/models/test_{name}.py" for name in ("format", "variants", "loadable", "loading", "saved_before")),
        "not killed",
    ),
    "judge": Subject(
        ("evaluation/judge", "evaluation/intervals"),
        tuple(f"tests/evaluation/test_{name}.py" for name in ("judge", "intervals", "evaluate")),
    ),
    "flags": Subject(("attacks/flags",), ("tests/attacks/test_flags.py", "tests/evaluation/test_evaluate.py")),
    "certification": Subject(
        ("evaluation/certification", "evaluation/certificates"),
        ("tests/evaluation/test_certification.py", "tests/evaluation/test_halves.py"),
    ),
}


def prepare(name: str) -> Path:
    """Bring the tracked files of the checkout into the subject's folder, with mutmut's settings for it."""
    folder, subject = BUILD / name, SUBJECTS[name]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = [path for path in listed.split("\0") if path and (ROOT / path).exists()]
    for path in paths:
        target = folder / path
        content = (ROOT / path).read_bytes()
        if not target.exists() or target.read_bytes() != content:  # mutmut looks at what changed
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    beside = sorted({path.split("/")[0] for path in paths} - {"timm_nrpm", "tests", "pyproject.toml"})
    settings = {
        "source_paths": ["timm_nrpm"],
        "only_mutate": [f"timm_nrpm/{module}.py" for module in subject.modules],
        "also_copy": beside,
        "pytest_add_cli_args": ["-n0", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": [*subject.tests, *(("-k", subject.chosen) if subject.chosen else ())],
        "process_isolation": "forkserver",
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]  # TOML writes these as JSON does
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "\n".join(lines) + "\n")
    # mutmut copies the tests once; what they are now is what has to notice.
    shutil.rmtree(folder / "mutants" / "tests", ignore_errors=True)
    return folder


def run(name: str, children: int, sample: int | None, again: bool) -> None:
    """Test a subject's mutants: all that no test has met, a random sample of all, or those that survived."""
    folder = prepare(name)
    mutmut, environment = [sys.executable, "-m", "mutmut"], {**os.environ, "OMP_NUM_THREADS": "1"}
    chosen: list[str] = []
    if sample is not None or again:
        # Asked for a mutant that is not there, it makes them all and stops, with an exit status of its own.
        subprocess.run([*mutmut, "run", "nothing"], cwd=folder, env=environment, check=False, stderr=subprocess.DEVNULL)
        outcomes = dict(outcomes_of(name))
        if again:
            chosen = [key for key, outcome in outcomes.items() if outcome not in (*KILLED, *PENDING)]
        else:
            picked = random.Random(0).sample(sorted(outcomes), min(sample or 0, len(outcomes)))
            chosen = [key for key in picked if outcomes[key] in PENDING]
        if not chosen:
            return
    subprocess.run([*mutmut, "run", "--max-children", str(children), *chosen], cwd=folder, env=environment, check=True)


def outcomes_of(name: str) -> Iterator[tuple[str, str]]:
    """Each mutant of a subject, and what became of it in mutmut's words."""
    from mutmut.stats import status_by_exit_code

    for module in SUBJECTS[name].modules:
        meta = json.loads((BUILD / name / "mutants" / "timm_nrpm" / f"{module}.py.meta").read_text())
        for key, code in meta["exit_code_by_key"].items():
            yield key, status_by_exit_code[code]


def found_in(name: str) -> Iterator[dict[str, Any]]:
    """A row for each mutant of a subject: its file, function and outcome, and the lines of those that survived."""
    os.chdir(BUILD / name)  # mutmut reads from the current folder
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    for key, outcome in outcomes_of(name):
        path = f"{key.partition('.x')[0].replace('.', '/')}.py"
        function, of = orig_function_and_class_names_from_key(key)
        row = {"file": path.removeprefix("timm_nrpm/"), "function": f"{of}.{function}" if of else function}
        row["outcome"] = outcome
        if outcome not in (*KILLED, *PENDING):
            changed = get_diff_for_mutant(key, path=path).splitlines()[3:]
            row["before"], row["after"] = (
                " ".join(line[1:].strip() for line in changed if line[0] == sign) for sign in "-+"
            )
        yield row


def collected(names: Sequence[str]) -> dict[str, Any]:
    """What is known of all subjects, with the reasons that were written before."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in names:
        if not list((BUILD / name).glob("mutants/timm_nrpm/*/*.meta")):
            continue
        why = {
            (row["function"], row["before"], row["after"]): row["why"]
            for row in result.get(name, {}).get("survivors", [])
        }
        rows = list(found_in(name))
        files: dict[str, Counter[str]] = {}
        for row in rows:
            outcome = "killed" if row["outcome"] in KILLED else "pending" if row["outcome"] in PENDING else "survived"
            files.setdefault(row["file"], Counter())[outcome] += 1
        survivors = [
            {**row, "why": why.get((row["function"], row["before"], row["after"]), "")}
            for row in rows
            if "before" in row
        ]
        result[name] = {"files": files, "survivors": survivors}
    return {name: result[name] for name in SUBJECTS if name in result}


def page(result: dict[str, Any]) -> str:
    """The Markdown of what was found."""
    lines = [
        "# Mutation testing", "",
        "Of all changes that mutmut makes to the code, one at a time, the share that a test notices "
        "(`scripts/mutation.py`). Texts of messages, annotations and defaults count like everything else. Where not "
        "all were run, they are a random sample, and the score has its 95 % interval.", "",
        "| subject | file | mutants | killed | survived | not run | score |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, subject in result.items():
        total: Counter[str] = Counter()
        for file, counts in subject["files"].items():
            lines.append(_row(name, f"`{file}`", counts))
            total.update(counts)
        lines.append(_row(f"**{name}**", "all", total))
    for name, subject in result.items():
        reasons = Counter(row["why"] or "not read yet" for row in subject["survivors"])
        lines += ["", f"## Survivors: {name}", "", "| number | why no test notices |", "|---|---|"]
        lines += [f"| {number} | {why} |" for why, number in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _row(name: str, file: str, counts: Counter[str] | dict[str, int]) -> str:
    killed, survived, pending = (counts.get(key, 0) for key in ("killed", "survived", "pending"))
    score = ""
    if killed + survived:
        low, high = (100 * share for share in exact(killed, killed + survived))
        score = f"{100 * killed / (killed + survived):.1f} %" + (f" ({low:.0f} to {high:.0f})" if pending else "")
    return f"| {name} | {file} | {killed + survived + pending} | {killed} | {survived} | {pending} | {score} |"


def main() -> None:
    """Read the arguments, run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="default: all")
    parser.add_argument("--children", type=int, default=2, help="mutants at a time (default: 2)")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--sample", type=int, help="so many of each subject, at random, instead of all")
    some.add_argument("--again", action="store_true", help="those that survived")
    parser.add_argument("--page", action="store_true", help="run nothing, write the results of earlier runs")
    args = parser.parse_args()
    for name in () if args.page else args.subjects:
        run(name, args.children, args.sample, args.again)
    result = collected(args.subjects)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
