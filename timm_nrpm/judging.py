"""What becomes of a batch of images: every attack of a suite on those that are still right."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_nrpm.flags import PROBED, RANDOM, THRESHOLDS, probe, unlike
from timm_nrpm.images import check_labels
from timm_nrpm.ordering import seed_of
from timm_nrpm.sources import Source
from timm_nrpm.suites import Effort, attacks_of
from timm_nrpm.threats import Threat


class Judge:
    """A model, and the attacks it has to withstand."""

    def __init__(self, sources: dict[str, Source], threat: Threat, suite: str, effort: Effort, seed: int) -> None:
        self.sources, self.threat, self.suite, self.effort, self.seed = sources, threat, suite, effort, seed
        self.net = sources["own"].net

    def __call__(
        self, images: Tensor, labels: Tensor, offset: int, tell: Callable[[float, str], None]
    ) -> dict[str, Any]:
        """What became of a batch, as JSON: `"1"` for an image still right, `"0"` wrong, `"-"` not attacked.

        Args:
            images, labels: `[B, C, H, W]` in [0, 1], and `[B]`.
            offset: How many images were before.
            tell: Called with the share that is done, and what is being done.

        Raises:
            ValueError: Labels that are no classes.
        """
        device = self.net.mean.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.seed, -2, offset))  # for a forward that is random
            return self._judged(images.to(device), labels.to(device), offset, tell)

    def _judged(
        self, pixels: Tensor, labels: Tensor, offset: int, tell: Callable[[float, str], None]
    ) -> dict[str, Any]:
        logits, again = self.logits(pixels), self.logits(pixels)
        classes = logits.shape[1]
        check_labels(labels, classes, count=len(pixels))
        labels, random = labels.long(), unlike(logits, again) > THRESHOLDS[RANDOM]
        right = _right(logits, labels)
        attacks = attacks_of(self.suite, self.threat, self.effort, self.sources, classes, random=random)
        left, outcomes = right.clone(), {}
        for place, attack in enumerate(attacks):
            tell(place / len(attacks), f"{attack.name}, {int(left.sum())} of {len(left)} left")
            rows = (right if attack.always else left).nonzero().squeeze(1)
            source = self.sources["own" if attack.source == "scores" else attack.source]
            before, start = self.passes(source), time.perf_counter()
            code = ["-"] * len(labels)
            if len(rows):
                # Attacks that are compared start from the same place, the others each from its own.
                seeds = [seed_of(self.seed, 0 if attack.always else place, offset + row) for row in rows.tolist()]
                with source.followed() as net:
                    attacked = attack.run(net, pixels[rows], labels[rows], seeds)
                attacked = self.fair(pixels[rows], attacked)
                survived = _right(self.logits(attacked), labels[rows])
                left[rows] &= survived
                for row, survives in zip(rows.tolist(), survived.tolist(), strict=True):
                    code[row] = str(int(survives))
            passes = [now - then for now, then in zip(self.passes(source), before, strict=True)]
            seconds = time.perf_counter() - start
            outcomes[attack.name] = [attack.source, "".join(code), *passes, seconds]
        probes: dict[str, float] = {}
        probed = right[: max(0, PROBED - offset)].nonzero().squeeze(1)
        if len(probed):
            tell(1.0, "looking for flags")
            seeds = [seed_of(self.seed, -1, offset + row) for row in probed.tolist()]
            source, some = self.sources["own"], (pixels[probed], labels[probed])
            steps = max(2, self.effort.steps // 5) if self.suite == "adaptive" else 0
            probes = probe(source, *some, self.threat, seeds, steps=steps)
        clean = "".join(str(int(r)) for r in right.tolist())
        non_finite = any(source.net.non_finite for source in self.sources.values())
        return {"clean": clean, "attacks": outcomes, "probes": probes, "non_finite": non_finite, "classes": classes}

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def passes(self, source: Source) -> tuple[int, int]:
        """Images that went forwards and backwards so far."""
        nets = {id(net): net for net in (self.net, source.net)}.values()
        return sum(net.forwards for net in nets), sum(net.backwards for net in nets)

    def fair(self, pixels: Tensor, attacked: Tensor) -> Tensor:
        """What an attack found, brought back within the bound where it cheated."""
        honest = self.threat.allows(pixels, attacked)
        if bool(honest.all()):
            return attacked
        return torch.where(honest.view(-1, 1, 1, 1), attacked, self.threat.project(pixels, attacked.nan_to_num(0.0)))


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which predictions are right, `[B]`; where logits are not numbers there is none."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)
