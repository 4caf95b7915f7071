"""Look for a sign, without labels, that adaptation harms: what it changes in the predictions and in the statistics.

    python scripts/adaptation_signs.py --shared SHARED    # twenty minutes on two cores

Each base is adapted to 200 images, of all classes, of two or of one, clean or corrupted at severity 5. A sign is a
number that can be computed without labels; it is worth something if it orders the cases that gain and those that lose,
on every base alike. The table gives, for each sign and base, the probability that a case which loses 5 points or more
has the larger value than one which gains 2 or more: 0.5 is chance. The bound of the one sign that tells them apart,
mean confidence, was chosen on the first base; other images and classes of it, the digits and photos check it. Writes
results/adaptation-signs.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from adaptation import effective_classes
from adaptation_bases import Base, Images, bundled, narrow_resnet, photos
from rich.progress import track
from torch import Tensor, nn

from timm_nrpm.evaluation.corruptions import IMAGENET_C, NATIVE, corrupt
from timm_nrpm.models.adaptation import DOUBT, Adaptation
from timm_nrpm.nn.pixel_model import PixelModel

ROOT = Path(__file__).parents[1]
COUNT, SEVERITY = 200, 5
LOSES, GAINS = -5.0, 2.0

SIGNS = {
    "classes": "effective number of predicted classes, after over before",
    "confidence": "mean confidence, before minus after",
    "changed": "share of the predictions that change",
    "last": "shift of the last BatchNorm's statistics, after the layers before it were corrected",
    "last over first": "the same over the mean shift of the first third of the layers",
}

Row = dict[str, Any]


def probabilities(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model's softmax, `[N, classes]`."""
    with torch.no_grad():
        return torch.cat([PixelModel(model).eval()(batch).softmax(1) for batch in pixels.split(100)])


def row_of(base: Base, what: str, images: Images) -> Row:
    """What adaptation gains, and every sign."""
    pixels, labels = images
    model = copy.deepcopy(base.model)
    stream = Adaptation(model)
    stream(pixels)
    shifts = list(stream.shifts.values())
    before, after = (probabilities(each, pixels) for each in (base.model, model))
    right = [each.argmax(1).eq(labels).double().mean() for each in (before, after)]
    first = sum(shifts[: len(shifts) // 3]) / (len(shifts) // 3)
    return {
        "images": what,
        "gain": 100 * float(right[1] - right[0]),
        "classes": effective_classes(after.argmax(1)) / effective_classes(before.argmax(1)),
        "confidence": float(before.max(1).values.mean() - after.max(1).values.mean()),
        "changed": float(before.argmax(1).ne(after.argmax(1)).double().mean()),
        "last": shifts[-1],
        "last over first": shifts[-1] / first,
    }


def cases(images: Images, first: int) -> Iterator[tuple[str, Images]]:
    """Images of all classes, of two and of one, as they are and corrupted; `first` is the first single class."""
    pixels, labels = images
    classes = labels.unique().tolist()
    chosen = {"all classes": classes}
    if len(classes) == 10:  # the photos have hardly two of any class
        chosen |= {"two classes": classes[first : first + 2]}
        chosen |= {f"class {each}": [each] for each in classes[first::3]}
    kinds = (IMAGENET_C if pixels.shape[2] < 200 else IMAGENET_C[::3]) if pixels.shape[2] >= 32 else NATIVE
    for name, which in chosen.items():
        rows = torch.isin(labels, torch.tensor(which)).nonzero().squeeze(1)[:COUNT]
        yield f"clean, {name}", (pixels[rows], labels[rows])
        for kind in kinds:
            yield f"{kind}, {name}", (corrupt(pixels[rows], kind, SEVERITY), labels[rows])


def told(rows: list[Row], sign: str) -> float:
    """Probability that a case that loses has the larger sign than one that gains; ties count half."""
    lost, gained = ([row[sign] for row in rows if test(row["gain"])] for test in (_loses, _gains))
    pairs = [(a > b) + (a == b) / 2 for a in lost for b in gained]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def _loses(gain: float) -> bool:
    return gain <= LOSES


def _gains(gain: float) -> bool:
    return gain >= GAINS


def _shown(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.2f}"


def markdown(tables: dict[str, list[Row]]) -> str:
    counts = {
        base: f"{sum(_loses(row['gain']) for row in rows)} lose, {sum(_gains(row['gain']) for row in rows)} gain"
        for base, rows in tables.items()
    }
    lines = [
        "# Signs of harm that need no labels", "",
        f"`scripts/adaptation_signs.py`: each base adapted to {COUNT} images at most, of all classes, two or one, "
        f"clean or corrupted. Probability that a case which loses {-LOSES:g} points or more has the larger value than "
        f"one that gains {GAINS:g} or more: 0.5 is chance, 0 and 1 tell them apart.", "",
        "| sign | " + " | ".join(f"{base} ({counts[base]})" for base in tables) + " |",
        "|---" * (1 + len(tables)) + "|",
    ]  # fmt: skip
    for base, rows in tables.items():
        flagged = [sum(row["confidence"] > DOUBT for row in rows if test(row["gain"])) for test in (_loses, _gains)]
        lines.insert(-2, f"Confidence lost above {DOUBT:g}, {base}: {flagged[0]} that lose, {flagged[1]} that gain.")
        lines.insert(-2, "")
    lines += [
        f"| {words} | " + " | ".join(_shown(told(rows, sign)) for rows in tables.values()) + " |"
        for sign, words in SIGNS.items()
    ]
    for base, rows in tables.items():
        lines += [
            "",
            f"## {base}",
            "",
            "| images | gain | " + " | ".join(SIGNS) + " |",
            "|---" * (2 + len(SIGNS)) + "|",
        ]
        lines += [
            f"| {row['images']} | {row['gain']:+.1f} | " + " | ".join(f"{row[sign]:.2f}" for sign in SIGNS) + " |"
            for row in sorted(rows, key=lambda row: row["gain"])
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    resnet, few, many = narrow_resnet(args.shared, 2000), bundled(), photos(args.shared)
    parts = {
        resnet.title: (resnet, resnet.reported, 0),
        "the same, other images and classes": (resnet, resnet.chosen, 1),
        few.title: (few, few.reported, 0),
        many.title: (many, many.reported, 0),
    }
    tables = {}
    for title, (base, images, first) in parts.items():
        tables[title] = [row_of(base, *case) for case in track(list(cases(images, first)), title)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "adaptation-signs.json").write_text(json.dumps(tables, indent=1) + "\n")
    (args.out / "adaptation-signs.md").write_text(markdown(tables))
    print(markdown(tables))


if __name__ == "__main__":
    main()
