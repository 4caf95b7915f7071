"""The table of `scripts/sampled.py`, and its verdict on the estimate from a subset of the channels."""

from __future__ import annotations

from typing import Any

SUITES = ("the examples of PGD-10 on the plain model", "the adaptive suite, effort fast")
TIME, POINTS = 0.25, 0.005
"""The option is kept if a model takes at most this share of the full estimate's time, and loses these points."""


def _shown(row: dict[str, Any] | None) -> str:
    """A share in %, and its difference from that of the full estimate, in points."""
    if row is None:
        return ""
    low, high = (100 * value for value in row["interval"])
    return f"{100 * row['share']:.1f}, {100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def verdict(part: dict[str, Any]) -> str:
    """Which subsets of a model keep to both limits, in a sentence, by the shares that were measured."""
    times, losses = part.get("time", {}), [part.get(key, {}) for key in ("clean", "worst")]

    def within(name: str) -> tuple[bool, bool]:
        quick = times[name]["forward share"] <= TIME and times[name]["both share"] <= TIME
        measured = [rows[name]["difference"] for rows in losses if name in rows]
        return quick, bool(measured) and min(measured) >= -POINTS

    limits = {name: within(name) for name in times if name not in ("full", "plain")}
    quick, kind, both = (
        ", ".join(f"({name})" for name, limit in limits.items() if chosen(limit)) or "none"
        for chosen in (lambda limit: limit[0], lambda limit: limit[1], all)
    )
    return (
        f"Within {TIME:g} of the time: {quick}. Losing at most {100 * POINTS:g} points of each share measured: {kind}. "
        f"**Both: {both}.**"
    )


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "# An estimate from a subset of the input channels",
        "",
        "`scripts/sampled.py`, one thread. A subset is a rule and a size; `unscaled` leaves the factor D / D_S out. "
        "Errors are relative to the full estimate: those of layers are means over the layers, on the inputs that the "
        "full model gives them, and `best` is what would be left if the correction had the best coefficient in every "
        "layer. `plain` is the model without any correction. Accuracies are after calibration, in %; differences are "
        "from the full estimate, in points, with the 95 % interval of paired images "
        "(Agresti and Min). Times are medians by turns, as shares of the full estimate's; `at least` is that of the "
        "plain pass and of the share of the products, if all else came free.",
    ]
    for part in content.values():
        lines += ["", f"## {part['title'][0].upper()}{part['title'][1:]}", ""]
        lines += ["| subset | products | layers | best | logits | accuracy |", "|---|---|---|---|---|---|"]
        for name, row in part["choice"].items():
            errors = [f"{row[key]:.2f}" for key in ("products", "layers", "best", "logits")]
            lines.append("| " + " | ".join((name, *errors, f"{100 * row['accuracy']:.1f}")) + " |")
        lines += [
            "",
            f"On the images of the choice. On those reported, under {part['threat']}, {SUITES[bool(part['effort'])]}:",
            "",
        ]
        lines += ["| subset | forward | at least | with backward | at least | clean | attacked |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, row in part.get("time", {}).items():
            products = part["choice"].get(name.removesuffix(", unscaled"), {}).get("products")
            shares = []
            for kind in ("forward share", "both share"):
                least = part["time"]["plain"][kind]
                bound = "" if products is None else f"{least + products * (1 - least):.2f}"
                shares += [f"{row[kind]:.2f}", bound]
            rows = (part.get(key, {}).get(name) for key in ("clean", "worst"))
            lines.append("| " + " | ".join((name, *shares, *map(_shown, rows))) + " |")
        counts = [f"{key} {part[key]['full']['images']}" for key in ("clean", "worst") if key in part]
        lines += ["", f"Number of images: {', '.join(counts) or 'none'}. {verdict(part)}"]
    return "\n".join(lines) + "\n"
