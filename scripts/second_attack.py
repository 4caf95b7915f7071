"""Test the worst case of the suite `adaptive` with a second attack, which shares no code with it, on the images that
survive the suite.

    OMP_NUM_THREADS=1 python scripts/second_attack.py --shared SHARED    # on one core: half an hour, and six suites

SHARED holds the authors' checkpoints/ and data/; without it only the bundled model is attacked. Everything here is
plain torch: normalisation, losses, ascent, projection and the test of success. The attack is a random search over
attacks. Each round draws surrogates of the target, a loss, a number of steps and a start; settings that worked are
drawn more often. Writes results/second-attack.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import timm_nrpm
from timm_nrpm import (
    NRPMConfig,
    RobustnessReport,
    Threat,
    calibrate_,
    create_model,
    evaluate,
    lambdas,
    plain_copy,
    reprogram_,
)
from timm_nrpm.data.loaders import digits, pixel_loader
from timm_nrpm.models.backbones import load_published_

RESULTS = Path(__file__).parents[1] / "results"
CALIBRATION = 1000
LOOK = 4
"""Number of steps of an ascent between two evaluations of the target."""


# --- what is attacked -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and the images on which it is attacked.

    Attributes:
        backbone: `"digits"`, the bundled ResNet-8, or `"resnet18"`, the published narrow one (CIFAR-10).
        config: The reprogramming; a lambda of 1 is the control.
        eps: Largest change of a pixel, Linf, in pixel units of [0, 1].
        images: Number of test images.
    """

    backbone: str
    config: NRPMConfig
    eps: float
    images: int

    def __str__(self) -> str:
        return f"{self.backbone}-{self.config.lam:g}"


def _digits(lam: float, eps: float) -> Case:
    return Case("digits", NRPMConfig(lam=lam, iterations=3, eps=eps), 0.15, 180)


def _resnet18(lam: float) -> Case:
    return Case("resnet18", NRPMConfig(lam=lam, iterations=1, eps=5e-4, layers=("layer*.conv*",)), 8 / 255, 60)


CASES = (
    _digits(0.4, 1e-3),
    _resnet18(0.5),
    _digits(0.8, 1e-2),
    _resnet18(0.9),
    _digits(1.0, 1e-3),
    _resnet18(1.0),
)


@dataclass
class Subject:
    """The model and the images of a case.

    Attributes:
        model: The reprogrammed and calibrated model, in evaluation mode.
        pixels, labels: The test images `[B, C, H, W]` in [0, 1], and their classes `[B]`.
        calibration: Batches of training images, with which surrogates are calibrated as the model was.
    """

    model: nn.Module
    pixels: Tensor
    labels: Tensor
    calibration: list[Tensor]


def subject_of(case: Case, shared: Path | None) -> Subject:
    """Build the model of a case and load its images."""
    if case.backbone == "digits":
        model = create_model("resnet8_digits", pretrained=True, lam=1.0)
        train, test = digits("train"), digits("test")
    else:
        assert shared is not None
        weights = shared / "checkpoints" / "tinyresnet18_cifar10_model.t7"
        model = load_published_(timm.create_model("resnet18_cifar_narrow"), weights)
        train = _every(50, model, shared, "train", CALIBRATION)
        test = _every(160, model, shared, "test", case.images)  # every eighth image of reproduce/worst_case.py
    calibration = list(train[0][:CALIBRATION].split(250))
    reprogram_(model.eval(), case.config)
    calibrate_(model, calibration)
    return Subject(model, test[0][: case.images], test[1][: case.images], calibration)


