"""Which attacks belong together: the paper's, AutoAttack as its authors define it, and those made for this defence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from timm_nrpm.attacks.ascent import carlini_wagner, climb, greedy_pixels, random_pixels
from timm_nrpm.attacks.efforts import Effort
from timm_nrpm.attacks.evolution import HERD, PARTS, evolve
from timm_nrpm.attacks.library import MOST_TARGETS, Run, auto_attack, fgsm, original_auto_attack, pgd, square
from timm_nrpm.attacks.pursuit import Pursuit, ascend, likely_targets, search
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_choice
from timm_nrpm.config import SUITES
from timm_nrpm.nn.pixel_model import PixelModel

EXPECTATION = 8
"""Forwards for a gradient where the forward is random (expectation over transformation, arXiv 1707.07397)."""

CYCLE = ("soft", "plain", "soft_short", "halfway", "base")
"""Sources in the order in which rounds take turns with them; of a model that has no plain one beside it, its own."""

TURNS = ("margin", "cross_entropy")
"""What ascents climb, by turns."""

SIZES = (0.25, 1.0, 0.5, 2.0)
"""First steps of ascents that go on from the worst points, in units of eps, by turns."""

EVERY = 3
"""Steps of an ascent along another model between two looks of the attacked one."""

SQUARE = 100
"""Queries of Square, which starts from nowhere: what it breaks alone, gradients have missed."""

Pursue = Callable[[Pursuit, Tensor, PixelModel, list[int]], Tensor]
"""A pursuit, the numbers of the images to attack, the model to follow and a seed for each image, to whether the
attacked model was right on all that this attack showed it, `[n]`."""


@dataclass(frozen=True)
class Attack:
    """A named attack. Several may have one name: they count as one that takes several turns.

    Attributes:
        name: What a report calls it.
        source: Whose gradient it follows, see :func:`timm_nrpm.sources.sources_of`; `"scores"` for none, and `"best"`
            for none either, but from the worst points that the others found.
        pursue: The attack.
        passes: About how many forwards and backwards it takes for an image.
        always: Whether it is there for comparison, so that also images already broken are attacked.
        near: Which of the images that stand are attacked: those with at most this share of their clean margin left.
    """

    name: str
    source: str
    pursue: Pursue
    passes: int
    always: bool = False
    near: float = 1.0


def once(run: Run) -> Pursue:
    """An attack that shows the attacked model what it ends with, and nothing before."""

    def pursue(pursuit: Pursuit, rows: Tensor, net: PixelModel, seeds: list[int]) -> Tensor:
        return pursuit.look(rows, run(net, pursuit.pixels[rows], pursuit.labels[rows], seeds))

    return pursue


def alone(attack: Attack, threat: Threat) -> Run:
    """An attack by itself, on images that nothing else has attacked, along the model it is given."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        pursuit = Pursuit(net, pixels, labels, threat)
        attack.pursue(pursuit, torch.arange(len(pixels), device=pixels.device), net, seeds)
        return pursuit.best

    return run


