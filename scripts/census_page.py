"""The page of the census: a table by family, and a sentence on everything that is not covered or did not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

CHECKS = {
    "sound": "the plain output is not finite",
    "equal": "at lambda 1 the output is not that of the plain model",
    "finite": "at lambda 0.9 the output is not finite",
    "different": "at lambda 0.9 the output is that of the plain model",
}
"""What is wrong if a check of a forward says no."""


def ran(row: Row) -> bool:
    """Whether an architecture was run, and ended."""
    return bool(row.get("forward")) and "failed" not in row["forward"]


def passed(row: Row) -> bool:
    """Whether an architecture ran, and gave what it must."""
    forward = row.get("forward") or {}
    return all(forward.get(check) for check in CHECKS)


def wrong(row: Row) -> str:
    """What is wrong with an architecture that ran, or why it did not; empty if nothing is, or if none was tried."""
    forward = row.get("forward")
    if not forward:
        return ""
    return forward.get("failed") or ", ".join(said for check, said in CHECKS.items() if not forward[check])


def _share(row: Row) -> float:
    """Share of the products that are covered; none of an architecture that could not be measured."""
    return float(row.get("share", 0))


def _percent(share: float) -> str:
    """A share, rounded down so that 100 % is said of a whole alone."""
    return f"{int(10_000 * share) / 100:g} %"


def _counted(entry: Row) -> str:
    """How many layers of a kind stay plain, and how many products they have."""
    return f"{entry['count']} {entry['kind']}"


def table(rows: Mapping[str, Row]) -> list[str]:
    """The table by family."""
    families: dict[str, list[Row]] = {}
    for row in rows.values():
        families.setdefault(row["family"], []).append(row)
    lines = [
        "| family | architectures | covered whole | share of the products | stays plain | weights of no layer | ran "
        "| as they must |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, members in sorted(families.items()):
        shares = sorted({_percent(_share(row)) for row in members}, key=lambda said: float(said.split()[0]))
        plain = sorted({_counted(entry) for row in members for entry in row.get("plain", ())})
        loose = [row["loose"]["count"] for row in members if row.get("loose")]
        cells = [
            family, len(members), sum(bool(row.get("whole")) for row in members),
            shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}", ", ".join(plain),
            "" if not loose else f"{min(loose)}" if min(loose) == max(loose) else f"{min(loose)} to {max(loose)}",
            sum(map(ran, members)), sum(map(passed, members)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def exceptions(rows: Mapping[str, Row]) -> list[str]:
    """A line on each architecture that is covered in part."""
    lines = []
    for name, row in rows.items():
        if not row.get("whole"):
            why = row.get("failed") or f"{_percent(_share(row))} of the products are covered. {row['why']}"
            lines.append(f"- `{name}`: {why}.")
    return lines or ["None."]


def loose_weights(rows: Mapping[str, Row]) -> list[str]:
    """A line on each family whose architectures multiply by weights of no layer."""
    families: dict[str, list[tuple[str, Row]]] = {}
    for name, row in rows.items():
        if row.get("loose"):
            families.setdefault(row["family"], []).append((name, row))
    lines = []
    for family, members in sorted(families.items()):
        name, row = min(members, key=lambda member: _share(member[1]))
        what = f"`{row['loose']['first']}` and {row['loose']['count'] - 1} more, read {row['loose']['times']} times"
        others = ", ".join(f"`{other}`" for other, _ in members if other != name)
        lines.append(
            f"- {family}: {100 * (1 - _share(row)):.2f} % of the products in `{name}` ({what}), and no larger a share "
            f"in {others or 'any other'}"
        )
    return lines or ["None."]


def runs(rows: Mapping[str, Row]) -> list[str]:
    """How many architectures ran, and a line on each that did not give what it must."""
    tried = [row for row in rows.values() if row.get("forward")]
    lines = [
        f"{len(tried)} of {len(rows)} architectures were tried so far, those with few parameters first. "
        f"{sum(map(ran, tried))} ran, and {sum(map(passed, tried))} of them gave what they must.",
        "",
    ]
    lines += [f"- `{name}`: {said}" for name, row in rows.items() if (said := wrong(row))]
    return lines


def markdown(rows: Mapping[str, Row], versions: Mapping[str, str]) -> str:
    """The page.

    Args:
        rows: The row of each architecture by name.
        versions: Versions of the packages that were measured.
    """
    whole = sum(bool(row.get("whole")) for row in rows.values())
    all_products = sum(_share(row) == 1 for row in rows.values())
    fixed: Sequence[str] = [name for name, row in rows.items() if row.get("fixed")]
    return "\n".join([
        "# Which architectures are covered",
        "",
        f"`python scripts/census.py --forward` on timm {versions['timm']} and torch {versions['torch']}: {whole} of "
        f"{len(rows)} architectures are covered whole, which means that every convolution and linear map that a "
        "forward uses becomes a reprogrammed layer. Each was built and run once on an image of its own size.",
        "",
        "A family is a module of `timm.models`. The share counts products of an input and a weight: those that "
        "reprogrammed layers add up, of all that any layer, recurrence or weight of no layer adds up. Products of two "
        "inputs, as in attention, are no linear map and are left out. `ran` counts the architectures that were run for "
        "real with random weights, on two images of the smallest size that they take, within the limits on memory "
        "and time; `as they must` those of them whose output at lambda 1 equals that of the plain model bit for bit, "
        "and at lambda 0.9 is finite and different.",
        "",
        *table(rows),
        "",
        "## Covered in part",
        "",
        *exceptions(rows),
        "",
        "## Weights of no layer",
        "",
        f"In {all_products} architectures, reprogrammed layers add up every product of an input and a weight. "
        f"{sum(bool(row.get('loose')) for row in rows.values())} architectures also multiply inputs by a parameter "
        "that belongs to no layer: tables of relative positions that queries are compared with, and the weights of "
        "queries in SwiftFormer. They take part in attention, no switch of the model has them call a layer, and they "
        "stay as they are. These architectures count as whole, since all their layers are covered, and their share "
        "says what is not:",
        "",
        *loose_weights(rows),
        "",
        f"Fixed filters, such as those against aliasing, are buffers and no weights. {len(fixed)} architectures have "
        "some, and they stay as they are.",
        "",
        "## Runs",
        "",
        *runs(rows),
        "",
    ])  # fmt: skip
