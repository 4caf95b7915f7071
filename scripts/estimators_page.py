"""The page of `scripts/estimators.py`."""

from __future__ import annotations

from typing import Any

from timm_nrpm.evaluation.trials import Effect

SELECTION, BEST, CLEAN_LOSS = 120, 12, 1.0
"""Number of images on which candidates are chosen, largest number of those that are judged, and how many points of
clean accuracy they may lose there."""

SEARCH = "search of pixels"
"""Name of the second attack."""


def markdown(rows: list[dict[str, Any]], best: list[dict[str, Any]]) -> str:
    """The tables."""
    seeming = sum(row["apparent"] > 0 for row in rows)
    lams = sorted({row["candidate"].lam for row in rows}, reverse=True)
    much = sum(row["apparent"] > 3 and row["lost"] <= CLEAN_LOSS for row in rows)
    lines = [
        "# Estimates that might gain under attack", "",
        f"`scripts/estimators.py`: {len({row['candidate'].estimate for row in rows})} estimates, in the first layer or "
        f"in all, at lambda {', '.join(f'{lam:g}' for lam in lams)}, on {len({row['base'] for row in rows})} models "
        f"under two threats: {len(rows)} candidates. On {SELECTION} selection images under PGD along the own gradient, "
        f"{seeming} of them seem to gain over the plain model, {much} more than 3 points at a loss of at most "
        f"{CLEAN_LOSS:g} point clean. The best of each estimate on each model, {BEST} at most and {len(best)} so far, "
        f"on {best[0]['images']} report images under the adaptive suite with the least effort, along the plain model "
        "and, for sums that are not the package's, along the linear maps behind them; with 95 % intervals. The last "
        "column is the attack that took the most images which were still right after PGD along the own gradient.", "",
        "| model | threat | candidate | clean lost | seeming gain | own gradient | worst case | plain | true gain "
        "| most taken by |", "|---" * 10 + "|",
    ]  # fmt: skip
    for row in best:
        effect = row["effect"]
        lines.append(
            f"| {row['base']} | {row['threat']} | {row['candidate']} | {row['lost']:+.1f} | {row['apparent']:+.1f} "
            f"| {row['own']:.1f} | {row['worst']:.1f} | {row['plain']:.1f} | {Effect(**effect)} | {row['closed by']} |"
        )
    again = [row for row in best if row["last"] is not None]
    if again:
        lines += [
            "", "## Candidates of which more is left than of the plain model", "",
            "Other images, the same suite and, under L0, a second attack, which shares no code with it and takes no "
            "gradient: all single pixels, one by one (`scripts/pixel_search.py`); of sums whose products are held in "
            "memory, which are slow, those pixels that the plain model ranks first. The last two columns are the "
            "images that it took after the suite.", "",
            "| model | threat | candidate | images | clean lost | worst case | plain | true gain | of these "
            "| of plain |",
            "|---" * 10 + "|",
        ]  # fmt: skip
    for row in again:
        last, second = row["last"], [row["last"][key].get(SEARCH, "") for key in ("broke", "plain broke")]
        lines.append(
            f"| {row['base']} | {row['threat']} | {row['candidate']} | {last['images']} | {last['lost']:+.1f} "
            f"| {last['worst']:.1f} | {last['plain']:.1f} | {Effect(**last['effect'])} | {second[0]} | {second[1]} |"
        )
    lines += ["", "## All candidates, under their own gradient", "",
              "| model | threat | candidate | clean lost | seeming gain |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {row['title']} | {row['threat']} | {row['candidate']} | {row['lost']:+.1f} | {row['apparent']:+.1f} |"
        for row in sorted(rows, key=lambda row: -row["apparent"])
    ]
    return "\n".join([*lines, ""])
