"""Which attacks belong together: the paper's, AutoAttack as its authors define it, and those made for this defence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_nrpm.ascent import carlini_wagner, climb, greedy_pixels, random_pixels
from timm_nrpm.attacks import (
    MOST_TARGETS,
    Attack,
    PixelModel,
    Run,
    auto_attack,
    fgsm,
    original_auto_attack,
    pgd,
    square,
)
from timm_nrpm.threats import Threat

SUITES = ("quick", "paper", "standard", "autoattack", "adaptive")


@dataclass(frozen=True)
class Effort:
    """How hard the attacks of a suite try.

    Attributes:
        steps: Of one ascent.
        queries: Of one random search.
        pgd: Steps of PGD, the paper's.
        auto: Steps of AutoAttack, its authors'.
    """

    steps: int
    queries: int
    pgd: int = 20
    auto: int = 100


EFFORTS = {
    "quick": Effort(20, 0),
    "paper": Effort(20, 5000),
    "standard": Effort(100, 5000),
    "autoattack": Effort(100, 5000),
    "adaptive": Effort(50, 300),
}

EXPECTATION = 8
"""Forwards for a gradient where the forward is random (expectation over transformation, arXiv 1707.07397)."""

ORDER = ("plain", "base", "own", "bpda", "softer", "shorter", "halfway")
"""Of the sources: those without an estimate first, since they are cheap and leave fewer images to the others."""

TARGETS = {"plain": MOST_TARGETS, "base": MOST_TARGETS, "own": 3, "bpda": 3}
"""Other classes, the most likely ones, whose margin is climbed one by one: as many as AutoAttack's where no estimate is
in the way."""


def attacks_of(
    suite: str, threat: Threat, effort: Effort, sources: Collection[str], classes: int, *, random: bool = False
) -> list[Attack]:
    """The attacks of a suite, in the order in which they are tried.

    `"quick"`: FGSM and PGD on the own gradient, and PGD from the plain model. `"paper"`: FGSM, PGD, the margin loss of
    Carlini and Wagner, and AutoAttack (NRPM, Table 5). `"standard"`: AutoAttack by torchattacks; `"autoattack"`: by its
    authors' code, if that is installed. `"adaptive"`: along the gradient of every model there is, with two losses and
    several targets, and a random search; the cheap and strong ones first.

    Args:
        sources: Whose gradients there are.
        classes: Of the model.
        random: Whether its forward is, so that gradients are averaged.

    Raises:
        ValueError: A suite that is not known, or one that has no attacks in this norm.
        ImportError: The authors' AutoAttack is not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"suite={suite!r} is not known: choose one of {', '.join(SUITES)}.")
    library = threat.norm in ("Linf", "L2")
    if (suite in ("paper", "standard") and not library) or (suite == "autoattack" and threat.norm == "L0"):
        raise ValueError(f'suite={suite!r} has no attacks under {threat.norm}: choose suite="adaptive" or "quick".')
    found: list[Attack] = []
    if suite not in ("standard", "autoattack"):
        if threat.norm == "Linf":
            found.append(Attack("fgsm", "own", fgsm(threat.eps), always=True))
        first = pgd(threat, effort.pgd) if library else _direct(threat, effort)
        found.append(Attack("pgd", "own", first, always=True))
        # The same on every image from elsewhere: where it breaks more, the own gradient misleads.
        compared = {"quick": ("plain",), "adaptive": ("plain", "base", "bpda")}.get(suite, ())
        found += [Attack(f"pgd_{name}", name, first, always=True) for name in compared if name in sources]
    if suite == "paper":
        found.append(Attack("cw", "own", _carlini_wagner(threat, effort.steps)))
    if suite in ("paper", "standard", "autoattack"):
        made_by = original_auto_attack if suite == "autoattack" else auto_attack
        runs = made_by(threat, classes, effort.auto, effort.queries)
        found += [Attack(name, "scores" if name == "aa_square" else "own", run) for name, run in runs.items()]
    if suite == "adaptive":
        if threat.norm == "L0":
            found += _sparse(threat, effort, sources, random)
        else:
            found += _ascents(threat, effort, sources, classes, random)
        if library:
            found.append(Attack("square", "scores", square(threat, effort.queries, restarts=2)))
        else:
            found.append(Attack("random_pixels", "scores", _random_pixels(threat, effort.queries)))
    return found


