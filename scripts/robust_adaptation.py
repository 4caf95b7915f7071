"""Attack adaptation: an adversary owns some of the images whose statistics a model takes, and wants the others wrong.

    python scripts/robust_adaptation.py --shared SHARED --resume    # five minutes a draw; goes on where it stopped

The setting of MedBN (arXiv 2403.19326): the narrow ResNet-18 takes its BatchNorm statistics from 200 images under
Gaussian noise of severity 3, of which the adversary has chosen 10, 20 or 40. They may be any images in [0, 1]. It knows
the weights, the other images, their labels and how statistics are taken, and climbs the number of wrong ones, smoothed
by a sigmoid of their margins, by signed steps through the whole network, estimator included: from its images as they
were, and from black and white noise, which finds more. Its examples against each estimator are shown to all, and the
worst counts. Each draw is of other images. Statistics are taken by the mean, by the median over all values, by the
package's L1 estimate over images, and without the 15 % of the images whose moments, over all channels together, are
farthest from the middle. To be among the rest, the adversary follows a smooth version of that choice too, whose
gradient tells how to come nearer. The stored statistics are not mixed in (prior 0), which favours the adversary.
 SHARED holds checkpoints/ and data/. Writes results/robust-adaptation.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from adaptation_bases import narrow_resnet
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_nrpm.evaluation.corruptions import corrupt
from timm_nrpm.models.adaptation import ESTIMATES
from timm_nrpm.models.image_statistics import median_statistics
from timm_nrpm.models.image_statistics import statistics as statistics_of
from timm_nrpm.nn.pixel_model import PixelModel

ROOT = Path(__file__).parents[1]
COUNT, KIND, SEVERITY = 200, "gaussian_noise", 3
SHARES = (20, 10, 40)
STEPS = 60
T_OF_DRAWS = {10: 2.262, 5: 2.776, 3: 4.303}
"""Quantiles of Student's distribution for a 95 % interval of the mean over so many draws."""

LEFT_OUT = 0.15
"""Share of the images that are left out by "trimmed"."""

SOFTNESS = 0.2
"""Width of the smooth choice of the images, as a share of the distance at which they are left out."""

FOLLOWED = {name: (name,) for name in ESTIMATES} | {"trimmed": ("trimmed", "smoothly trimmed")}
"""The estimates whose gradient an adversary follows, by the estimate that is attacked."""

Row = dict[str, Any]


def trimmed(means: Tensor, squares: Tensor, smooth: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance `[C]` over the images whose moments are nearest to the median, in median deviations."""
    moments = torch.cat([means, squares], 1)  # [N, 2 C]
    middle = moments.median(0).values
    spread = (moments - middle).abs().median(0).values
    distances = ((moments - middle) / spread.clamp_min(1e-3 * float(spread.detach().mean()))).square().mean(1).sqrt()
    limit = distances.detach().quantile(1 - LEFT_OUT)
    choice = ((limit - distances) / (SOFTNESS * limit)).sigmoid() if smooth else (distances <= limit).to(means)
    mean, square = ((choice.unsqueeze(1) * part).sum(0) / choice.sum() for part in (means, squares))
    return mean, square - mean.square()


class FromBatch(nn.Module):
    """A BatchNorm that takes its statistics from the batch at hand, by one of the estimates, differentiably."""

    def __init__(self, norm: _BatchNorm, robust: str) -> None:
        super().__init__()
        self.norm, self.robust = norm, robust

    def forward(self, x: Tensor) -> Tensor:
        if self.robust == "median":
            mean, var = median_statistics(x.flatten(2))
        elif self.robust not in ESTIMATES:
            mean, var = trimmed(x.mean((2, 3)), x.square().mean((2, 3)), self.robust.startswith("smoothly"))
        else:
            mean, var = statistics_of(x.mean((2, 3)), x.square().mean((2, 3)), self.robust)
        scale = self.norm.weight * (var.clamp_min(0) + self.norm.eps).rsqrt()
        return (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.norm.bias.view(-1, 1, 1)


def from_batch(model: nn.Module, robust: str) -> nn.Module:
    """A copy of the model on pixels, whose BatchNorms take their statistics from each batch."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                assert type(child) in (nn.BatchNorm2d,), type(child)
                setattr(parent, name, FromBatch(child, robust))
    return PixelModel(model).eval()


def attacked(net: nn.Module, followed: list[nn.Module], benign: Tensor, labels: Tensor, starts: list[Tensor]) -> Tensor:
    """The adversary's images, climbed from each start along each gradient, that left fewest benign images right."""
    climbed = [_climbed(net, source, benign, labels, start) for source in followed for start in starts]
    return min(climbed, key=lambda pair: pair[0])[1]


def _climbed(net: nn.Module, source: nn.Module, benign: Tensor, labels: Tensor, start: Tensor) -> tuple[float, Tensor]:
    """The smallest number of benign images left right on the way from a start, and the images there."""
    x, best, fewest = start.clone(), start, math.inf
    for step in range(STEPS + 1):
        x.requires_grad_()
        logits = source(torch.cat([benign, x]))[: len(benign)]
        with torch.no_grad():
            judged = logits if source is net else net(torch.cat([benign, x]))[: len(benign)]
        count = int(judged.argmax(1).eq(labels).sum())
        if count < fewest:
            best, fewest = x.detach().clone(), count
        if step == STEPS:
            break
        own = logits.gather(1, labels.unsqueeze(1))
        margins = logits.scatter(1, labels.unsqueeze(1), -math.inf).max(1, keepdim=True).values - own
        (gradient,) = torch.autograd.grad(margins.sigmoid().mean(), x)
        size = 0.1 * (1 - step / STEPS) + 0.01
        x = (x.detach() + size * gradient.sign()).clamp(0, 1)
    return fewest, best


def draw(nets: dict[str, nn.Module], plain: nn.Module, images: Tensor, labels: Tensor, share: int) -> Row:
    """The benign images that each estimate leaves right, without and with the adversary, in %."""
    own, benign, wanted = images[:share], images[share:], labels[share:]

    def left(net: nn.Module, others: Tensor) -> float:
        with torch.no_grad():
            return 100 * float(net(torch.cat([benign, others]))[: len(benign)].argmax(1).eq(wanted).double().mean())

    noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(0)).round()
    examples = {
        name: attacked(nets[name], [nets[source] for source in sources], benign, wanted, [own, noise])
        for name, sources in FOLLOWED.items()
    }
    row: Row = {"stored": left(plain, own)}
    for name in FOLLOWED:
        net = nets[name]
        against = {by: left(net, other) for by, other in examples.items()}
        row[name] = {"alone": left(net, own), "attacked": min(against.values()), "by": against}
    return row


