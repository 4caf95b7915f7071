"""Measure what adaptation gains and where it harms, for real models, corruptions and one-sided images.

    python scripts/adaptation.py --shared SHARED    # about twenty minutes on two cores

SHARED holds checkpoints/ and data/. A model is adapted to unlabelled images and judged on the same images, or, where
the table says so, on others with the same corruption. Settings were chosen on images apart from these: training images
of the digits, and those of CIFAR-10 that `--choose` measures. The priors 0, which forgets the stored statistics, and
256 are the controls of the default. Writes results/adaptation.json and .md; `--bases` measures some anew.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from adaptation_bases import Base, Images, bundled, interval, narrow_resnet, photos, predictions
from rich.progress import track
from torch import Tensor, nn

from timm_nrpm.evaluation.corruptions import IMAGENET_C, SMALLEST, corrupt
from timm_nrpm.models.adaptation import CAUTION, LEAST, Adaptation

ROOT = Path(__file__).parents[1]
PRIORS: dict[str, Any] = {"prior 0": 0, "prior 256": 256, "auto": "auto"}
SEVERITY = 5
SMALL = (200, 50, 10)
"""Numbers of images, fewer than all, on which adaptation is tried, too."""

BASES: dict[str, Callable[[argparse.Namespace], Base]] = {
    "resnet": lambda args: narrow_resnet(args.shared, args.images),
    "digits": lambda args: bundled(),
    "photos": lambda args: photos(args.shared),
}

Row = dict[str, Any]


def adapted(model: nn.Module, pixels: Tensor, prior: float | str) -> tuple[nn.Module, float]:
    """A copy of the model, adapted, and the mean weight of the images in its statistics."""
    copied = copy.deepcopy(model)
    adaptation = Adaptation(copied, prior=prior)  # type: ignore[arg-type]
    for batch in pixels.split(256):
        adaptation(batch)
    weights = adaptation.weights.values()
    return copied, sum(weights) / len(weights)


def effective_classes(guesses: Tensor) -> float:
    """The exponential of the entropy of the predicted classes: how many there would be if all were equally frequent."""
    shares = guesses.unique(return_counts=True)[1].double() / len(guesses)
    return float((-shares * shares.log()).sum().exp())


def row_of(base: Base, what: str, to: Images, judged: Images | None = None) -> Row:
    """Accuracies as it was and adapted, and the paired gain of the default with its interval."""
    same, judged = judged is None, to if judged is None else judged
    guesses = predictions(base.model, judged[0])
    before = guesses.eq(judged[1])
    row: Row = {"images": what, "adapted to": len(to[0]), "judged on": len(judged[0]), "same images": same}
    row["as it was"] = 100 * float(before.double().mean())
    for name, prior in PRIORS.items():
        model, weight = adapted(base.model, to[0], prior)
        now = predictions(model, judged[0])
        after = now.eq(judged[1])
        row[name] = 100 * float(after.double().mean())
        if name == "auto":
            row["weight"], row["same"] = weight, float(now.eq(guesses).double().mean())
            row["classes"] = [effective_classes(guesses), effective_classes(now)]
            row["gain"], row["low"], row["high"] = interval(after.double() - before.double())
            row["gains"] = (after.int() - before.int()).tolist()
    return row


def cases(base: Base, images: Images, kinds: tuple[str, ...]) -> Iterator[tuple[str, Images, Images | None]]:
    """What a base is adapted to, in words, and what it is judged on if that is something else."""
    pixels, labels = images
    yield "clean", images, None
    for count in SMALL:
        if count < len(pixels):
            yield "clean", (pixels[:count], labels[:count]), None
    classes = labels.unique()
    if len(classes) == 10:
        one, two = labels == classes[0], (labels == classes[0]) | (labels == classes[1])
        yield "clean, one class", (pixels[one], labels[one]), None
        yield "clean, two classes", (pixels[two], labels[two]), None
        noisy = corrupt(pixels[one], kinds[0], SEVERITY)
        yield f"{kinds[0]}, one class", (noisy, labels[one]), None
    for kind in kinds:
        corrupted = corrupt(pixels, kind, SEVERITY)
        yield kind, (corrupted, labels), None
        half = len(pixels) // 2
        yield kind, (corrupted[:half], labels[:half]), (corrupted[half:], labels[half:])


def measure(base: Base, images: Images) -> list[Row]:
    """All rows of a base, the mean over the corruptions last, on images that all of them were adapted to."""
    rows = []
    side = min(images[0].shape[2:])
    kinds = tuple(kind for kind in IMAGENET_C if SMALLEST[kind] <= side)
    kinds = kinds if side >= 32 else ("white_noise", "salt_and_pepper")
    total = 4 + len(SMALL) + 2 * len(kinds)
    for what, to, judged in track(cases(base, images, kinds), base.title, total=total):
        rows.append(row_of(base, what, to, judged))
    whole = [row for row in rows if row["images"] in kinds and row["adapted to"] == len(images[0])]
    mean: Row = {name: sum(row[name] for row in whole) / len(whole) for name in ("as it was", *PRIORS, "weight")}
    mean |= {"images": f"mean of {len(whole)} corruptions", "adapted to": len(images[0]), "judged on": len(images[0])}
    # The images are the same in all rows, so an image's gains are averaged before the interval is taken.
    mean["gain"], mean["low"], mean["high"] = interval(torch.tensor([row["gains"] for row in whole]).double().mean(0))
    return [{key: value for key, value in row.items() if key != "gains"} for row in (*rows, mean)]


def markdown(tables: dict[str, list[Row]], settings: Row) -> str:
    lines = [
        "# Adaptation: what it gains, and where it harms", "",
        f"`scripts/adaptation.py`, torch {settings['torch']}. A plain model's BatchNorm statistics are moved towards "
        "those of unlabelled images, and it is judged on the same images or, where two numbers are given, on others "
        f"with the same corruption. Accuracies in %; corruptions at severity {SEVERITY}. *Auto* is the default; its "
        "gain is paired, with a 95 % interval. *Weight* is the images' share in the statistics, on average over the "
        "layers; *classes* is the effective number of classes that are predicted, before and after.", "",
    ]  # fmt: skip
    for base, rows in tables.items():
        lines += [
            f"## {base}",
            "",
            "| images | number | as it was | prior 0 | prior 256 | auto | gain | weight | classes |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            to, judged = row["adapted to"], row["judged on"]
            classes = ", ".join(f"{number:.1f}" for number in row.get("classes", []))
            lines.append(
                f"| {row['images']} | {f'{to}' if row.get('same images', True) else f'{to}, {judged}'} | "
                f"{row['as it was']:.1f} | {row['prior 0']:.1f} | {row['prior 256']:.1f} | **{row['auto']:.1f}** | "
                f"{row['gain']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f}) | {row['weight']:.0%} | {classes} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--images", type=int, default=1000, help="images of CIFAR-10 that are reported (default: 1000)")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES, help="models that are measured anew")
    parser.add_argument("--choose", action="store_true", help="measure on the images that settings are chosen on")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    torch.manual_seed(0)
    file = args.out / "adaptation.json"
    settings = {
        "torch": torch.__version__,
        "caution": CAUTION,
        "least": LEAST,
        "severity": SEVERITY,
        "images": args.images,
    }
    kept = json.loads(file.read_text()) if file.exists() else {"settings": settings, "tables": {}}
    tables: dict[str, list[Row]] = kept["tables"] if kept["settings"] == settings else {}
    for name in args.bases:
        base = BASES[name](args)
        if args.choose and not len(base.chosen[0]):
            continue
        tables[base.title] = measure(base, base.chosen if args.choose else base.reported)
        if not args.choose:
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"settings": settings, "tables": tables}, indent=1) + "\n")
            file.with_suffix(".md").write_text(markdown(tables, settings))
    print(markdown(tables, settings))


if __name__ == "__main__":
    main()
