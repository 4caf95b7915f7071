"""Check advice on images that it never saw: as many runs on the digits, each with another division of their images.

    python scripts/advice_splits.py                                                      # a quarter of an hour
    python scripts/advice_splits.py --kinds --eps 0.15 --train 1437 --seconds 120        # forty minutes, Linf alone

Of the 360 test images a run judges on 120 and chooses on 120. If it advises something, the variant that it wrote is
loaded, and its effect is measured on the 120 that are left. Writes results/advice-splits.json and .md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_nrpm import Shift, Threat, advise, evaluate, from_pretrained
from timm_nrpm.advice.advise import folder_of
from timm_nrpm.advice.study import Danger
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.trials import Advice, Effect
from timm_nrpm.nn.pixel_model import PixelModel

ROOT = Path(__file__).parents[1]
PART, BATCH = 120, 60


def batches(pixels: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Images in batches."""
    return list(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))


def kept(model: nn.Module, danger: Danger, pixels: Tensor, labels: Tensor) -> str:
    """A digit for each image, 1 where a model is right under the threat."""
    if isinstance(danger, Threat):
        report = evaluate(model, batches(pixels, labels), danger, effort="fast", control=False, seed=2)
        return "".join(str(int(each)) for each in report.survivors)
    with torch.no_grad():
        right = PixelModel(model).eval()(danger.applied(pixels, first=10_000)).argmax(1) == labels
    return "".join(str(int(each)) for each in right)


def run(
    danger: Danger, split: int, training: DataLoader[tuple[Tensor, ...]] | None, seconds: float
) -> dict[str, object]:
    """One run: its advice, and the effect of what it advises on images that it never saw."""
    pixels, labels = digits("test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split))
    report, selection, unseen = ((pixels[rows], labels[rows]) for rows in order.split(PART))
    model = timm.create_model("resnet8_digits", pretrained=True).eval()
    with TemporaryDirectory() as folder:
        found: Advice = advise(
            model, batches(*report), danger, selection=batches(*selection), training=training, seconds=seconds,
            seed=split, folder=folder,
        )[0]  # fmt: skip
        row: dict[str, object] = {"threat": str(danger), "split": split, "helps": found.helps, "said": found.sentence}
        if found.helps:
            variant = from_pretrained(folder_of(Path(folder), str(danger)) / "variant")
            row["unseen"] = asdict(Effect.of(kept(variant, danger, *unseen), kept(model, danger, *unseen)))
    return row


def markdown(rows: list[dict[str, object]]) -> str:
    """The table of all runs."""
    lines = [
        "# Advice on images that it never saw", "",
        f"`scripts/advice_splits.py`: runs of `advise` on `resnet8_digits`, each with another division of the digits' "
        f"test images: {PART} to judge on, {PART} to choose on, and {PART} that the run never saw, on which what it "
        "advised is measured. An effect disappears if it is not above zero there.", "",
        "| threat | runs | without time to try anything | advised something | effect on unseen images, points "
        "| disappeared |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for threat in dict.fromkeys(str(row["threat"]) for row in rows):
        ours = [row for row in rows if row["threat"] == threat]
        effects = [row["unseen"]["points"] for row in ours if row["helps"]]  # type: ignore[index]
        shown = (
            f"{min(effects):+.1f} to {max(effects):+.1f}, {sum(effects) / len(effects):+.1f} on average"
            if effects
            else ""
        )
        gone = sum(effect <= 0 for effect in effects)
        idle = sum("nothing was tried" in str(row["said"]) for row in ours)
        lines.append(f"| {threat} | {len(ours)} | {idle} | {len(effects)} | {shown} | {gone} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=20, help="number of runs for each threat (default: 20)")
    parser.add_argument("--kinds", nargs="*", default=["white_noise", "salt_and_pepper", "missing_pixels"])
    parser.add_argument("--eps", type=float, nargs="*", default=[], help="bounds of Linf attacks (default: none)")
    parser.add_argument("--train", type=int, default=0, help="training images to tune on (default: none)")
    parser.add_argument("--seconds", type=float, default=15, help="time of a run (default: 15)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    dangers: list[Danger] = [*(Shift(kind, 5) for kind in args.kinds), *(Threat("Linf", eps) for eps in args.eps)]
    pixels, labels = (part[: args.train] for part in digits("train"))
    training = DataLoader(TensorDataset(pixels, labels), 64, shuffle=True) if args.train else None
    file = args.out / "advice-splits.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    done = {(row["threat"], row["split"]) for row in rows}
    for danger, split in track([(danger, split) for danger in dangers for split in range(args.splits)], "runs"):
        if (str(danger), split) in done:
            continue
        rows.append(run(danger, split, training, args.seconds))
        file.write_text(json.dumps(rows, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
