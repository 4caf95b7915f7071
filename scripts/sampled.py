"""Measure what an estimate from a fixed subset of the input channels would cost, beside the full estimate.

    OMP_NUM_THREADS=1 python scripts/sampled.py --shared SHARED    # an hour and a half on one core

A sampled layer gives `z + (1 - lam) * D / D_S * (r_S - z_S)`, where z is the plain sum of its D products, and z_S and
r_S are the plain and the robust sum of the D_S products of a subset of its input channels, with all taps. It is exact
with all channels and unchanged at K = 0. The unscaled variant leaves out D / D_S, which adds the robust sum of the
subset to the plain sum of all other channels. Layers of fewer than 8 input channels keep the full estimate, among them
stems and depthwise ones.

SHARED holds checkpoints/ and data/. The rule by which a subset is chosen is itself chosen for each model, on images
apart from those that are reported. Writes results/sampled.json and .md; `--only PART` and `--model NAME` measure a part
of it anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "reproduce"))
from families import FAMILIES
from lab import Lab
from sampled_layers import RULES, Sample, layer_errors, sampling
from sampled_table import markdown

from timm_nrpm import NRPMConfig, Threat, calibrate_, evaluate, reprogram_
from timm_nrpm.attacks.library import pgd
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.models.modes import attackable
from timm_nrpm.nn.pixel_model import PixelModel

ROOT = Path(__file__).parents[1]
SIZES = (1 / 2, 1 / 4, 1 / 8, 32, 16)
REPORTED = ((1 / 2, True), (1 / 4, True), (1 / 8, True), (1 / 8, False))
ATTACKED = ((1 / 2, True), (1 / 8, True), (1 / 8, False))
PARTS = ("choice", "time", "clean", "worst")
Images = tuple[Tensor, Tensor]  # pixels [N, C, H, W] in [0, 1], labels [N]


@dataclass
class Case:
    """A model and its images.

    Attributes:
        title: Description of the model.
        plain: The plain model.
        config: Its reprogramming.
        calibration: Batches of pixels to calibrate on.
        choice, test: Images on which the rule is chosen, and those that are reported.
        batch: Number of images in a batch.
        timed: Number of images in the batch that is timed.
        threat: What an attacker may change.
        attacked: Number of test images that are attacked.
        effort: Effort of the adaptive suite; empty for PGD-10 on the plain model, whose examples the others get, too.
        sizes: Sizes of the subsets among which the rule is chosen.
        reported, strongest: Sizes that are reported on test images, and those that are attacked, each with whether it
            is scaled.
        models: The calibrated models that were made so far, by the name of the subset.
    """

    title: str
    plain: nn.Module
    config: NRPMConfig
    calibration: Sequence[Tensor]
    choice: Images
    test: Images
    batch: int
    timed: int
    threat: Threat
    attacked: int
    effort: str
    sizes: Sequence[float] = SIZES
    reported: Sequence[tuple[float, bool]] = REPORTED
    strongest: Sequence[tuple[float, bool]] = ATTACKED
    models: dict[str, nn.Module] = field(default_factory=dict)

    def model(self, name: str, sample: Sample | None = None) -> nn.Module:
        """The reprogrammed model, calibrated with the estimate of a subset; `"plain"` is the one at lambda 1."""
        if name not in self.models:
            config = NRPMConfig(lam=1.0, layers=self.config.layers) if name == "plain" else self.config
            with sampling(sample):
                model = calibrate_(reprogram_(copy.deepcopy(self.plain), config), self.calibration)
            self.models[name] = model.requires_grad_(False).eval()
        return self.models[name]

    def logits(self, model: nn.Module, images: Images) -> Tensor:
        net = PixelModel(model).eval()
        with torch.no_grad():
            return torch.cat([net(x) for x in images[0].split(self.batch)])


def _paper(lab: Lab, family: str, backbone: str, lam: float, **settings: Any) -> Case:
    """One of the paper's models, with 1000 training images for calibration and 1000 others for the choice."""
    dataset = FAMILIES[family].dataset
    blocks = 10 if dataset == "cifar10" else 1  # classes that the file is ordered by
    pixels, labels = lab.images(dataset, "train", 2000)
    apart = torch.arange(2000) % (2000 // blocks) >= 1000 // blocks
    return Case(
        plain=lab.plain(family, backbone),
        config=NRPMConfig(lam=lam, **FAMILIES[family].estimate),
        calibration=pixels[~apart].split(250),
        choice=(pixels[apart], labels[apart]),
        test=lab.images(dataset, "test"),
        batch=250,
        effort="fast",
        **settings,
    )


def resnet18(lab: Lab, shared: Path) -> Case:
    return _paper(
        lab, "resnet", "resnet18_cifar_narrow", 0.5, title="the published narrow ResNet-18, CIFAR-10",
        timed=50, threat=Threat("Linf", 8 / 255), attacked=100,
    )  # fmt: skip


def lenet(lab: Lab, shared: Path) -> Case:
    return _paper(
        lab, "lenet", "lenet_mnist", 0.3, title="LeNet, trained for four epochs, MNIST",
        timed=250, threat=Threat("Linf", 0.1), attacked=200,
    )  # fmt: skip


def efficientnet(lab: Lab, shared: Path) -> Case:
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(load_file(shared / "checkpoints" / "tf_efficientnet_lite0.safetensors"))

    def read(folder: str) -> Images:
        pixels, labels = zip(*pixel_loader("folder", shared / "data" / folder, model=model, batch_size=25), strict=True)
        return torch.cat(pixels), torch.cat(labels)

    pixels, labels = read("photos")
    chosen = torch.arange(len(labels)) % 3 == 0
    return Case(
        title="tf_efficientnet_lite0, 213 photos, calibrated on 100 others", plain=model.eval(), config=NRPMConfig(),
        calibration=read("photos-unlabelled")[0].split(25), choice=(pixels[chosen], labels[chosen]),
        test=(pixels[~chosen], labels[~chosen]), batch=25, timed=2, threat=Threat("Linf", 1 / 255), attacked=71,
        effort="", sizes=(1 / 4,), reported=((1 / 4, True), (64, True)), strongest=((1 / 4, True), (64, True)),
    )  # fmt: skip


CASES: dict[str, Callable[[Lab, Path], Case]] = {
    "resnet18": resnet18,
    "lenet": lenet,
    "efficientnet": efficientnet,
}


def choose(case: Case) -> dict[str, Any]:
    """Errors and accuracies of every rule and size on the images of the choice."""
    model, labels = case.model("full"), case.choice[1]
    samples = [Sample(rule, size) for size in case.sizes for rule in RULES]
    samples += [
        Sample("even", size, scaled=False) for size in case.sizes if case.effort
    ]  # minutes each on the large one
    errors = layer_errors(model, case.choice[0][: min(case.batch, 50)], samples)
    exact = case.logits(model, case.choice)
    rows = {"full": {"layers": 0.0, "best": 0.0, "products": 1.0, "logits": 0.0, "accuracy": accuracy(exact, labels)}}
    for name, sample in [("plain", None), *((str(sample), sample) for sample in samples)]:
        model = case.model(name, sample)
        with sampling(sample):
            logits = case.logits(model, case.choice)
        error = float((logits - exact).norm() / exact.norm())
        rows[name] = {**errors[name], "logits": error, "accuracy": accuracy(logits, labels)}
        print(name, rows[name], flush=True)
    return rows


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def paired(before: Sequence[bool], now: Sequence[bool]) -> dict[str, Any]:
    """Difference of two shares of the same images, with its 95 % interval (Agresti and Min, 2005)."""
    pairs = list(zip(before, now, strict=True))
    lost, won = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    total, down, up = len(pairs) + 2, lost + 0.5, won + 0.5
    middle, half = (up - down) / total, 1.96 * math.sqrt(up + down - (up - down) ** 2 / total) / total
    return {"difference": (won - lost) / len(pairs), "interval": [middle - half, middle + half]}


def compared(samples: Sequence[Sample], right: Callable[[str, Sample | None], Sequence[bool]]) -> dict[str, Any]:
    """Which images are right in the full, the plain and every sampled model, each compared with the full one."""
    rows: dict[str, Any] = {}
    full = right("full", None)
    for name, sample in [("full", None), ("plain", None), *((str(sample), sample) for sample in samples)]:
        start = time.perf_counter()
        hits = full if name == "full" else right(name, sample)
        rows[name] = {"share": sum(hits) / len(hits), "images": len(hits), **paired(full, hits)}
        print(name, rows[name], f"{time.perf_counter() - start:.0f} s", flush=True)
    return rows


def clean(case: Case, samples: Sequence[Sample]) -> dict[str, Any]:
    """Accuracies on all test images, after calibration."""

    def right(name: str, sample: Sample | None) -> list[bool]:
        model = case.model(name, sample)
        with sampling(sample):
            hits: list[bool] = (case.logits(model, case.test).argmax(1) == case.test[1]).tolist()
            return hits

    return compared(samples, right)


def worst(case: Case, samples: Sequence[Sample]) -> dict[str, Any]:
    """Shares of the attacked images that survive every attack.

    The surrogates of a sampled model are sampled, too, and the plain model is among its sources.
    """
    step = len(case.test[1]) // case.attacked  # CIFAR-10 is ordered by class
    pixels, labels = (part[::step][: case.attacked] for part in case.test)
    if not case.effort:  # an adaptive suite would take hours
        run = pgd(case.threat, 10)
        with attackable(case.plain):
            pixels = run(PixelModel(case.plain).eval(), pixels, labels, list(range(len(labels)))).detach()
    loader = list(zip(pixels.split(100), labels.split(100), strict=True))

    def right(name: str, sample: Sample | None) -> Sequence[bool]:
        model = case.model(name, sample)
        with sampling(sample):
            if case.effort:
                return evaluate(model, loader, case.threat, effort=case.effort, control=False).survivors
            hits: list[bool] = (case.logits(model, (pixels, labels)).argmax(1) == labels).tolist()
            return hits

    return compared(samples, right)


def timed(case: Case, samples: Sequence[Sample], rounds: int) -> dict[str, Any]:
    """Median times of a pass, forward alone and with the backward to pixels and weights, all by turns in one run."""
    full, plain = reprogram_(copy.deepcopy(case.plain), case.config), copy.deepcopy(case.plain)
    pixels = case.test[0][: case.timed]
    runs = [("full", full, None), ("plain", plain, None), *((str(sample), full, sample) for sample in samples)]
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name, *_ in runs}
    for number in range(rounds + 1):
        for (name, model, sample), kind in ((run, kind) for run in runs for kind in ("forward", "both")):
            net, x = PixelModel(model).eval(), pixels.clone().requires_grad_(kind == "both")
            with sampling(sample), torch.set_grad_enabled(kind == "both"):
                start = time.perf_counter()
                logits = net(x)
                if kind == "both":
                    logits.sum().backward()
                seconds = time.perf_counter() - start
            net.zero_grad()
            if number:  # the first round is a warm-up
                times[name][kind].append(seconds)
    medians = {name: {kind: statistics.median(row) for kind, row in rows.items()} for name, rows in times.items()}
    return {name: {**row, **{f"{k} share": row[k] / medians["full"][k] for k in row}} for name, row in medians.items()}


