"""Which layers are worth tuning, and which reprogramming: first and last ones of every number, the most critical ones,
and all, at equal passes.

    python scripts/layers_front.py --data DATA --kept FOLDER              # hours on two cores
    python scripts/layers_front.py --data DATA --kept FOLDER --part 0 2   # half of it, for two processes
    python scripts/layers_front.py --data DATA --kept FOLDER --page       # the page from what is kept

The network is a narrow ResNet-18 that was trained on clean images of CIFAR-10. A layer is tuned with the normalisation
that follows it. Each choice sees the same images in the same order, attacked by as many steps. Choices are compared on
some images by PGD, and of each kind the best is judged on others by the adaptive suite. Writes
results/layers-front.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_nrpm import NRPMConfig, Threat, TuneConfig, calibrate_, evaluate, reprogram_, restore_, tune
from timm_nrpm.evaluation.trials import Effect, digits_of
from timm_nrpm.figures import canvas
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.work import products
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.nn.wrappers import copied
from timm_nrpm.subnetworks.criticality import criticality
from timm_nrpm.subnetworks.splitting import layer_parameters

sys.path.insert(0, str(Path(__file__).parent / "reproduce"))
from lab import Lab

ROOT = Path(__file__).parents[1]
NETWORK, THREAT = "resnet18_cifar_narrow", Threat("Linf", 4 / 255)
CLEAN_SAMPLES, CLEAN_EPOCHS = 25_000, 8
SAMPLES, EPOCHS, STEPS, BATCH, LR = 2000, 4, 3, 32, 0.01
CHOSEN_ON, JUDGED_ON = 400, 400
TUNED_COUNTS, REPROGRAMMED_COUNTS = tuple(range(1, 18)), (1, 2, 4, 8, 17)
"""Numbers of layers that are tuned, and of first and of last layers that are reprogrammed."""

KINDS = ("first", "last", "critical")
TUNED, MIXED = "tuned", "reprogrammed"
ESTIMATE = NRPMConfig(0.0, eps=1.0, standardize=True)


@dataclass(frozen=True)
class Choice:
    """Some layers, and what is done with them.

    Attributes:
        how: `"tuned"` or `"reprogrammed"`.
        kind: `"first"`, `"last"`, `"critical"`, `"all"`, or `"plain"` for none.
        layers: Their names.
    """

    how: str
    kind: str
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.how}-{self.kind}-{len(self.layers)}"


class Front:
    """Measures choices of layers, and keeps what it measured."""

    def __init__(self, lab: Lab, kept: Path) -> None:
        self.lab, self.kept = lab, kept
        kept.mkdir(parents=True, exist_ok=True)
        self._plain: nn.Module | None = None
        pixels, labels = lab.images("cifar10", "test", CHOSEN_ON + JUDGED_ON)
        orders = range(0, len(labels), 2), range(1, len(labels), 2)
        self.selection, self.report = (
            DataLoader(TensorDataset(pixels[list(rows)], labels[list(rows)]), 100) for rows in orders
        )
        lab.efforts = {
            **lab.efforts,
            "resnet": replace(lab.efforts["resnet"], samples=CLEAN_SAMPLES, epochs=CLEAN_EPOCHS),
        }
        self.owned = layer_parameters(self.plain())
        self.layers = tuple(self.owned)

    def plain(self) -> nn.Module:
        """The network as it is."""
        if self._plain is None:
            self._plain = self.lab.trained("resnet", NETWORK, {"objective": "clean", "eps": 0.0}).eval()
        return copied(self._plain)

    def ranked(self) -> list[str]:
        """The layers, the most critical one first."""
        file = self.kept / "criticality.json"
        if not file.exists():
            net = PixelModel(self.plain()).to(self.lab.device).eval()
            file.write_text(json.dumps(criticality(net, [next(iter(self.selection))], self.layers, THREAT)))
        rises = json.loads(file.read_text())
        return sorted(rises, key=lambda name: -rises[name])

    def choices(self) -> list[Choice]:
        """All that is compared."""
        ranked = self.ranked()
        found = [Choice(TUNED, "plain", ()), Choice(TUNED, "all", self.layers)]
        for number in TUNED_COUNTS:
            critical = tuple(name for name in self.layers if name in ranked[:number])
            parts = (self.layers[:number], self.layers[-number:], critical)
            found += [Choice(TUNED, kind, layers) for kind, layers in zip(KINDS, parts, strict=True)]
            if number in REPROGRAMMED_COUNTS:
                found += [Choice(MIXED, kind, layers) for kind, layers in zip(KINDS[:2], parts[:2], strict=True)]
        return [*found, Choice(MIXED, "all", self.layers)]

    def model(self, choice: Choice) -> nn.Module:
        """The network with these layers tuned or reprogrammed."""
        if not choice.layers:
            return self.plain()
        if choice.how == MIXED:
            model = reprogram_(self.plain(), replace(ESTIMATE, layers=choice.layers))
            pixels, _ = self.lab.images("cifar10", "train", 1000)
            return calibrate_(model, pixels.split(100)).eval()
        file = self.kept / f"{choice.name}.safetensors"
        model = reprogram_(self.plain(), NRPMConfig(lam=1.0))
        if not file.exists():
            names = tuple(name for layer in choice.layers for name in self.owned[layer])
            config = TuneConfig(
                paradigm="all", trainable=names, eps=THREAT.eps, steps=STEPS, step_size=THREAT.eps / 2, epochs=EPOCHS,
                optimizer="momentum", lr=LR,
            )  # fmt: skip
            images = self.lab.loader("cifar10", "train", training=True, batch_size=BATCH, samples=SAMPLES)
            tune(model.to(self.lab.device), images, config)
            save_file(model.state_dict(), file)
        model.load_state_dict(load_file(file, device=self.lab.device))
        return restore_(model).eval()

    def measured(self, choice: Choice, suite: str, *, on_report: bool) -> dict[str, str]:
        """The images that a choice is right on, clean and under a suite, as digits."""
        file = self.kept / f"{choice.name}-{suite}-{'report' if on_report else 'selection'}.json"
        if not file.exists():
            found = evaluate(
                self.model(choice), self.report if on_report else self.selection, THREAT, suite,
                effort="fast" if suite == "adaptive" else "default", control=False, seed=int(on_report),
            )  # fmt: skip
            file.write_text(json.dumps({"clean": digits_of(found.correct), "attacked": digits_of(found.survivors)}))
        return json.loads(file.read_text())


def share(digits: str) -> float:
    """Share of the images in %."""
    return 100 * digits.count("1") / len(digits)


def best_of(front: Front, choices: Sequence[Choice]) -> dict[str, Choice]:
    """The choice of each kind that PGD leaves most of, on the images that are chosen on; of equals the smaller."""
    kinds: dict[str, Choice] = {}
    for choice in choices:
        key = f"{choice.how}, {choice.kind}"
        kept = share(front.measured(choice, "quick", on_report=False)["attacked"])
        if key not in kinds or kept > share(front.measured(kinds[key], "quick", on_report=False)["attacked"]):
            kinds[key] = choice
    return kinds


def page(front: Front, choices: Sequence[Choice], judged: Mapping[str, Choice]) -> str:
    """The page of the results."""
    counted = products(front.plain(), torch.zeros(1, 3, 32, 32))
    total = sum(counted.values())
    lines = [
        "# Which layers are worth tuning, and which reprogramming", "",
        f"A narrow ResNet-18, trained on clean images of CIFAR-10, {THREAT}. Each choice is tuned for {EPOCHS} epochs "
        f"of {SAMPLES} images in batches of {BATCH}, attacked by {STEPS} steps, at a learning rate of {LR:g}: as many "
        "passes. A layer is tuned with the normalisation after it; the most critical layers are those whose weights, "
        "moved by a tenth of their norm, raise the loss on attacked images most. Reprogrammed layers have lambda 0 in "
        "standard units with eps 1, and are not tuned.", "",
        f"The best of each kind under PGD on {CHOSEN_ON} images, judged on {JUDGED_ON} others by the adaptive suite "
        "with the least effort, in %:", "",
        "| choice | layers | share of the products | clean | worst case | worst case less that of all layers tuned |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    against = front.measured(judged[f"{TUNED}, all"], "adaptive", on_report=True)["attacked"]
    for name, choice in judged.items():
        found = front.measured(choice, "adaptive", on_report=True)
        cost = sum(counted[layer] for layer in choice.layers) / total
        lines.append(
            f"| {name} | {len(choice.layers)} | {100 * cost:.0f} % | {share(found['clean']):.1f} | "
            f"{share(found['attacked']):.1f} | {Effect.of(found['attacked'], against)} |"
        )
    lines += ["", "![what PGD leaves, by the number of layers](layers-front.png)", ""]
    ordered = [layer for layer in front.layers if layer in judged[f"{TUNED}, critical"].layers]
    lines += [f"The most critical layers of the best choice: {', '.join(f'`{name}`' for name in ordered)}.", ""]
    lines += [f"All choices under PGD, on the {CHOSEN_ON} images that are chosen on, clean and attacked, in %:", ""]
    lines += ["| layers | " + " | ".join(KINDS) + " | first, reprogrammed | last, reprogrammed |", "|---" * 6 + "|"]
    by_name = {choice.name: choice for choice in choices}
    for number in TUNED_COUNTS:
        cells = []
        for how, kind in [(TUNED, kind) for kind in KINDS] + [(MIXED, kind) for kind in KINDS[:2]]:
            name = f"{how}-{kind}-{number}"
            cell = ""
            if name in by_name:
                found = front.measured(by_name[name], "quick", on_report=False)
                cell = f"{share(found['clean']):.1f}, {share(found['attacked']):.1f}"
            cells.append(cell)
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(front: Front, choices: Sequence[Choice], path: Path) -> None:
    """What PGD leaves of the images that are chosen on, by the number of layers."""
    figure = canvas.figure(9, 4.4)
    panels: Any = figure.subplots(1, 2, sharey=True)
    ends = {choice.name: choice for choice in choices if choice.kind in ("all", "plain")}
    for panel, how in zip(panels, (TUNED, MIXED), strict=True):
        for kind, (colour, marker, line) in zip(KINDS, canvas.STYLES, strict=False):
            some = [choice for choice in choices if (choice.how, choice.kind) == (how, kind)]
            if some:
                at = [len(choice.layers) for choice in some]
                kept = [share(front.measured(choice, "quick", on_report=False)["attacked"]) for choice in some]
                panel.plot(at, kept, color=colour, marker=marker, linestyle=line, markersize=4, label=f"{kind} layers")
        for style, name in ((":", f"{TUNED}-plain-0"), ("-", f"{how}-all-{len(front.layers)}")):
            level = share(front.measured(ends[name], "quick", on_report=False)["attacked"])
            label = "the network as it is" if "plain" in name else f"all layers {how}"
            panel.axhline(level, color="black", linewidth=1, linestyle=style, label=label)
        panel.set_title(how, fontsize=10, loc="left")
        panel.set_xlabel(f"layers {how}")
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy under PGD in %")
    panels[0].set_ylim(bottom=0)
    figure.savefig(canvas.target(path), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--kept", type=Path, required=True, help="folder of tuned networks and results")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every Nth choice from I")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page from what is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    front = Front(Lab("quick", args.data, args.data, args.kept / "models"), args.kept / "choices")
    choices = front.choices()
    mine = choices[args.part[0] :: args.part[1]]
    with progress_bar(not args.page, counted=True) as bar:
        task = bar.add_task("Choices", total=len(mine))
        for choice in () if args.page else mine:
            bar.update(task, description=choice.name)
            front.measured(choice, "quick", on_report=False)
            bar.update(task, advance=1)
        if args.part[1] > 1 and not args.page:
            return
        judged = best_of(front, choices)
        task = bar.add_task("The best of each kind", total=len(judged))
        for name, choice in judged.items():
            bar.update(task, description=name)
            front.measured(choice, "adaptive", on_report=True)
            bar.update(task, advance=1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {choice.name: front.measured(choice, "quick", on_report=False) for choice in choices}
    best = {
        name: {"choice": each.name, "layers": each.layers, **front.measured(each, "adaptive", on_report=True)}
        for name, each in judged.items()
    }
    (args.out / "layers-front.json").write_text(json.dumps({"selection": rows, "report": best}, indent=1) + "\n")
    (args.out / "layers-front.md").write_text(page(front, choices, judged))
    draw(front, choices, args.out / "layers-front.png")


if __name__ == "__main__":
    main()
