"""Verdicts on our numbers beside the paper's, cell by cell, and the page that shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POINTS, ENOUGH = 2.0, 500
"""Largest distance of a reproduced accuracy from the paper's, in points, and the fewest images that can show it."""

STEPS = (0.5, 1.0, 1.5, 2.0)
KINDS = ("reproduced", "not reproduced", "undecided", "not run")

Result = Mapping[str, Any]


def verdict(ours: float | None, paper: float | None, unit: str = "%", images: int | None = None) -> str:
    """Return one of KINDS, or an empty text where the paper has no number.

    Accuracies may be POINTS apart, other numbers a tenth of the paper's. On fewer than ENOUGH images an accuracy is not
    reproduced if it is more than two standard deviations away, and otherwise undecided.
    """
    if paper is None:
        return ""
    if ours is None:
        return "not run"
    gap = abs(ours - paper) - 1e-9
    if unit != "%":
        return "reproduced" if gap <= abs(paper) / 10 else "not reproduced"
    if images is None or images >= ENOUGH:
        return "reproduced" if gap <= POINTS else "not reproduced"
    share = min(max(paper / 100, 1 / images), 1 - 1 / images)
    spread = 100 * (share * (1 - share) / images) ** 0.5
    return "not reproduced" if gap > max(POINTS, 2 * spread) else "undecided"


def verdicts_of(result: Result, row: Mapping[str, Any]) -> list[str]:
    """Return the verdict of every cell of a row."""
    paper = row["paper"] or [None] * len(result["columns"])
    ours = row.get("ours") or [None] * len(paper)
    return [verdict(o, p, result["unit"], row.get("images")) for o, p in zip(ours, paper, strict=True)]


def verdicts(result: Result) -> dict[str, int]:
    """Return the number of cells with each verdict."""
    cells = [cell for row in result["rows"].values() for cell in verdicts_of(result, row)]
    return {kind: cells.count(kind) for kind in KINDS}


def within(result: Result) -> float | None:
    """Return the smallest of STEPS, in points, that all reproduced accuracies keep; None if there is none."""
    gaps = [
        abs(ours - paper)
        for row in result["rows"].values()
        if row["paper"] and "ours" in row
        for ours, paper, kind in zip(row["ours"], row["paper"], verdicts_of(result, row), strict=True)
        if kind == "reproduced"
    ]
    return next((step for step in STEPS if gaps and max(gaps) <= step + 1e-9), None) if result["unit"] == "%" else None


def summary(result: Result) -> str:
    """Describe the verdicts of all cells in a line."""
    counts, close = verdicts(result), within(result)
    parts = []
    if counts["reproduced"]:
        how = f"within {close:g} points" if close else "within a tenth"
        parts.append(f"{counts['reproduced']} reproduced {how}")
    if counts["not reproduced"]:
        parts.append(f"**{counts['not reproduced']} not reproduced**")
    if counts["undecided"]:
        parts.append(f"{counts['undecided']} undecided on so few images")
    if counts["not run"]:
        parts.append(f"{counts['not run']} not run")
    return ", ".join(parts) or "no numbers in the paper's text"


