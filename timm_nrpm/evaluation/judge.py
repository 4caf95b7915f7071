"""Judge of a model: every attack of a suite on those images of a batch that are still right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from timm_nrpm.attacks.efforts import Effort
from timm_nrpm.attacks.flags import PROBED, RANDOM, THRESHOLDS, joined_probes, probe, unlike
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


@dataclass(frozen=True)
class Places:
    """Places in the loader of the images of a group, which is one batch or several.

    Attributes:
        numbers: Number of each image, counted from the first image of the loader.
        sizes: Number of images in each batch of the group.
    """

    numbers: list[int]
    sizes: list[int]

    def parts(self, rows: Tensor, points: int = 0) -> list[Tensor]:
        """Cut the indices of some images of the group into parts that go through a model together.

        Args:
            rows: Indices in the group, ascending, `[n]`.
            points: Number of points of each image; then a part is as many images as have no more points than the
                largest batch has images. With 0, a part is what the images are of one batch.
        """
        if points:
            return [part for part in rows.split(max(1, max(self.sizes) // points)) if len(part)]
        ends = torch.tensor(self.sizes, device=rows.device).cumsum(0)
        counts = torch.bucketize(rows, ends, right=True).bincount(minlength=len(self.sizes))
        return [part for part in rows.split(counts.tolist()) if len(part)]


class Judge:
    """A model, and the attacks that it has to withstand.

    Args:
        sources: Models whose gradients attacks may follow, by name; `"own"` is the attacked model.
        protocol: Threat, suite, effort and seed.
    """

    def __init__(self, sources: dict[str, Source], protocol: Protocol) -> None:
        self.sources, self.protocol = sources, protocol
        self.net = sources["own"].net

    def __call__(self, images: Tensor, labels: Tensor, places: Places, tell: Callable[[float, str], None]) -> Outcome:
        """Attack a group of batches.

        Args:
            images: Pixels `[B, C, H, W]` in [0, 1].
            labels: Classes `[B]`.
            places: Places of these images in the loader.
            tell: Function that is called with the share of the work that is done, from 0 to 1, and a description of the
                current attack.

        Raises:
            ValueError: Labels are not classes of the model.
        """
        device = self.net.mean.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.protocol.seed, -2, places.numbers[0]))  # a forward may be random
            return self._judged(images.to(device), labels.to(device), places, tell)

    def _judged(self, pixels: Tensor, labels: Tensor, places: Places, tell: Callable[[float, str], None]) -> Outcome:
        p = self.protocol
        logits, again = (torch.cat([self.logits(part) for part in pixels.split(places.sizes)]) for _ in range(2))
        classes = logits.shape[1]
        labels = check_labels(labels, classes, count=len(pixels))
        random = unlike(logits, again) > THRESHOLDS[RANDOM]
        attacks = attacks_of(p.suite, p.threat, p.effort, self.sources, classes, random=random)
        pursuit = Pursuit(self.net, pixels, labels, p.threat, EXPECTATION if random else 1)
        right, _ = pursuit.take(torch.arange(len(labels), device=pixels.device), pixels, logits)
        turns: dict[str, Turn] = {}
        done, share = 0, 0.0
        for place, attack in enumerate(attacks):
            rows = right.nonzero().squeeze(1) if attack.always else pursuit.near(attack.near)
            left = {near: len(pursuit.near(near)) for near in {later.near for later in attacks[place:]}}
            ahead = sum(later.passes * (len(right) if later.always else left[later.near]) for later in attacks[place:])
            share = max(share, done / max(done + ahead, 1))  # more images may be near than were before
            tell(share, f"{attack.name}, {int(pursuit.right.sum())} of {len(labels)} left")
            done += attack.passes * len(rows)
            turn = self.attack(attack, place, pursuit, rows, places)
            turns[attack.name] = turns[attack.name].then(turn) if attack.name in turns else turn
        tell(1.0, "looking for flags")
        probes = self.probes(pixels, labels, right, places)
        clean = "".join(str(int(r)) for r in right.tolist())
        non_finite = any(source.net.non_finite for source in self.sources.values())
        return Outcome(clean, turns, probes, non_finite, classes)

    def attack(self, attack: Attack, place: int, pursuit: Pursuit, rows: Tensor, places: Places) -> Turn:
        """Run one turn of an attack.

        Args:
            attack: The attack.
            place: Place of the attack in the suite.
            pursuit: Pursuit that holds the worst points so far.
            rows: Indices in the group of the images to attack, `[n]`.
            places: Places of the group's images in the loader.
        """
        source = self.sources["own" if attack.source in WITHOUT_GRADIENT else attack.source]
        before, start = self.passes(source), time.perf_counter()
        code = ["-"] * len(pursuit.labels)
        for row in [] if attack.always else pursuit.standing.tolist():
            code[row] = "1"  # this includes images that are not near enough to be attacked
        for part in places.parts(rows, attack.points):
            # Attacks that are compared with each other share their seeds; every other attack has its own.
            turn = 0 if attack.always else place
            seeds = [seed_of(self.protocol.seed, turn, places.numbers[row]) for row in part.tolist()]
            with source.followed() as net:
                survived = attack.pursue(pursuit, part, net, seeds)
            for row, survives in zip(part.tolist(), survived.tolist(), strict=True):
                code[row] = str(int(survives))
        forwards, backwards = (now - then for now, then in zip(self.passes(source), before, strict=True))
        return Turn(attack.source, "".join(code), forwards, backwards, time.perf_counter() - start)

    def probes(self, pixels: Tensor, labels: Tensor, right: Tensor, places: Places) -> dict[str, float]:
        """Look for flags on those images that are right when clean and among the first of the loader."""
        p = self.protocol
        steps = p.effort.steps if p.suite == "adaptive" else 0
        early = torch.tensor([number < PROBED for number in places.numbers], device=right.device)
        found = []
        for part in places.parts((right & early).nonzero().squeeze(1)):
            seeds = [seed_of(p.seed, -1, places.numbers[row]) for row in part.tolist()]
            found.append(probe(self.sources["own"], pixels[part], labels[part], p.threat, seeds, steps=steps))
        return joined_probes(found)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)

    def passes(self, source: Source) -> tuple[int, int]:
        """Return the number of images in all forwards so far, and in all backwards."""
        nets = {id(net): net for net in (self.net, source.net)}.values()
        return sum(net.forwards for net in nets), sum(net.backwards for net in nets)