def attacks_of(
    suite: str, threat: Threat, effort: Effort, sources: Collection[str], classes: int, *, random: bool = False
) -> list[Attack]:
    """The attacks of a suite, in the order in which they are tried.

    `"quick"`: FGSM and PGD on the own gradient, and PGD from the plain model. `"paper"`: FGSM, PGD, the margin loss of
    Carlini and Wagner, and AutoAttack (NRPM, Table 5). `"standard"`: AutoAttack by torchattacks; `"autoattack"`: by its
    authors' code, if that is installed. `"adaptive"`: PGD along every gradient that can be compared, then rounds of a
    pursuit, each an ascent along another source and a random search, from the worst points found so far, and stages of
    rounds and evolutions for the images that are nearer and nearer to breaking.

    Args:
        suite: One of `SUITES`.
        threat: What an attacker may change.
        effort: How hard they try.
        sources: Whose gradients there are.
        classes: Of the model.
        random: Whether its forward is, so that gradients are averaged.

    Raises:
        ValueError: A suite that is not known, or one that has no attacks in this norm.
        ImportError: The authors' AutoAttack is not installed.
    """
    check_choice("suite", suite, SUITES)
    library = threat.norm in ("Linf", "L2")
    if (suite in ("paper", "standard") and not library) or (suite == "autoattack" and threat.norm == "L0"):
        raise ValueError(f'suite={suite!r} has no attacks under {threat.norm}: choose suite="adaptive" or "quick".')
    found: list[Attack] = []
    if suite not in ("standard", "autoattack"):
        if threat.norm == "Linf":
            found.append(Attack("fgsm", "own", once(fgsm(threat.eps)), 2, always=True))
        first, passes = once(pgd(threat, effort.pgd) if library else _direct(threat, effort)), 2 * effort.pgd
        found.append(Attack("pgd", "own", first, passes, always=True))
        # The same on every image from elsewhere: where it breaks more, the own gradient misleads.
        compared = {"quick": ("plain",), "adaptive": ("plain", "base", "bpda")}.get(suite, ())
        found += [Attack(f"pgd_{name}", name, first, passes, always=True) for name in compared if name in sources]
    if suite == "paper":
        found.append(Attack("cw", "own", once(_carlini_wagner(threat, effort.steps)), 2 * effort.steps))
    if suite in ("paper", "standard", "autoattack"):
        made_by = original_auto_attack if suite == "autoattack" else auto_attack
        for name, run in made_by(threat, classes, effort.auto, effort.queries).items():
            scores = name == "aa_square"
            cost = effort.queries if scores else 2 * effort.auto * (1 if name == "aa_apgd_ce" else MOST_TARGETS)
            found.append(Attack(name, "scores" if scores else "own", once(run), cost))
    if suite == "adaptive":
        average = EXPECTATION if random else 1
        found += (
            _sparse(threat, effort, sources, average)
            if threat.norm == "L0"
            else _pursuit(effort, sources, classes, average)
        )
        if library and effort.queries:
            found.append(Attack("square", "scores", once(square(threat, SQUARE)), SQUARE))
    return found


