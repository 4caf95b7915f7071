"""Algorithm 1 of the second paper: is a robust early part enough for the rest to become robust cheaply?
(arXiv 2307.03803, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from timm_nrpm.attacks.efforts import EFFORTS
from timm_nrpm.attacks.library import Run
from timm_nrpm.attacks.suites import attacks_of
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_integer, check_number
from timm_nrpm.config import TuneConfig
from timm_nrpm.evaluation.subnetwork_report import (
    COMPOSED,
    NATURAL,
    ROBUST,
    TUNED,
    SubnetworkReport,
    SubnetworkTrial,
)
from timm_nrpm.jobs.journal import digest_of
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.subnetworks.attacked import attacked, gradient_attacks
from timm_nrpm.subnetworks.connectivity import connectivity, smallest_class
from timm_nrpm.subnetworks.networks import Batches, Networks, State
from timm_nrpm.subnetworks.splitting import Split, split
from timm_nrpm.tuning.setup import settings_of
from timm_nrpm.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

LATE_LR = 0.001
"""Learning rate of the late part, as in the paper."""

SUITES = ("quick", "standard", "adaptive")
"""Suites of attacks on the report images."""


def semirobust(
    model: nn.Module,
    training: DataLoader[Any],
    selection: Iterable[Any],
    report: Iterable[Any],
    late: int,
    *,
    robust: nn.Module | None = None,
    natural_epochs: int = 0,
    config: TuneConfig | None = None,
    trials: int = 3,
    epochs: int = 10,
    tolerance: float = 0.01,
    suites: tuple[str, ...] = SUITES,
    folder: str | Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> SubnetworkReport:
    """Make a network robust, give its late part the natural weights back, and tune that part alone behind the robust
    early one, which stays as it is (Algorithm 1).

    A trial ends once the network is within `tolerance` of the robust one under PGD on the selection images, where the
    paper looks at test images. The report images are looked at only at the end.

    Args:
        model: The network; of a reprogrammed one, the plain model. It is not changed.
        training: A DataLoader of training images and labels. Connectivity is measured on some of them, drawn at random,
            1000 for each class on average, which have to be 100 or more of every class.
        selection: Batches of other images and labels, on which trials end and the best is chosen.
        report: Batches of further images and labels, on which the four networks are compared.
        late: Number of layers of the late part, see :func:`timm_nrpm.splitting.split`.
        robust: The robust network F*, with the same architecture; None to train it from F by `config`.
        natural_epochs: Number of epochs of training on clean images that make F; 0 where `model` is F.
        config: Settings of adversarial training; the default is `TuneConfig(paradigm="all", steps=10)`. Its `epochs`
            and `lr` are those of F*; the late part has a learning rate of 0.001, as in the paper. Its bound and its
            `evaluate_steps` are also those of PGD on the selection images.
        trials: Number of late parts that are tuned.
        epochs: Largest number of epochs of each.
        tolerance: Largest share of the selection images that a network may be worse by than F*, and count as converged.
        suites: Suites of attacks on the report images: `"quick"` is FGSM and PGD, `"standard"` AutoAttack, and
            `"adaptive"` the worst case.
        folder: Folder of weights and results, from which the same call goes on after an interruption; None keeps none.
        mean, std: Normalisation of the model, as for :func:`timm_nrpm.evaluate`.
        accelerator: Accelerator whose processes share training and attacks, as for :func:`timm_nrpm.evaluate`; they
            need a folder that all of them can read and write.
        progress: Whether to show a progress bar.

    Returns:
        What was found, with all trials.

    Raises:
        ValueError: A setting is outside its range or has no place here, the split leaves one part empty, a class has
            too few training images, `robust` has other weights than `model`, or `folder` holds another run.

    Example:
        >>> model = timm_nrpm.create_model("resnet8_digits", pretrained=True)
        >>> images = timm_nrpm.data.pixel_loader("digits", training=True)
        >>> config = TuneConfig(paradigm="all", eps=0.1, epochs=1, steps=1)
        >>> result = semirobust(model, images, loader, loader, 2, config=config, trials=1, epochs=1, suites=("quick",))
        >>> print(result.verdict)
        With the first 6 of 8 layers robust and kept, ...
    """
    settings = Settings(
        TuneConfig(paradigm="all", steps=10) if config is None else config,
        check_integer("trials", trials, least=1),
        check_integer("epochs", epochs, least=1),
        check_integer("natural_epochs", natural_epochs, least=0),
        check_number("tolerance", tolerance, least=0, most=1, why=", a share of the images"),
    )
    threat = Threat(settings.config.norm, settings.config.validation_eps)
    _check(settings.config, suites, threat)
    if folder is None and accelerator is not None and accelerator.num_processes > 1:
        raise ValueError("folder=None, and several processes share the work by way of a folder: give one.")
    progress = progress and (accelerator is None or accelerator.is_main_process)
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory())) if folder is None else Path(folder)
        networks = Networks(model, training, threat, place, settings.config.seed, mean, std, accelerator)
        parts = split(networks.plain, late, example=networks.example)
        given = None if robust is None else networks.state_of(robust)
        held = networks.checked(report)
        run = _Run(networks, parts, settings, training, networks.checked(selection), given)
        natural = run.natural(progress)
        star = run.robust(natural, progress)
        bar = stack.enter_context(progress_bar(progress, counted=True))
        task = bar.add_task("Trials", total=settings.trials * (settings.epochs + 1) + 4 * len(suites))
        found = []
        for number in range(settings.trials):
            for trial in run.trial(natural, star, number):
                bar.update(task, advance=1, description=f"Trial {number + 1}, {trial.epochs} epochs")
            found.append(trial)
            bar.update(task, completed=(number + 1) * (settings.epochs + 1))
        return run.report(
            natural, star, found, held, suites, lambda words: bar.update(task, advance=1, description=words)
        )


def _check(config: TuneConfig, suites: tuple[str, ...], threat: Threat) -> None:
    """Raise a ValueError for settings that Algorithm 1 has no use for, before anything is trained."""
    if not suites or set(suites) - set(SUITES):
        raise ValueError(f"suites={suites!r} is not allowed: give one or more of {', '.join(SUITES)}.")
    for suite in suites:
        attacks_of(suite, threat, EFFORTS[suite], ("own",), 2)
    for name in ("trainable", "still", "push_to"):
        if getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)!r} has no place here: Algorithm 1 says what trains.")
    if config.objective == "teacher":
        raise ValueError("objective='teacher' has no teacher here: give another objective.")
    if config.objective == "sat":
        raise ValueError(
            "objective='sat' keeps targets over epochs, and late parts are tuned one by one: give another."
        )


@dataclass(frozen=True)
class Settings:
    """Checked settings of a run, as in :func:`semirobust`."""

    config: TuneConfig
    trials: int
    epochs: int
    natural_epochs: int
    tolerance: float


class _Run:
    """The networks of Algorithm 1, from weights and images."""

    def __init__(
        self,
        networks: Networks,
        parts: Split,
        settings: Settings,
        training: DataLoader[Any],
        selection: Batches,
        given: State | None,
    ) -> None:
        self.networks, self.parts, self.settings = networks, parts, settings
        self.training, self.selection = training, selection
        self.given = given
        self.images = networks.some_training(training)
        self.measured = smallest_class(torch.cat([labels for _, labels in self.images]), networks.classes)
        self.count = sum(len(labels) for _, labels in selection)
        identity = {
            **networks.identity, "robust": given and weights_sha256(given), "late": list(parts.late),
            **{f"config's {name}": value for name, value in settings_of(settings.config).items()},
            "natural_epochs": settings.natural_epochs, "epochs": settings.epochs, "tolerance": settings.tolerance,
            "training images": len(training.dataset), "batch_size": training.batch_size,  # type: ignore[arg-type]
            "selection": digest_of(*(torch.cat(part) for part in zip(*selection, strict=True))),
            "version": __version__,
        }  # fmt: skip
        self.journal = networks.journal("trials.jsonl", identity)
        self.dependence = networks.journal("connectivity.jsonl", identity)
        self.target = 0.0

    def natural(self, progress: bool) -> State:
        """F, which is trained first if that was asked for."""
        s = self.settings
        if not s.natural_epochs:
            return self.networks.state
        config = self._of(replace(s.config, objective="clean", epochs=s.natural_epochs), self._every())
        return self.networks.tuned(self.networks.state, self.training, config, "natural", progress=progress)

    def robust(self, natural: State, progress: bool) -> State:
        """F*, which is trained if it was not given."""
        star = self.given
        if star is None:
            config = self._of(self.settings.config, self._every())
            star = self.networks.tuned(natural, self.training, config, "robust", progress=progress)
        if 0 not in self.journal.rows:
            self.journal.add(0, {"own": self._own(star)})
        self.target = self.journal.rows[0]["own"]
        return star

    def _every(self) -> tuple[str, ...]:
        """Names of all weights."""
        return tuple(name for name, _ in self.networks.plain.named_parameters())

    def _of(self, config: TuneConfig, trainable: tuple[str, ...]) -> TuneConfig:
        """Settings under which these weights train."""
        return replace(config, paradigm="all", trainable=trainable, output=None)

    def trial(self, natural: State, star: State, number: int) -> Iterator[SubnetworkTrial]:
        """Tune a late part behind the robust early one, until it is as good as the robust network; yield the trial
        before the first epoch and after each."""
        s, trial = self.settings, SubnetworkTrial(number, (), (), False)
        state: State = self.parts.composed(star, natural)
        config = replace(s.config, epochs=1, lr=LATE_LR, schedule="constant", warmup_epochs=0)
        config = replace(self._of(config, self.parts.trainable(self.networks.plain)), still=self.parts.early_modules)
        for epoch in range(s.epochs + 1):
            if epoch:
                seed = s.config.seed + 1 + number * s.epochs + epoch
                config = replace(config, seed=seed)
                state = self.networks.tuned(state, self.training, config, f"trial-{number}-{epoch}")
            own, rho = self._row(state, 1 + number * s.epochs + epoch if epoch else 1)  # all trials start alike
            missing = round(self.count * self.target) - round(self.count * own)  # in images
            converged = epoch > 0 and missing <= self.count * s.tolerance + 1e-9
            trial = SubnetworkTrial(number, (*trial.own, own), (*trial.connectivity, rho), converged)
            yield trial
            if converged:
                return

    def _row(self, state: State, number: int) -> tuple[float, tuple[float, ...]]:
        """Accuracy under PGD and connectivity of a network, from the journal if it has them."""
        if number not in self.journal.rows:
            rho = self.networks.once(lambda: self._connectivity(state))
            self.journal.add(number, {"own": self._own(state), "connectivity": rho})
        row = self.journal.rows[number]
        return row["own"], tuple(row["connectivity"])

    def _own(self, state: State) -> float:
        """Share of the selection images that a network is right on under PGD along its own gradient."""
        right = self.networks.measured(state, self.selection, "quick", None, self.settings.config.evaluate_steps)
        return right["pgd"].count("1") / self.count

    def report(
        self,
        natural: State,
        star: State,
        trials: list[SubnetworkTrial],
        held: Batches,
        suites: tuple[str, ...],
        say: Callable[[str], None],
    ) -> SubnetworkReport:
        """Compare the four networks on the report images, and say what is being done."""
        draft = SubnetworkReport(
            self.parts.early, self.parts.late, str(self.networks.threat), self.settings.tolerance, self.target,
            tuple(trials), self.measured, {}, {},
        )  # fmt: skip
        best = f"trial-{draft.best.number}-{draft.best.epochs}"
        composed, tuned = self.parts.composed(star, natural), self.networks.kept(best)
        states = {NATURAL: natural, ROBUST: star, COMPOSED: composed, TUNED: tuned}
        right = dict[str, dict[str, str]]()
        for suite in suites:
            for name, state in states.items():
                say(f"Attacks of {suite} on the {name} network")
                kept = best if name == TUNED else name
                for measure, digits in self.networks.measured(state, held, suite, kept).items():
                    right.setdefault(measure, {})[name] = digits
        dependence = dict[str, dict[str, tuple[float, ...]]]()
        for attack, run in gradient_attacks(self.networks.threat, self.settings.config.evaluate_steps).items():
            dependence[attack] = {
                name: self._under(states[name], kept, attack, run)
                for name, kept in ((COMPOSED, COMPOSED), (TUNED, best))
            }
        return replace(draft, right=right, attacked=dependence)

    def _under(self, state: State, kept: str, attack: str, run: Run) -> tuple[float, ...]:
        """Connectivity of a network on training images that an attack along its own gradient has changed."""
        rows = self.dependence.rows
        key = {"network": kept, "attack": attack}
        for row in rows.values():
            if {name: row[name] for name in key} == key:
                return tuple(row["connectivity"])
        rho = self.networks.once(lambda: self._connectivity(state, run))
        self.dependence.add(len(rows), {**key, "connectivity": rho})
        return rho

    def _connectivity(self, state: State, attack: Run | None = None) -> tuple[float, ...]:
        """Connectivity of a network on training images, which are attacked first where an attack is given."""
        net, seed = self.networks.on_pixels(state), self.settings.config.seed
        images = self.images if attack is None else attacked(net, self.images, attack, seed=seed)
        return connectivity(net, images, self.parts, classes=self.networks.classes, seed=seed)