def _every(distance: int, model: nn.Module, shared: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` images and labels of CIFAR-10, every `distance`-th of the split: its tar is ordered by class."""
    dataset: Any = pixel_loader("tar", shared / "data" / "cifar10-jpeg", split=split, model=model).dataset
    pixels, labels = zip(*(dataset[distance * i] for i in range(count)), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


class Pixels(nn.Module):
    """A classifier of pixels in [0, 1] that counts the images that go forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        data = timm.data.resolve_model_data_config(model)
        self.mean, self.std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.model = model.eval().requires_grad_(False)
        self.forwards, self.backwards = 0, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.forwards += len(pixels)
        self.backwards += len(pixels) if pixels.requires_grad else 0
        logits: Tensor = self.model((pixels - self.mean) / self.std)
        return logits


class Bank:
    """The target and its surrogates by name, each built at its first use.

    A surrogate is the target with another lambda, a larger eps of the estimator or fewer iterations, so that its
    gradient is smoother. It is calibrated on the same images as the target.
    """

    def __init__(self, model: nn.Module, config: NRPMConfig, calibration: list[Tensor]) -> None:
        self.target, self.calibration = Pixels(model), calibration
        self.made: dict[str, Pixels] = {"own": self.target, "linear": self.target}
        self.configs = surrogates_of(lambdas(model), config)
        self.names = [*self.made, *self.configs]

    def __getitem__(self, name: str) -> Pixels:
        if name not in self.made:
            plain = plain_copy(self.target.model)
            config = self.configs[name]
            model = plain if config is None else calibrate_(reprogram_(plain, config), self.calibration)
            self.made[name] = Pixels(model)
        return self.made[name]

    def logits(self, name: str, pixels: Tensor) -> Tensor:
        """Return the logits `[B, classes]` of one model; the gradient of `"linear"` is that of the linear maps."""
        net = self[name]
        for layer in net.modules():
            if hasattr(layer, "linear_backward"):
                vars(layer)["linear_backward"] = name == "linear"
        return net(pixels)

    def passes(self) -> tuple[int, int]:
        """Return the numbers of images that went forwards and backwards through all models."""
        nets = {id(net): net for net in self.made.values()}.values()
        return sum(net.forwards for net in nets), sum(net.backwards for net in nets)


def surrogates_of(lams: dict[str, float], config: NRPMConfig) -> dict[str, NRPMConfig | None]:
    """Return the config of every surrogate by name; None is the plain model, the only surrogate of a plain target."""
    configs: dict[str, NRPMConfig | None] = {"plain": None}
    mixes = {"same": lams, "halfway": {k: (1 + v) / 2 for k, v in lams.items()}, "0.9": dict.fromkeys(lams, 0.9)}
    mixes = {name: mix for name, mix in mixes.items() if any(v < 1 for v in lams.values())}
    for name, mix in mixes.items():
        if name != "same" and mix == lams:
            continue
        for factor in (10, 100, 1000):
            for iterations in sorted({config.iterations, min(1, config.iterations)}, reverse=True):
                surrogate = replace(config, lam=mix, layers=tuple(lams), eps=factor * config.eps, iterations=iterations)
                configs[f"lam {name}, eps x{factor}, K={iterations}"] = surrogate
    return configs


# --- what counts as success -----------------------------------------------------------------------------------------


def within(pixels: Tensor, moved: Tensor, eps: float) -> Tensor:
    """Project `moved` to within eps of `pixels` and [0, 1], less a rounding error, so that no sum exceeds the bound."""
    radius = eps - 2**-23
    return torch.minimum(torch.maximum(moved, pixels - radius), pixels + radius).clamp(0, 1)


@torch.no_grad()
def broken(target: nn.Module, pixels: Tensor, attacked: Tensor, label: int, eps: float) -> bool:
    """Whether an attacked image `[C, H, W]` is a valid float32 image that the target itself misclassifies."""
    logits = target(attacked.unsqueeze(0))[0]
    near = (attacked.double() - pixels.double()).abs().max() <= eps * (1 + 1e-6)
    image = attacked.dtype == torch.float32 and bool(((attacked >= 0) & (attacked <= 1)).all())
    return bool(image and near and logits.isfinite().all() and logits.argmax() != label)


# --- losses of each image, [B], which an attack raises --------------------------------------------------------------


def _other(values: Tensor, labels: Tensor) -> Tensor:
    return values.scatter(1, labels.unsqueeze(1), -math.inf).amax(1)


def _of(values: Tensor, classes: Tensor) -> Tensor:
    return values.gather(1, classes.unsqueeze(1)).squeeze(1)


def margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return _other(logits, labels) - _of(logits, labels)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return _of(logits, targets) - _of(logits, labels)


def ratio(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The margin divided by the distance between the first and the third logit (arXiv 2003.01690, eq. 6)."""
    top = logits.topk(3, 1).values
    return margin(logits, labels, targets) / (top[:, 0] - top[:, 2] + 1e-9)


def probabilities(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    return margin(logits.softmax(1), labels, targets)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "margin": margin,
    "cross-entropy": cross_entropy,
    "targeted margin": targeted,
    "ratio": ratio,
    "probabilities": probabilities,
}


# --- the attack -----------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
STARTS = ("best", "corners", "ball")
AXES: dict[str, tuple[Any, ...]] = {
    "way": ("ascent", "pixels", "squares", "stripes"),
    "ascent from": STARTS,
    "search from": STARTS,
    "surrogates": (1, 2, 3, 4),
    "loss": tuple(LOSSES),
    "steps": (10, 20, 40, 70, 100),
    "size": (0.02, 0.05, 0.12, 0.3, 0.7),
    "schedule": tuple(SCHEDULES),
    "momentum": (0.0, 0.5, 0.8, 1.0),
}


@dataclass(frozen=True)
class Settings:
    """The settings of one round.

    Attributes:
        way: `"ascent"`, or the shape that a random search changes: `"pixels"`, `"squares"` or `"stripes"`.
        start: Where the round begins: at random within eps (`"ball"`, `"corners"`), or at each image's point with the
            largest margin of the target so far (`"best"`).
        steps: Number of steps of an ascent; a search makes four times as many queries.
        follow: Names of the models in the bank whose losses are summed; empty for a search.
        loss: Name of the loss, from `LOSSES`.
        size: Size of the first step as a share of eps.
        schedule: Name of the schedule of the step size, from `SCHEDULES`.
        momentum: Factor of the earlier direction at every step.
    """

    way: str
    start: str
    steps: int
    follow: tuple[str, ...] = ()
    loss: str = ""
    size: float = 0.0
    schedule: str = ""
    momentum: float = 0.0

    def options(self) -> Iterator[tuple[str, Any]]:
        """Yield every option that was drawn, with its axis in the bandit."""
        yield "way", self.way
        yield "steps", self.steps
        yield ("ascent from" if self.follow else "search from"), self.start
        if self.follow:
            yield "surrogates", len(self.follow)
            yield from (("follow", name) for name in self.follow)
            yield from ((key, getattr(self, key)) for key in ("loss", "schedule", "momentum"))
            yield "size", min(AXES["size"], key=lambda size: abs(math.log(size / self.size)))


class Bandit:
    """Draws settings; those that broke more images per pass are drawn more often."""

    def __init__(self, follow: list[str], seed: int) -> None:
        self.axes, self.random = {**AXES, "follow": tuple(follow)}, random.Random(seed)
        self.gains: dict[tuple[str, Any], float] = {}
        self.costs: dict[tuple[str, Any], float] = {}
        self.rounds, self.cost = 0, 0.0

    def draw(self, axis: str, count: int = 1) -> list[Any]:
        """Draw `count` different options of an axis, or all of them if there are fewer."""
        usual = 3 * self.cost / max(self.rounds, 1) + 1  # prior: each has broken one image in three average rounds
        left, drawn = list(self.axes[axis]), []
        for _ in range(min(count, len(left))):
            keys = [(axis, option) for option in left]
            weights = [(1 + self.gains.get(key, 0.0)) / (usual + self.costs.get(key, 0.0)) for key in keys]
            drawn += self.random.choices(left, weights)
            left.remove(drawn[-1])
        return drawn

    def settings(self) -> Settings:
        """Draw the settings of a round."""
        (way,), (steps,) = self.draw("way"), self.draw("steps")
        if way != "ascent":
            return Settings(way, self.draw("search from")[0], steps)
        axes = ("ascent from", "surrogates", "loss", "size", "schedule", "momentum")
        single = {axis: self.draw(axis)[0] for axis in axes}
        return Settings(
            way,
            single["ascent from"],
            steps,
            follow=tuple(self.draw("follow", single["surrogates"])),
            loss=single["loss"],
            size=min(1.0, max(0.02, single["size"] * math.exp(self.random.uniform(-0.45, 0.45)))),
            schedule=single["schedule"],
            momentum=single["momentum"],
        )

    def learn(self, used: Settings, gain: float, cost: float) -> None:
        """Count the images that a round broke and the passes that it took."""
        for key in used.options():
            self.gains[key] = self.gains.get(key, 0.0) + gain
            self.costs[key] = self.costs.get(key, 0.0) + cost
        self.rounds += 1
        self.cost += cost


@dataclass(frozen=True)
class Hit:
    """An attacked image that the target gets wrong.

    Attributes:
        attacked: The attacked image `[C, H, W]`.
        round: Number of the round that found it.
        settings: Settings of that round.
    """

    attacked: Tensor = field(repr=False)
    round: int
    settings: Settings


class SecondAttack:
    """A random search over attacks on images that the target gets right.

    Args:
        bank: The target and its surrogates.
        pixels, labels: The images `[B, C, H, W]` and their classes `[B]`.
        eps: Largest change of a pixel, Linf, in pixel units.
        seed: Seed of everything random; a longer run begins with the rounds of a shorter one.

    Attributes:
        hits: Successful attacked images by the number of the image.
    """

    def __init__(self, bank: Bank, pixels: Tensor, labels: Tensor, eps: float, seed: int = 0) -> None:
        self.bank, self.pixels, self.labels, self.eps = bank, pixels, labels, eps
        self.bandit, self.noise = Bandit(bank.names, seed), torch.Generator().manual_seed(seed)
        self.best, self.margins = pixels.clone(), torch.full((len(pixels),), -math.inf)
        self.hits: dict[int, Hit] = {}
        with torch.no_grad():
            self.likely = bank.target(pixels).scatter(1, labels.unsqueeze(1), -math.inf).topk(3, 1).indices  # [B, 3]
        self.over: Callable[[], bool] = lambda: False

    def run(self, over: Callable[[], bool]) -> None:
        """Run rounds until `over` returns true or every image is broken."""
        self.over = over
        while not over() and len(self.hits) < len(self.pixels):
            settings, before, cost = self.bandit.settings(), len(self.hits), sum(self.bank.passes())
            rows = torch.tensor([row for row in range(len(self.pixels)) if row not in self.hits])
            moved = self._start(settings.start, rows)
            (self._ascend if settings.follow else self._search)(settings, rows, moved)
            self.bandit.learn(settings, len(self.hits) - before, sum(self.bank.passes()) - cost)

    def _look(self, settings: Settings, rows: Tensor, moved: Tensor) -> Tensor:
        """Return the target's margins `[B]` at these points; keep successful points and each image's best one."""
        with torch.no_grad():
            margins = margin(self.bank.logits("own", moved), self.labels[rows], self.labels[rows])
        for i in (margins >= 0).nonzero().flatten().tolist():
            row = int(rows[i])
            if row not in self.hits and broken(
                self.bank.target, self.pixels[row], moved[i], int(self.labels[row]), self.eps
            ):
                self.hits[row] = Hit(moved[i].clone(), self.bandit.rounds, settings)
        better = margins > self.margins[rows]
        self.best[rows[better]], self.margins[rows[better]] = moved[better], margins[better]
        return margins

    def _start(self, start: str, rows: Tensor) -> Tensor:
        """Return the points `[B, C, H, W]` at which a round begins."""
        if start == "best":
            return self.best[rows]
        change = 2 * torch.rand(self.pixels[rows].shape, generator=self.noise) - 1
        change = change.sign() if start == "corners" else change
        return within(self.pixels[rows], self.pixels[rows] + self.eps * change, self.eps)

    def _ascend(self, settings: Settings, rows: Tensor, moved: Tensor) -> None:
        """Take signed steps along the gradient of the summed losses of the models in `settings.follow`."""
        pixels, labels, loss = self.pixels[rows], self.labels[rows], LOSSES[settings.loss]
        ranks = torch.randint(self.likely.shape[1], (len(rows), 1), generator=self.noise)
        targets = self.likely[rows].gather(1, ranks).squeeze(1)
        inertia = torch.zeros_like(moved)
        for step in range(settings.steps):
            moved = moved.detach().requires_grad_()
            sums = torch.stack([loss(self.bank.logits(name, moved), labels, targets) for name in settings.follow])
            gradient = torch.autograd.grad(sums.sum(), moved)[0].nan_to_num(0.0, 0.0, 0.0)
            length = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-20)
            inertia = settings.momentum * inertia + gradient / length
            size = settings.size * self.eps * SCHEDULES[settings.schedule](step / settings.steps)
            moved = within(pixels, moved.detach() + size * inertia.sign(), self.eps)
            if step % LOOK == LOOK - 1 or step == settings.steps - 1:
                self._look(settings, rows, moved)
                if self.over():
                    return

    def _search(self, settings: Settings, rows: Tensor, moved: Tensor) -> None:
        """Set random regions to plus or minus eps; keep a change where the target's margin does not fall."""
        pixels, margins = self.pixels[rows], self._look(settings, rows, moved)
        for _ in range(4 * settings.steps):
            change = self._region(settings.way, pixels)
            tried = torch.where(change == 0, moved, within(pixels, pixels + self.eps * change, self.eps))
            reached = self._look(settings, rows, tried)
            kept = reached >= margins
            moved, margins = torch.where(kept.view(-1, 1, 1, 1), tried, moved), torch.where(kept, reached, margins)
            if self.over():
                return

    def _region(self, shape: str, like: Tensor) -> Tensor:
        """Return a random rectangle for each image: a sign in each of its channels and 0 around it, `[B, C, H, W]`."""
        count, channels, height, width = like.shape
        high = wide = torch.ones(count, 1, 1, 1)
        if shape == "squares":
            high = wide = torch.randint(1, max(height // 2, 1) + 1, (count, 1, 1, 1), generator=self.noise)
        if shape == "stripes":
            high, wide = torch.full((count, 1, 1, 1), height), torch.ones(count, 1, 1, 1)
        corner = torch.rand(2, count, 1, 1, 1, generator=self.noise)
        top, left = (corner[0] * (height - high + 1)).floor(), (corner[1] * (width - wide + 1)).floor()
        y, x = torch.arange(height).view(-1, 1), torch.arange(width)
        inside = (y >= top) & (y < top + high) & (x >= left) & (x < left + wide)  # [B, 1, H, W]
        return inside * (2.0 * torch.randint(2, (count, channels, 1, 1), generator=self.noise) - 1)


# --- the results ----------------------------------------------------------------------------------------------------


def suite_of(case: Case, subject: Subject, file: Path | None) -> RobustnessReport:
    """Return the library's report, newly measured or read from a file."""
    threat = Threat("Linf", case.eps)
    if file is None:
        print(f"{case}: running the suite")
        return evaluate(subject.model, [(subject.pixels, subject.labels)], threat, control=False, progress=True)
    report = RobustnessReport.from_json(file.read_text())
    if report.threat != threat or report.samples != len(subject.labels):
        raise SystemExit(
            f"{file} reports {report.samples} images under {report.threat}, and {case} has {len(subject.labels)} under "
            f"{threat}: give the report of that case, or leave out --report to have it measured."
        )
    return report


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Attack one case and return its row of the table."""
    subject = subject_of(case, args.shared)
    report = suite_of(case, subject, args.report)
    rows = torch.tensor(report.survivors).nonzero().flatten()
    with torch.no_grad():
        right = Pixels(subject.model)(subject.pixels[rows]).argmax(1) == subject.labels[rows]
    if not right.all():
        raise SystemExit(
            f"{case}: the model misclassifies clean images that the report counts as right, so it is of other images: "
            "give the report of this case, or leave out --report to have it measured."
        )
    attack = SecondAttack(
        Bank(subject.model, case.config, subject.calibration),
        subject.pixels[rows],
        subject.labels[rows],
        case.eps,
        args.seed,
    )
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=args.seconds)

        def over() -> bool:
            spent, text = time.perf_counter() - start, f"{case}: {len(attack.hits)} of {len(rows)} broken"
            bar.update(task, completed=min(spent, args.seconds), description=text)
            return spent >= args.seconds

        attack.run(over)
    left = (len(rows) - len(attack.hits)) / report.samples
    return {
        "backbone": case.backbone,
        "lambda": case.config.lam,
        "iterations": case.config.iterations,
        "estimator_eps": case.config.eps,
        "eps": case.eps,
        "images": report.samples,
        "suite": {
            "worst_case": report.worst_case,
            "survivors": len(rows),
            "passes": sum(a.forwards + a.backwards for a in report.attacks),
            "seconds": report.seconds,
        },
        "second": {
            "worst_case": left,
            "broken": len(attack.hits),
            "passes": sum(attack.bank.passes()),
            "seconds": time.perf_counter() - start,
            "rounds": attack.bandit.rounds,
            "seed": args.seed,
        },
        "points": 100 * (left - report.worst_case),
        "hits": [{"image": int(rows[i]), "round": hit.round, **asdict(hit.settings)} for i, hit in attack.hits.items()],
        "versions": {"timm_nrpm": timm_nrpm.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }


def counted(row: dict[str, Any]) -> str:
    """Describe which settings broke images, and how many."""
    counts: dict[str, int] = {}
    for hit in row["hits"]:
        way = f"{hit['way']} from {hit['start']}" + (f" ({hit['loss']})" if hit["follow"] else "")
        counts[way] = counts.get(way, 0) + 1
    return ", ".join(f"{way} {count}" for way, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# A second attack on what the suite `adaptive` left",
        "",
        "`scripts/second_attack.py`, which shares no code with the suite: a random search over surrogates, losses, "
        "steps and starts, on the images that the suite left. Worst cases in %; a pass is one image that goes through "
        "a model forwards or backwards. Lambda 1 is the plain model, the control.",
        "",
        "| model | lambda | images | suite's worst case | passes | seconds | after the second attack | points | passes "
        "| seconds | rounds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        suite, second = row["suite"], row["second"]
        cells = [
            *(row["backbone"], f"{row['lambda']:g}", row["images"]),
            *(f"{100 * suite['worst_case']:.1f}", suite["passes"], f"{suite['seconds']:.0f}"),
            *(f"**{100 * second['worst_case']:.1f}**", f"{row['points']:.1f}"),
            *(second["passes"], f"{second['seconds']:.0f}", second["rounds"]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    causes = [f"- {name}: {counted(row)}." for name, row in rows.items() if row["hits"]]
    return "\n".join([*lines, *(["", "What broke images:", "", *causes] if causes else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--shared", type=Path, help="folder with checkpoints/ and data/; without it only the digits")
    parser.add_argument("--only", default="", help=f"attack this case alone: {', '.join(map(str, CASES))}")
    parser.add_argument("--seconds", type=float, default=240, help="seconds of each attack (default: 240)")
    parser.add_argument("--report", type=Path, help="the suite's RobustnessReport of the case given as --only, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="seed of the attack (default: 0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the table")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in ("", str(case)) and (args.shared or case.backbone == "digits")]
    if not cases or (args.report and not args.only):
        parser.error(f"give --only one of {', '.join(map(str, CASES))}, with --shared for those of resnet18.")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds:g} is not allowed: give a number of seconds above 0.")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "second-attack.json"
    for case in cases:
        row = measure(case, args)
        rows = json.loads(file.read_text()) if file.exists() else {}
        rows = {str(c): {**rows, str(case): row}[str(c)] for c in CASES if str(c) in {*rows, str(case)}}
        file.write_text(json.dumps(rows, indent=1) + "\n")
        text = markdown(rows)
        (args.out / "second-attack.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