def _pursuit(effort: Effort, sources: Collection[str], classes: int, average: int) -> Iterator[Attack]:
    """Rounds of an ascent and a search, and stages of rounds with an evolution. Of three ascents two go on from the
    worst points, with the margin and with the cross-entropy, and one starts anew, up the margin of the strongest class
    or, by turns, of the next likely target."""
    beside = [name for name in CYCLE if name in sources] if "plain" in sources else ["own"]
    # Those without an estimate first: they are cheap, and leave fewer images to the others.
    starts = [name for name in ("plain", "base", "bpda") if name in sources] if "plain" in sources else ["own"]
    for name in starts:
        yield _ascent(effort, name, "margin", average, size=0.5, momentum=0.75, fresh=name in ("plain", "own"))
    targets = count()
    turns = [(stage, left) for stage in effort.stages for left in reversed(range(stage.rounds))]
    herds = count()
    for turn, (stage, left) in enumerate(turns):
        third, kind = divmod(turn, 3)
        if kind < 2:
            loss = TURNS[kind]
            size = SIZES[turn % len(SIZES)]
            ascent = _ascent(effort, beside[turn % len(beside)], loss, average, size=size, momentum=0.5)
        else:
            rank = next(targets) % min(MOST_TARGETS, classes - 1) if third % 2 and classes > 2 else None
            loss = TURNS[third // 2 % 2] if rank is None else "margin"
            name = beside[third % len(beside)]
            ascent = _ascent(effort, name, loss, average, size=2.0, momentum=0.75, fresh=True, rank=rank)
        yield replace(ascent, near=stage.near)
        if effort.queries:
            yield Attack("search", "best", _search(effort.queries), effort.queries, near=stage.near)
        if effort.queries and stage.evolution and not left:
            # Where herds begin matters: three from the smoothest source before one from the next.
            name = beside[next(herds) // 3 % len(beside)]
            evolution = _evolution(2 * effort.steps, stage.evolution * effort.queries // average, name, average)
            yield replace(evolution, near=stage.near)


def _ascent(
    effort: Effort,
    source: str,
    loss: str,
    average: int,
    *,
    size: float,
    momentum: float,
    fresh: bool = False,
    rank: int | None = None,
) -> Attack:
    steps = effort.steps * (2 if fresh else 1)
    predicts = source in ("own", "bpda") and average == 1  # where the forward is random, one look means little

    def pursue(pursuit: Pursuit, rows: Tensor, net: PixelModel, seeds: list[int]) -> Tensor:
        target = None if rank is None else likely_targets(pursuit, rows, net)[:, rank]
        ascend(
            pursuit,
            rows,
            net,
            seeds,
            steps=steps,
            loss=loss,
            size=size,
            momentum=momentum,
            target=target,
            fresh=fresh,
            average=average,
            every=EVERY,
            predicts=predicts,
        )
        return pursuit.right[rows]

    return Attack(f"ascent_{source}", source, pursue, steps * (2 * average) + (0 if predicts else steps // EVERY))


def _search(queries: int) -> Pursue:
    def pursue(pursuit: Pursuit, rows: Tensor, net: PixelModel, seeds: list[int]) -> Tensor:
        search(pursuit, rows, seeds, queries=queries)
        return pursuit.right[rows]

    return pursue


def _evolution(steps: int, queries: int, source: str, average: int) -> Attack:
    def pursue(pursuit: Pursuit, rows: Tensor, net: PixelModel, seeds: list[int]) -> Tensor:
        evolve(pursuit, rows, net, seeds, steps=steps, queries=queries, every=EVERY, average=average)
        return pursuit.right[rows]

    gradients = steps + (PARTS - 1) * (steps // 4)
    return Attack(f"evolution_{source}", source, pursue, HERD * (2 * gradients + queries) * average)


def _climb(threat: Threat, steps: int, loss: str) -> Run:
    """Auto-PGD to its end, whatever the model that is followed makes of the images meanwhile."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        return climb(net, pixels, labels, threat, seeds, steps=steps, loss=loss, fooled=False)[0]

    return run


def _direct(threat: Threat, effort: Effort) -> Run:
    """What stands for PGD where torchattacks has none: Auto-PGD under L1, greedy pixels under L0."""
    if threat.norm == "L1":
        return _climb(threat, effort.pgd, "cross_entropy")
    return _greedy(threat, effort.pgd, predicts=False)


def _sparse(threat: Threat, effort: Effort, sources: Collection[str], average: int) -> Iterator[Attack]:
    """Under L0: greedy pixels on every source, and random pixels."""
    for source in ("plain", "base", "own", "bpda", "soft", "soft_short", "halfway"):
        if source in sources:
            predicts = source in ("own", "bpda") and average == 1
            run = _greedy(threat, effort.pgd, average=average, predicts=predicts)
            yield Attack(f"greedy_{source}", source, once(run), 2 * average * effort.pgd)
    queries = effort.queries * sum(stage.rounds + stage.evolution for stage in effort.stages)
    if queries:
        yield Attack("random_pixels", "scores", once(_random_pixels(threat, queries)), queries)


def _greedy(threat: Threat, steps: int, *, average: int = 1, predicts: bool) -> Run:
    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        return greedy_pixels(net, pixels, labels, threat, rounds=steps, average=average, fooled=predicts)

    return run


def _random_pixels(threat: Threat, queries: int) -> Run:
    """Random pixels in random colours."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        return random_pixels(net, pixels, labels, threat, seeds, queries=queries)

    return run


def _carlini_wagner(threat: Threat, steps: int) -> Run:
    """Under L2 the attack of the paper, with its binary search over c, whose result counts if it is near enough; under
    Linf projected ascent of its loss, since what it finds is near in L2 alone."""
    if threat.norm == "Linf":

        def climbed(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
            return climb(net, pixels, labels, threat, seeds, steps=steps, loss="margin")[0]

        return climbed

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        attacked = carlini_wagner(net, pixels, labels, steps=10 * steps)
        near = threat.allows(pixels, attacked)
        return torch.where(near.view(-1, 1, 1, 1), attacked, pixels)

    return run
