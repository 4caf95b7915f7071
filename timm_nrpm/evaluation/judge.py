"""Judge of a model: every attack of a suite on those images of a batch that are still right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from timm_nrpm.attacks.efforts import Effort
from timm_nrpm.attacks.flags import PROBED, RANDOM, THRESHOLDS, probe, unlike
from timm_nrpm.attacks.pursuit import Pursuit
from timm_nrpm.attacks.sources import Source
from timm_nrpm.attacks.suites import EXPECTATION, Attack, attacks_of
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.data.images import check_labels
from timm_nrpm.data.ordering import seed_of
from timm_nrpm.evaluation.outcome import Outcome, Turn

WITHOUT_GRADIENT = ("scores", "best")
"""Sources of attacks that follow no gradient; these attacks query the attacked model."""


@dataclass(frozen=True)
class Protocol:
    """Everything about an evaluation but models and images.

    Attributes:
        threat: What an attacker may change.
        suite: Name of the suite of attacks.
        effort: Numbers of steps, queries and stages.
        seed: Seed of everything random in the attacks.
    """

    threat: Threat
    suite: str
    effort: Effort
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the protocol as JSON."""
        threat = [self.threat.norm, self.threat.eps]
        return {"threat": threat, "suite": self.suite, "seed": self.seed, **asdict(self.effort)}


class Judge:
    """A model, and the attacks that it has to withstand.

    Args:
        sources: Models whose gradients attacks may follow, by name; `"own"` is the attacked model.
        protocol: Threat, suite, effort and seed.
    """

    def __init__(self, sources: dict[str, Source], protocol: Protocol) -> None:
        self.sources, self.protocol = sources, protocol
        self.net = sources["own"].net

    def __call__(self, images: Tensor, labels: Tensor, offset: int, tell: Callable[[float, str], None]) -> Outcome:
        """Attack a batch.

        Args:
            images: Pixels `[B, C, H, W]` in [0, 1].
            labels: Classes `[B]`.
            offset: Number of images before this batch.
            tell: Function that is called with the share of the work that is done, from 0 to 1, and a description of the
                current attack.

        Raises:
            ValueError: Labels are not classes of the model.
        """
        device = self.net.mean.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.protocol.seed, -2, offset))  # a forward may be random
            return self._judged(images.to(device), labels.to(device), offset, tell)

    def _judged(self, pixels: Tensor, labels: Tensor, offset: int, tell: Callable[[float, str], None]) -> Outcome:
        p = self.protocol
        logits, again = self.logits(pixels), self.logits(pixels)
        classes = logits.shape[1]
        labels = check_labels(labels, classes, count=len(pixels))
        random = unlike(logits, again) > THRESHOLDS[RANDOM]
        attacks = attacks_of(p.suite, p.threat, p.effort, self.sources, classes, random=random)
        pursuit = Pursuit(self.net, pixels, labels, p.threat, EXPECTATION if random else 1)
        right = pursuit.take(torch.arange(len(labels), device=pixels.device), pixels, logits)
        turns: dict[str, Turn] = {}
        done = 0
        for place, attack in enumerate(attacks):
            rows = right.nonzero().squeeze(1) if attack.always else pursuit.near(attack.near)
            left = {near: len(pursuit.near(near)) for near in {later.near for later in attacks[place:]}}
            ahead = sum(later.passes * (len(right) if later.always else left[later.near]) for later in attacks[place:])
            tell(done / max(done + ahead, 1), f"{attack.name}, {int(pursuit.right.sum())} of {len(labels)} left")
            done += attack.passes * len(rows)
            turn = self.attack(attack, place, pursuit, rows, offset)
            turns[attack.name] = turns[attack.name].then(turn) if attack.name in turns else turn
        probes: dict[str, float] = {}
        probed = right[: max(0, PROBED - offset)].nonzero().squeeze(1)
        if len(probed):
            tell(1.0, "looking for flags")
            seeds = [seed_of(self.protocol.seed, -1, offset + row) for row in probed.tolist()]
            steps = p.effort.steps if p.suite == "adaptive" else 0
            probes = probe(self.sources["own"], pixels[probed], labels[probed], p.threat, seeds, steps=steps)
        clean = "".join(str(int(r)) for r in right.tolist())
        non_finite = any(source.net.non_finite for source in self.sources.values())
        return Outcome(clean, turns, probes, non_finite, classes)

    def attack(self, attack: Attack, place: int, pursuit: Pursuit, rows: Tensor, offset: int) -> Turn:
        """Run one turn of an attack.

        Args:
            attack: The attack.
            place: Place of the attack in the suite.
            pursuit: Pursuit that holds the worst points so far.
            rows: Indices in the batch of the images to attack, `[n]`.
            offset: Number of images before this batch.
        """
        source = self.sources["own" if attack.source in WITHOUT_GRADIENT else attack.source]
        before, start = self.passes(source), time.perf_counter()
        code = ["-"] * len(pursuit.labels)
        for row in [] if attack.always else pursuit.standing.tolist():
            code[row] = "1"  # this includes images that are not near enough to be attacked
        if len(rows):
            # Attacks that are compared with each other share their seeds; every other attack has its own.
            seeds = [seed_of(self.protocol.seed, 0 if attack.always else place, offset + row) for row in rows.tolist()]
            with source.followed() as net:
                survived = attack.pursue(pursuit, rows, net, seeds)
            for row, survives in zip(rows.tolist(), survived.tolist(), strict=True):
                code[row] = str(int(survives))
        forwards, backwards = (now - then for now, then in zip(self.passes(source), before, strict=True))
        return Turn(attack.source, "".join(code), forwards, backwards, time.perf_counter() - start)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def passes(self, source: Source) -> tuple[int, int]:
        """Return the number of images in all forwards so far, and in all backwards."""
        nets = {id(net): net for net in (self.net, source.net)}.values()
        return sum(net.forwards for net in nets), sum(net.backwards for net in nets)
