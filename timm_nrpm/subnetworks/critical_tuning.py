"""Robust critical fine-tuning: the layer that robustness depends on least learns from clean images (Zhu et al., arXiv
2308.02533)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_nrpm.attacks.threats import Threat, check_threat
from timm_nrpm.checks import check_choice, check_integer, check_number
from timm_nrpm.config import TuneConfig
from timm_nrpm.data.images import check_batch
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.trials import Effect, Kept, digits_of
from timm_nrpm.models.interpolation import between
from timm_nrpm.models.modes import evaluating
from timm_nrpm.models.reprogramming import is_reprogrammed, plain_copy, settle_
from timm_nrpm.nn.wrappers import Subject, subject_of
from timm_nrpm.subnetworks.criticality import criticality
from timm_nrpm.subnetworks.networks import NO_IMAGES, Batches, some_of
from timm_nrpm.subnetworks.splitting import layer_parameters
from timm_nrpm.tuning.plain import tune_weights

SHARES = tuple(number / 10 for number in range(1, 11))
"""Shares of the way to the tuned weights that are tried, as in the authors' code."""

MEASURED = 512
"""Largest number of training images that criticality is measured on."""


@dataclass(frozen=True)
class Step:
    """The model part of the way to the tuned weights.

    Attributes:
        share: Share of the way, from 0 to 1.
        kept: Selection images that it is right on, clean and under all of the quick attacks.
    """

    share: float
    kept: Kept


@dataclass(frozen=True)
class CriticalTuning:
    """What critical fine-tuning found.

    Attributes:
        layer: Name of the layer that was tuned.
        criticality: Robust criticality by the name of the layer, in nats; empty where the layer was given.
        threat: The threat, in words.
        tolerance: Largest share of the selection images that may be lost under attack.
        steps: The model at every share of the way that was tried, the first of which is 0.
    """

    layer: str
    criticality: Mapping[str, float]
    threat: str
    tolerance: float
    steps: tuple[Step, ...]

    @property
    def chosen(self) -> Step:
        """The largest step that keeps the accuracy under attack within the tolerance; share 0 is always one."""
        count = len(self.steps[0].kept.threat)
        least = self.steps[0].kept.threat.count("1") - count * self.tolerance - 1e-9
        return max((step for step in self.steps if step.kept.threat.count("1") >= least), key=lambda step: step.share)

    def __str__(self) -> str:
        before, after = self.steps[0].kept, self.chosen.kept
        clean, attacked = Effect.of(after.clean, before.clean), Effect.of(after.threat, before.threat)
        return (
            f"{self.layer}, {100 * self.chosen.share:g} % of the way to its weights tuned on clean images: {clean} "
            f"points clean, {attacked} under {self.threat}, on the images that chose it."
        )

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CriticalTuning:
        data = json.loads(text)
        steps = tuple(Step(step["share"], Kept(**step["kept"])) for step in data["steps"])
        return cls(**{**data, "steps": steps})


