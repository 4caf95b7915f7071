"""Strategies: tuning of lambda, of a few layers and of all weights, each beside the plain model's.

Against an attacker it is adversarial training; against a shift, training on every image as it is and shifted alike. A
model part of the way from the old weights to the tuned ones costs nothing more to make, loses less clean accuracy, and
may keep most of the gain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_nrpm.advice.strategy import Candidate, Candidates, Strategy
from timm_nrpm.advice.study import Study, file_name
from timm_nrpm.attacks.threats import COUNTED, Threat
from timm_nrpm.config import NRPMConfig, TuneConfig
from timm_nrpm.evaluation.shifts import Shift
from timm_nrpm.models.interpolation import between
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.tuning.tune import tune

EPOCHS, STEPS, STEP = 10, 3, 0.5
"""Number of epochs, and of steps of the attack in training, and their size in units of eps. Three steps of a quarter,
the size that suits seven, hardly reach the bound."""

PARTS = (0.75, 0.5, 0.25)
"""Shares of the way from the weights as they are to the tuned ones."""

ALL = "all layers"

LAM = 0.8
"""Lambda that tuning starts from, beside 1."""


def _lambda(study: Study) -> Candidates:
    yield _candidate(study, "lambda tuned", LAM, TuneConfig(calibrate=1000, lam_lr=0.1))


def _few(study: Study) -> Candidates:
    names, layers = _weights(study), list(reprogrammed_layers(study.model))
    later = f"{layers[(len(layers) + 1) // 2]}." if len(layers) > 1 else ""
    until = next((place for place, name in enumerate(names) if later and name.startswith(later)), len(names))
    yield from _pair(study, "the first half of the layers", names[:until])


def _all(study: Study) -> Candidates:
    yield from _pair(study, ALL, _weights(study))


def tuned_whole(study: Study) -> Candidate:
    """The plain model with all layers tuned; where that was done already, it takes no time."""
    candidate = _candidate(study, f"{ALL}, plain", 1.0, TuneConfig(paradigm="all", trainable=_weights(study)))
    done = (study.folder / file_name(candidate.setting) / "variant").exists()
    return replace(candidate, seconds=0.0) if done else candidate


def _weights(study: Study) -> tuple[str, ...]:
    """Names of all parameters but lambdas, which would leave 1 as soon as they trained."""
    return tuple(name for name, _ in study.model.named_parameters() if name.rpartition(".")[2] != "lam")


def _pair(study: Study, words: str, trainable: tuple[str, ...]) -> Candidates:
    """The plain model with these parameters tuned, and the reprogrammed one, whose control it is."""
    plain = f"{words}, plain"
    config = TuneConfig(paradigm="all", trainable=trainable)
    tuned = _candidate(study, plain, 1.0, config)
    yield tuned
    for share in PARTS:
        yield _part_of_the_way(study, tuned, share)
    yield replace(
        _candidate(study, f"{words}, lambda {LAM:g}", LAM, replace(config, gradient="mixture")), control=plain
    )


class _WithShifted(Dataset[tuple[Tensor, int]]):
    """The images of a dataset, and after them the same images shifted: without the former, clean accuracy is lost."""

    def __init__(self, images: Dataset[Any], shift: Shift, seed: int) -> None:
        self.images, self.shift, self.seed = images, shift, seed

    def __len__(self) -> int:
        return 2 * len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        count = len(self) // 2
        pixels, label = self.images[index % count]
        if index < count:
            return pixels, label
        return self.shift.applied(pixels.unsqueeze(0), seed=self.seed + 1, first=index)[0], label


def _images(study: Study) -> DataLoader[Any]:
    """The training images, and the shifted ones where the threat is a shift."""
    loader = study.training
    assert loader is not None
    if isinstance(study.danger, Threat):
        return loader
    generator = torch.Generator().manual_seed(study.seed)
    images = _WithShifted(loader.dataset, study.danger, study.seed)
    return DataLoader(images, loader.batch_size, shuffle=True, num_workers=loader.num_workers, generator=generator)


def _tuned_under(threat: Threat) -> Threat:
    """The attack in training: where pixels are counted, one of about that length under L1."""
    if threat.norm in COUNTED:
        return Threat("L1", threat.eps if threat.norm == "L0" else threat.eps**2)
    return threat


def _candidate(study: Study, setting: str, lam: float, config: TuneConfig) -> Candidate:
    """A model tuned from a lambda."""
    attack = _tuned_under(study.danger) if isinstance(study.danger, Threat) else None
    config = replace(
        config,
        objective="pgd" if attack else "clean",
        norm=attack.norm if attack else "Linf",
        eps=attack.eps if attack else 0.0,
        steps=STEPS,
        step_size=STEP * attack.eps if attack else None,
        epochs=EPOCHS,
        seed=study.seed,
        output=str(study.folder / file_name(setting)),
        optimizer="momentum",
    )

    def start() -> nn.Module:
        return study.fresh(NRPMConfig(lam) if lam < 1 else None)

    def make() -> nn.Module:
        model = start()
        tune(model, _images(study), config, mean=study.mean, std=study.std, resume=True)
        return model.eval().to(next(study.model.parameters()).device)

    assert study.training is not None
    steps = EPOCHS * len(study.training) * (STEPS + 1 if attack else 2)
    return Candidate(setting, make, is_trained=True, seconds=steps * study.step_seconds(start()))


def _part_of_the_way(study: Study, tuned: Candidate, share: float) -> Candidate:
    """A model whose weights and statistics lie between those as they are and those of a tuned candidate."""

    def make() -> nn.Module:
        model = study.fresh()
        model.load_state_dict(between(model.state_dict(), tuned.make().state_dict(), share))
        return model

    return Candidate(f"{tuned.setting}, {100 * share:g} % of the way", make, is_trained=True)


def _obstacle(study: Study) -> str:
    if study.training is None:
        return "there are no training images"
    if study.danger == Shift():
        return "training images are not shifted as these are"
    return ""


TUNED_LAMBDA = Strategy("tuning lambda", _lambda, _obstacle)
TUNED_LAYERS = Strategy("tuning a few layers", _few, _obstacle)
TUNED_ALL = Strategy("tuning all", _all, _obstacle)