def section(result: Result) -> str:
    """Return an experiment's section in Markdown."""
    lines = [f"## {heading(result)}", ""]
    if result["about"]:
        lines += [result["about"], ""]
    lines += [f"Mode {result['mode']}. {summary(result)}."]
    if result.get("draws"):
        picture = (
            f"![{result['title']}]({result['picture']})" if "picture" in result else "No picture: nothing was run."
        )
        return "\n".join([*lines, "", f"The numbers are those of {result['draws'].replace('-', ' ')}.", "", picture])
    columns = [str(column) for column in result["columns"]]
    lines += ["", "| | | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    reasons: dict[str, list[str]] = {}
    for name, row in result["rows"].items():
        paper = row["paper"] or [None] * len(columns)
        if "not run" in row:
            reasons.setdefault(f"Not run: {row['not run']}", []).append(name)
            if row["paper"]:
                lines.append(_line(name, "the paper's", [_number(p) for p in paper]))
            lines.append(_line("" if row["paper"] else name, "not run", [""] * len(columns)))
            continue
        kinds = verdicts_of(result, row)
        marks = {"reproduced": " ✓", "not reproduced": " ✗", "undecided": " ?", "": ""}
        cells = [f"{_number(o)}{marks[kind]}" for o, kind in zip(row["ours"], kinds, strict=True)]
        if row["paper"]:
            lines.append(_line(name, "the paper's", [_number(p) for p in paper]))
        lines.append(_line("" if row["paper"] else name, "ours", cells))
        if row.get("worst case"):
            lines.append(
                _line("", "worst case", [f"**{_number(w)}**" if w is not None else "" for w in row["worst case"]])
            )
        if "not reproduced" in kinds:
            reasons.setdefault(f"Not reproduced: {row['why'] or unexplained(result)}", []).append(name)
    lams = {name: row["lambda"] for name, row in result["rows"].items() if len(set(row.get("lambda") or [])) > 1}
    if lams:
        lines += ["", "Lambda, layer by layer:", ""]
        lines += [f"- {name}: {', '.join(f'{lam:.3f}' for lam in values)}" for name, values in lams.items()]
    if reasons:
        lines += ["", "Why:", ""] + [f"- {reason} ({_listed(names)})" for reason, names in reasons.items()]
    if result["claims"]:
        lines += ["", "| what the paper says | under its attack | in the worst case |", "|---|---|---|"]
        lines += [f"| {c['text']} | {_answer(c['ours'])} | {_answer(c['worst case'])} |" for c in result["claims"]]
    if "picture" in result:
        lines += ["", f"![{result['title']}]({result['picture']})"]
    return "\n".join(lines)


def heading(result: Result) -> str:
    """Return the heading of an experiment's section, such as "Table 4: three paradigms"."""
    kind, _, number = result["experiment"].partition("-")
    return f"{kind.capitalize()} {number}".strip() + f": {result['title']}"


def unexplained(result: Result) -> str:
    """Return why a number may differ if the row gives no reason."""
    return {
        "quick": "measured and trained on a part of what the paper used (quick mode)",
        "full": "other optimizers, schedules and augmentation than the authors'",
    }[result["mode"]]


def page(results: Sequence[Result], missing: Sequence[str]) -> str:
    """Return the text of results/README.md: an overview of the experiments, then a section for each."""
    lines = [
        "# The paper's tables and figures, and what became of them",
        "",
        "Robustness Reprogramming for Representation Learning (arXiv 2410.04577), measured by `scripts/reproduce/`; "
        "this page is written by `python scripts/reproduce/all.py --render` from the JSON files beside it.",
        "",
        f"A cell is reproduced (✓) if it is at most {POINTS:g} points from the paper's, or, where it is no accuracy, "
        f"at most a tenth of the paper's number; on fewer than {ENOUGH} images it can only fail (✗), by more than two "
        "standard deviations, or stay undecided (?). *Ours* is the paper's protocol: its attack on the model's own "
        "gradient. *Worst case* is, image by image, over every attack of the adaptive suite; on fewer images than the "
        "line above it, as each section says, so that it may even be larger. A claim is judged under both, and in the "
        "worst case a few images may decide it; the paper's two models have that of 500 and 1000 images in "
        "[worst-case.md](worst-case.md). The worst cases on this page were measured before that suite became a pursuit "
        "with evolutions, and would be lower now.",
        "",
        "| | what | cells | claims, under the paper's attack | claims, in the worst case | mode |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        kind = heading(result).split(":")[0]
        anchor = _anchor(heading(result))
        own, worst = (_tally([claim[kind] for claim in result["claims"]]) for kind in ("ours", "worst case"))
        cells = (f"[{kind}](#{anchor})", result["title"], summary(result), own, worst, result["mode"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {name} | | not run: no result is here | | | |" for name in missing]
    lines += ["| Figures 1 and 2 | drawings of the method | nothing to measure | | | |"]
    if results:
        versions = ", ".join(f"{k} {v}" for k, v in results[0]["versions"].items())
        h = results[0]["hardware"]
        lines += ["", f"Most were measured on {h['gpu'] or str(h['cores']) + ' CPU cores'} with {versions}; "
                      "each JSON file names its own."]  # fmt: skip
    return "\n\n".join(["\n".join(lines), *(section(result) for result in results)]) + "\n"


def read(folder: Path, keys: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Read the results in a folder, in order; return them and the names of those that are missing."""
    present = [key for key in keys if (folder / f"{key}.json").exists()]
    return [json.loads((folder / f"{key}.json").read_text()) for key in present], [k for k in keys if k not in present]


def _anchor(text: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return "".join(c for c in text.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _line(*cells: Any) -> str:
    *first, numbers = cells
    return "| " + " | ".join([*first, *numbers]) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if 0 < abs(value) < 0.005:
        return f"{value:.0e}"
    return f"{value:.1f}" if abs(value) >= 10 or value == round(value, 1) else f"{value:.2f}"


def _answer(holds: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[holds]


def _tally(claims: Sequence[bool | None]) -> str:
    judged = [holds for holds in claims if holds is not None]
    return f"{sum(judged)} of {len(judged)} hold" if judged else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