def critical_tuning(
    model: nn.Module,
    training: DataLoader[Any],
    selection: Iterable[Any],
    threat: Threat | None = None,
    *,
    layer: str | None = None,
    config: TuneConfig | None = None,
    shares: Sequence[float] = SHARES,
    tolerance: float = 0.0,
    attack_steps: int = 10,
    measured: int = MEASURED,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: bool = False,
) -> CriticalTuning:
    """Gain clean accuracy of an adversarially trained model, in place, at no loss of robust accuracy (RiFT, section 3).

    The layer of least robust criticality is tuned on clean images, all else frozen. Of its weights between the old and
    the tuned ones, those furthest on the way are taken that lose no accuracy on the attacked selection images; if every
    step loses some, the model stays as it was. The images that choose are no measure of the result: judge on others.

    Args:
        model: An adversarially trained model, plain or reprogrammed.
        training: A DataLoader of training images `[B, C, H, W]` in [0, 1] and labels `[B]`.
        selection: Batches of other images and labels, on which the step is chosen.
        threat: What an attacker may change, under Linf or L2; the default is Linf with eps 8/255.
        layer: Name of the layer to tune; None for that of least criticality.
        config: Settings of the tuning; the default is that of the authors' code, ten epochs of SGD with momentum at a
            learning rate of 0.001. `objective` has to be `"clean"`.
        shares: Shares of the way that are tried, above 0 and up to 1, besides 0.
        tolerance: Largest share of the selection images that may be lost under attack.
        attack_steps: Number of steps of PGD.
        measured: Largest number of training images that criticality is measured on, drawn at random.
        mean, std: Normalisation of the model, as for :func:`timm_nrpm.evaluate`.
        progress: Whether to show a progress bar while the layer is tuned.

    Returns:
        The layer, the criticality of all layers, and the model at every share of the way.

    Raises:
        ValueError: A setting is outside its range or has no place here, there are no selection images, or no layer has
            that name. The model is as it was.

    Example:
        >>> config = TuneConfig(objective="clean", lr=0.001, epochs=1)
        >>> net = timm.create_model("resnet8_digits", pretrained=True).eval()
        >>> found = critical_tuning(net, training_loader, loader, Threat("Linf", 0.1), config=config, shares=[0.5, 1])
        >>> found.layer, [step.share for step in found.steps]
        ('...', [0.0, 0.5, 1.0])
    """
    threat = check_threat(threat)
    settings = _checked(config)
    shares = sorted({check_number("shares", each, above=0, most=1, why=", a share of the way") for each in shares})
    tolerance = check_number("tolerance", tolerance, least=0, most=1, why=", a share of the images")
    attack_steps = check_integer("attack_steps", attack_steps, least=1)
    measured = check_integer("measured", measured, least=1)
    subject = subject_of(model, mean, std)
    batches = [check_batch(batch) for batch in selection]
    if not batches:
        raise ValueError(NO_IMAGES)
    names, rises = _layer(subject, training, batches, threat, layer, measured, attack_steps)
    layer = min(rises, key=rises.__getitem__) if layer is None else layer
    named = dict(subject.model.named_parameters())
    trained = {name: named[name] for name in names[layer] if name.rpartition(".")[0] == layer}

    def step(share: float) -> Step:
        report = evaluate(
            subject.model, batches, threat, "quick", steps=attack_steps, seed=settings.seed, control=False,
            mean=subject.mean, std=subject.std,
        )  # fmt: skip
        return Step(share, Kept(digits_of(report.correct), digits_of(report.survivors)))

    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    steps = [step(0.0)]
    with _undone_on_failure(subject.model, trained, before):
        settings = replace(settings, paradigm="all", trainable=tuple(trained))
        tune_weights(subject.model, training, settings, mean=subject.mean, std=subject.std, progress=progress)
        after = {name: parameter.detach().clone() for name, parameter in trained.items()}
        for share in shares:
            _put_(trained, between(before, after, share))
            steps.append(step(share))
        found = CriticalTuning(layer, rises, str(threat), tolerance, tuple(steps))
        _put_(trained, between(before, after, found.chosen.share))
        _settle_(subject.model)
    return found


def _checked(config: TuneConfig | None) -> TuneConfig:
    """The settings, or the authors'."""
    if config is None:
        return TuneConfig(objective="clean", optimizer="momentum", lr=0.001, epochs=10)
    if config.objective != "clean" or config.trainable or config.push_to:
        raise ValueError(
            f"config has objective={config.objective!r}, trainable={config.trainable!r} and push_to={config.push_to!r}:"
            ' one layer is tuned on clean images here, so give objective="clean" and neither of the others.'
        )
    if config.calibrate:
        raise ValueError(
            f"config has calibrate={config.calibrate}, which would move the statistics of the other layers: leave it 0."
        )
    return config


def _layer(
    subject: Subject,
    training: DataLoader[Any],
    selection: Batches,
    threat: Threat,
    layer: str | None,
    measured: int,
    attack_steps: int,
) -> tuple[Mapping[str, tuple[str, ...]], dict[str, float]]:
    """The parameters that go with each layer, and the criticality of the layers, which is empty where one was given."""
    net = subject.on_pixels()
    with evaluating(subject.model):
        example = net.normalise(selection[0][0][:1].float().to(net.mean.device))
        names = layer_parameters(subject.model, example=example)
        if layer is not None:
            check_choice("layer", layer, names)
            return names, {}
        net.eval()
        return names, criticality(net, some_of(training, measured), names, threat, attack_steps=attack_steps)


@contextmanager
def _undone_on_failure(
    model: nn.Module, trained: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]
) -> Iterator[None]:
    """Bring back the weights from before if anything fails."""
    try:
        yield
    except BaseException:
        _put_(trained, before)
        _settle_(model)
        raise


def _settle_(model: nn.Module) -> None:
    """Keep the plain model's statistics of a reprogrammed model, which the tuning of one layer leaves as they are."""
    if is_reprogrammed(model):
        settle_(model, plain_copy(model, kept=True))


@torch.no_grad()
def _put_(trained: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in trained.items():
        parameter.copy_(values[name])