def difference(rows: list[Row], name: str, when: str) -> tuple[float, float, float]:
    """Mean gain over the mean estimate, paired by draw, and its 95 % interval."""
    gains = [row[name][when] - row["mean"][when] for row in rows]
    mean = statistics.mean(gains)
    if len(gains) not in T_OF_DRAWS:
        return mean, math.nan, math.nan
    half = T_OF_DRAWS[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
    return mean, mean - half, mean + half


def markdown(rows: dict[str, list[Row]]) -> str:
    lines = [
        "# Adaptation under attack", "",
        f"`scripts/robust_adaptation.py`: the narrow ResNet-18 takes its statistics from {COUNT} images under {KIND}, "
        f"severity {SEVERITY}, some of which an adversary chose. Benign images that are right, in %, on average over "
        "draws; beside the mean estimate, paired by draw, with a 95 % interval. Of the examples made against each "
        "estimate the worst count.", "",
        "| the adversary's | draws | estimate | without it | beside the mean | attacked | beside the mean |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for share, ours in rows.items():
        for name in FOLLOWED:
            cells = []
            for when in ("alone", "attacked"):
                cells.append(f"{statistics.mean(row[name][when] for row in ours):.1f}")
                gain, low, high = difference(ours, name, when)
                known = "" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})"
                cells.append("" if name == "mean" else f"{gain:+.1f}{known}")
            lines.append(f"| {share} | {len(ours)} | {name} | {' | '.join(cells)} |")
        stored = statistics.mean(row["stored"] for row in ours)
        lines.append(f"| {share} | {len(ours)} | the stored statistics | {stored:.1f} | | {stored:.1f} | |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--draws", type=int, default=10, help="number of draws for each share (default: 10)")
    parser.add_argument("--shares", type=int, nargs="+", default=list(SHARES), help="the adversary's images of 200")
    parser.add_argument("--choose", action="store_true", help="draw the images that settings are chosen on")
    parser.add_argument("--resume", action="store_true", help="keep the draws that are in the results")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    base = narrow_resnet(args.shared, 2000)
    pixels, labels = base.chosen if args.choose else base.reported
    nets = {name: from_batch(base.model, name) for sources in FOLLOWED.values() for name in sources}
    plain = PixelModel(base.model).eval()
    file = args.out / ("robust-adaptation-choice.json" if args.choose else "robust-adaptation.json")
    rows: dict[str, list[Row]] = json.loads(file.read_text())["rows"] if args.resume and file.exists() else {}
    tasks = [(share, number) for share in args.shares for number in range(args.draws)]
    for share, number in track(tasks, "draws"):
        done = rows.setdefault(str(share), [])
        if len(done) > number:
            continue
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(number))[:COUNT]
        start = time.perf_counter()
        done.append(draw(nets, plain, corrupt(pixels[order], KIND, SEVERITY, seed=number), labels[order], share))
        done[-1]["seconds"] = time.perf_counter() - start
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {"images": COUNT, "steps": STEPS, "kind": KIND, "severity": SEVERITY, "torch": torch.__version__}
        file.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
