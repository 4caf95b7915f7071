"""The page and the picture of the atlas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle

from timm_nrpm.evaluation.report import SIGNIFICANT
from timm_nrpm.figures import canvas

Row = dict[str, Any]

CLEAN_LOSS = 2.0
"""Bound of all cells on the loss of clean accuracy, in points."""

NOTHING, DEAR = (0.95, 0.95, 0.95), (0.99, 0.93, 0.82)

ORDER = (
    "Linf", "L2", "L1", "L0", "patch", "salt_and_pepper", "missing_pixels", "white_noise", "gaussian_noise",
    "motion_blur", "frost", "fog", "contrast", "jpeg_compression", "another source",
)  # fmt: skip
"""The threats, as they stand in the picture."""

SHORT = {
    "adaptation": "adapted", "tuning a few layers": "few tuned", "tuning all": "all tuned", "one lambda": "lambda",
    "standard units": "std units",
    "the estimate": "estimate", "a lambda for each layer": "lambdas", "tuning lambda": "lambda tuned",
}  # fmt: skip


def markdown(rows: Sequence[Row], how: str) -> str:
    """The atlas in words: what helps, then all cells, then what was tried."""
    helping = sorted((row for row in rows if helps(row)), key=lambda row: -row["gain"])
    trials = sum(len(row["trials"]) - 1 for row in rows)
    lines = [
        "# The atlas: what is worth doing to a pretrained model", "",
        f"`scripts/atlas.py`: {len(rows)} questions, {trials} trials beside the models as they are. Each question is a "
        f"run of `advise`: {how}. Gains are in points of accuracy under the threat, over the model as it is, on images "
        "that nothing was chosen on, with 95 % intervals; a cell has none where no gain can be told from chance, or "
        "where it costs more than two points of clean accuracy, or no more than its control. "
        "Attacks are the adaptive suite with the least effort, "
        "corruptions of severity 5.",
        "", "![the atlas](../docs/atlas.png)", "", "## What is advised", "",
        f"{len(helping)} of {len(rows)} cells.", "",
        "| model | threat | as it is | gain | by | clean lost | latency |", "|---|---|---|---|---|---|---|",
        *(f"| {row['base']} | {row['said']} | {row['kept']} % | {_gain(row)} | {row['by']} | {row['clean lost']:+.1f} "
          f"| {row['slowdown']:.1f}x |" for row in helping),
        "", "## Where nothing is advised", "",
        "| model | threat | as it is | best on the images chosen on | there | on those judged on | p | clean lost |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if not helps(row):
            best = _best(row)
            kept = f"| {row['base']} | {row['said']} | {_number(row['kept'])} % "
            without = "nothing gained there" if tried(row) else "there was no time to try anything"
            lines.append(kept + (f"| {_tried(best)} |" if best else f"| {without} | | | | |"))
    lines += ["", "## By strategy", "", "| strategy | trials | within the bounds | advised |", "|---|---|---|---|"]
    for strategy in dict.fromkeys(each["strategy"] for row in rows for each in row["trials"][1:]):
        ours = [each for row in rows for each in row["trials"] if each["strategy"] == strategy]
        advised = sum(helps(row) and row["by"].startswith(f"{strategy}, ") for row in rows)
        lines.append(f"| {strategy} | {len(ours)} | {sum(not each['rejected'] for each in ours)} | {advised} |")
    return "\n".join([*lines, "", _tuned_alike(rows), ""])


def _tuned_alike(rows: Sequence[Row]) -> str:
    """What the estimate adds to tuning: reprogrammed models beside plain ones that were tuned alike."""
    ended, apart = 0, []
    for row in rows:
        trials = {each["setting"]: each for each in row["trials"]}
        for setting, trial in trials.items():
            words, _, kind = setting.rpartition(", ")
            plain = trials.get(f"{words}, plain")
            if kind == "plain" or plain is None:
                continue
            if trial["rejected"] or plain["rejected"]:
                ended += bool(trial["rejected"])
            else:
                apart.append(trial["chosen on"] - plain["chosen on"])
    if not ended and not apart:
        return "No reprogrammed model was tuned beside the plain one."
    between = f", and kept {min(apart):+.1f} to {max(apart):+.1f} points more in {len(apart)}" if apart else ""
    return (
        f"A reprogrammed model was tuned beside the plain one, at the same attacks and epochs, {ended + len(apart)} "
        f"times: it was ended by the bounds or by quick attacks in {ended}{between}, on the images that are chosen on."
    )


def helps(row: Row) -> bool:
    """Whether something is advised in a cell."""
    return row["by"] != "nothing, as it is"


def tried(row: Row) -> bool:
    """Whether anything was tried in a cell."""
    return len(row["trials"]) > 1


def _best(row: Row) -> Row | None:
    """The trial that was best on the images chosen on, if one gained there."""
    gaining = [each for each in row["trials"][1:] if (each["chosen on"] or 0) > 0]
    judged = [each for each in gaining if each["gain"] is not None]
    return max(judged or gaining, key=lambda each: each["chosen on"], default=None)


def _tried(trial: Row) -> str:
    """The cells of a trial that is not advised."""
    gain = "not judged" if trial["gain"] is None else f"{trial['gain']:+.1f}"
    p = "" if trial["p"] is None else f"{trial['p']:.2g}"
    return f"{trial['by']} | {trial['chosen on']:+.1f} | {gain} | {p} | {trial['clean lost']:+.1f}"


def _gain(row: Row) -> str:
    low, high = row["interval"]
    return f"**{row['gain']:+.1f}** ({low:+.1f} to {high:+.1f})"


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def picture(rows: Sequence[Row], path: Path) -> None:
    """Draw models against threats: the gain as a colour, and what gave it."""
    bases = list(dict.fromkeys(row["base"] for row in rows))
    threats = sorted({row["threat"] for row in rows}, key=ORDER.index)
    known = {(row["base"], row["threat"]): row for row in rows}
    figure = canvas.figure(2.6 + 0.92 * len(threats), 1.6 + 0.72 * len(bases))
    axes = figure.subplots()
    most = max([row["gain"] for row in rows if helps(row)], default=1.0)
    for y, base in enumerate(bases):
        for x, threat in enumerate(threats):
            row = known.get((base, threat))
            if row is None:
                continue
            best = _best(row)
            colour, ink, top, middle = NOTHING, "#888888", "0" if tried(row) else "?", ""
            if helps(row):
                share = (row["gain"] / most) ** 0.5
                colour = (1 - 0.87 * share, 1 - 0.45 * share, 1 - 0.62 * share)
                ink = "white" if share > 0.75 else "#222222"
                what = row["by"].split(", ")[0]
                adapted = "adapted, " if row["by"].endswith(", adapted") else ""
                top, middle = f"{row['gain']:+.0f}", f"{adapted}{SHORT.get(what, what)}"
            elif best is not None and (best["gain"] or 0) > 0 and best["p"] <= SIGNIFICANT:
                # A gain beyond chance that is not advised costs too much, or its control has as much.
                dear = best["clean lost"] > CLEAN_LOSS
                colour, ink = DEAR, "#444444"
                top = f"({best['gain']:+.0f})"
                middle = f"clean {-best['clean lost']:+.1f}" if dear else "as its control"
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour))
            axes.text(x, y - 0.17, top, ha="center", va="center", fontsize=11, color=ink, weight="bold")
            axes.text(x, y + 0.12, middle, ha="center", va="center", fontsize=7, color=ink)
            axes.text(x, y + 0.34, f"of {_number(row['kept'])} %", ha="center", va="center", fontsize=6, color=ink)
    axes.set_xlim(-0.55, len(threats) - 0.45)
    axes.set_ylim(len(bases) - 0.45, -0.55)
    axes.set_xticks(range(len(threats)), [each.replace("_", "\n") for each in threats], fontsize=8)
    axes.set_yticks(range(len(bases)), [each.replace(", ", "\n") for each in bases], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    title = (
        "Points gained under the threat, and what gave them; 0 where nothing can be told from chance, ? where nothing "
        f"was tried;\nin brackets what costs more than {CLEAN_LOSS:g} points of clean accuracy, or is no more than its "
        "control"
    )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