def chosen_rule(choice: dict[str, Any]) -> str:
    """The rule with the smallest errors of logits, over all sizes, on the images of the choice."""

    def error(rule: str) -> float:
        scaled = (row for name, row in choice.items() if name.startswith(rule) and "unscaled" not in name)
        return statistics.mean(math.log(row["logits"]) for row in scaled if row["logits"])

    return min(RULES, key=error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=PARTS, help="parts to measure anew; the others stay"
    )
    parser.add_argument("--model", choices=CASES, help="measure this model alone, and keep the others")
    parser.add_argument("--rounds", type=int, default=7, help="number of timed rounds (default: 7)")
    parser.add_argument("--kept", type=Path, default=ROOT / "results" / ".kept", help="folder of trained models")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lab = Lab("quick", args.shared / "data", args.shared / "checkpoints", args.kept)
    file = args.out / "sampled.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    cases = {name: case(lab, args.shared) for name, case in CASES.items() if args.model in (None, name)}
    for part in PARTS:
        for name, case in cases.items() if part in args.only else ():
            row = content.setdefault(name, {"title": case.title, "threat": str(case.threat), "effort": case.effort})
            print(name, part, flush=True)
            if part == "choice":
                row[part] = choose(case)
            else:
                rule = chosen_rule(row["choice"])
                samples = [Sample(rule, *rest) for rest in (case.strongest if part == "worst" else case.reported)]
                row[part] = {
                    "clean": partial(clean, case, samples),
                    "time": partial(timed, case, samples, args.rounds),
                    "worst": partial(worst, case, samples),
                }[part]()
            row["torch"] = torch.__version__
            file.write_text(json.dumps(content, indent=1) + "\n")
            (args.out / "sampled.md").write_text(markdown(content))


if __name__ == "__main__":
    main()