def _ascents(threat: Threat, effort: Effort, sources: Collection[str], classes: int, random: bool) -> list[Attack]:
    found = []
    average = EXPECTATION if random else 1
    for source in (name for name in ORDER if name in sources):
        predicts = source in ("own", "bpda") and not random  # where it is, being fooled once means little
        for loss in ("cross_entropy", "margin"):
            run = _ascent(threat, effort.steps, loss, average=average, predicts=predicts)
            found.append(Attack(f"apgd_{SHORT[loss]}_{source}", source, run))
        # Without a plain model beside it, the model is one itself.
        targets = TARGETS.get(source, 0) if "plain" in sources else MOST_TARGETS
        for rank in range(1, min(targets, classes - 1) + 1):
            run = _ascent(threat, effort.steps, "margin", rank=rank, average=average, predicts=predicts)
            found.append(Attack(f"apgd_target{rank}_{source}", source, run))
    return found


SHORT = {"cross_entropy": "ce", "margin": "margin"}


def _ascent(threat: Threat, steps: int, loss: str, *, rank: int = 0, average: int = 1, predicts: bool = True) -> Run:
    """Auto-PGD; with a `rank`, towards the class that has it among the others when nobody attacks."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        target = None
        if rank:
            with torch.no_grad():
                logits = net(pixels).scatter(1, labels.unsqueeze(1), -torch.inf)
            target = logits.topk(rank, 1).indices[:, -1]
        how = {"loss": loss, "target": target, "average": average, "fooled": predicts}
        return climb(net, pixels, labels, threat, seeds, steps=steps, **how)[0]  # type: ignore[arg-type]

    return run


def _direct(threat: Threat, effort: Effort) -> Run:
    """What stands for PGD where torchattacks has none: Auto-PGD under L1, greedy pixels under L0."""
    if threat.norm == "L1":
        return _ascent(threat, effort.steps, "cross_entropy", predicts=False)
    return _greedy(threat, effort.steps, predicts=False)


def _sparse(threat: Threat, effort: Effort, sources: Collection[str], random: bool) -> list[Attack]:
    found = []
    for source in (name for name in ORDER if name in sources):
        predicts = source in ("own", "bpda") and not random
        run = _greedy(threat, effort.steps, average=EXPECTATION if random else 1, predicts=predicts)
        found.append(Attack(f"greedy_{source}", source, run))
    return found


def _greedy(threat: Threat, steps: int, *, average: int = 1, predicts: bool) -> Run:
    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        return greedy_pixels(net, pixels, labels, threat, rounds=steps, average=average, fooled=predicts)

    return run


def _random_pixels(threat: Threat, queries: int) -> Run:
    """Random pixels in random colours; under L1 as many as may be black and white at most."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        count = int(threat.eps) if threat.norm == "L0" else int(threat.eps / pixels.shape[1])
        if not count:
            return pixels
        return random_pixels(net, pixels, labels, Threat("L0", count), seeds, queries=queries)

    return run


def _carlini_wagner(threat: Threat, steps: int) -> Run:
    """Under L2 the attack of the paper, with its binary search over c, whose result counts if it is near enough; under
    Linf projected ascent of its loss, since what it finds is near in L2 alone."""
    if threat.norm == "Linf":
        return _ascent(threat, steps, "margin")

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        attacked = carlini_wagner(net, pixels, labels, steps=10 * steps)
        near = threat.allows(pixels, attacked)
        return torch.where(near.view(-1, 1, 1, 1), attacked, pixels)

    return run
