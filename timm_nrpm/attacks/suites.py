"""Suites of attacks: the paper's, AutoAttack as its authors define it, and the attacks made for this defence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle

import torch
from torch import Tensor

from timm_nrpm.attacks.apgd import climb
from timm_nrpm.attacks.carlini_wagner import carlini_wagner
from timm_nrpm.attacks.efforts import Effort
from timm_nrpm.attacks.evolution import HERD, PARTS, evolve
from timm_nrpm.attacks.library import MOST_TARGETS, Run, auto_attack, fgsm, original_auto_attack, pgd, square
from timm_nrpm.attacks.pursuit import Pursuit, ascend, likely_targets
from timm_nrpm.attacks.random_search import search
from timm_nrpm.attacks.sources import MEMBER
from timm_nrpm.attacks.sparse import PROPOSED, SPARSE, Sparse
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.checks import check_choice
from timm_nrpm.choices import SUITES
from timm_nrpm.nn.pixel_model import PixelModel

EXPECTATION = 8
"""Number of forwards for each gradient of a model whose forward is random (expectation over transformation,
arXiv 1707.07397)."""

CYCLE = ("soft", "plain", "soft_short", "halfway", "base")
"""Sources that the rounds follow in turn, and after them those of :func:`members_of`. A model with none of these but a
base is attacked along its own gradient."""

TURNS = ("margin", "cross_entropy")
"""Losses that the ascents climb in turn."""

SIZES = (0.25, 1.0, 0.5, 2.0)
"""Sizes of the first step, in units of eps, that the ascents from the worst points take in turn."""

EVERY = 3
"""Number of steps of an ascent along another model after which the attacked model is shown the points."""

SQUARE = 100
"""Number of queries of Square, which starts from scratch: an image that it breaks was missed along gradients."""

Pursue = Callable[[Pursuit, Tensor, PixelModel, list[int]], Tensor]
"""Function from a pursuit, the indices of the images to attack `[n]`, the model to follow and one seed for each image,
to whether the attacked model was right on every point of each image that this attack showed it, `[n]`."""


@dataclass(frozen=True)
class Attack:
    """A named attack. Attacks of the same name count as one attack that takes several turns.

    Attributes:
        name: Name of the attack in a report.
        source: Source whose gradient it follows, see :func:`timm_nrpm.sources.sources_of`; `"scores"` for an attack
            without gradients, and `"best"` for one that starts from the worst points that the others found.
        pursue: Function that runs the attack.
        passes: Approximate number of forwards and backwards for each image.
        always: Whether the attack serves for comparison, so that it also attacks images that are already broken.
        near: Largest share of its clean margin that an unbroken image may have left to be attacked.
        points: Number of points of each image that go through a model at once, if every image has random draws of its
            own, so that images of several batches can be attacked together; 0 for an attack that draws for a batch.
    """

    name: str
    source: str
    pursue: Pursue
    passes: int
    always: bool = False
    near: float = 1.0
    points: int = 0


def once(run: Run) -> Pursue:
    """Return an attack that shows the attacked model only its final points."""

    def pursue(pursuit: Pursuit, rows: Tensor, net: PixelModel, seeds: list[int]) -> Tensor:
        return pursuit.look(rows, run(net, pursuit.pixels[rows], pursuit.labels[rows], seeds))

    return pursue


def alone(attack: Attack, threat: Threat) -> Run:
    """Return an attack that runs by itself, on images that no other attack has seen, along the model it is given."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        pursuit = Pursuit(net, pixels, labels, threat)
        attack.pursue(pursuit, torch.arange(len(pixels), device=pixels.device), net, seeds)
        return pursuit.best

    return run


def attacks_of(
    suite: str, threat: Threat, effort: Effort, sources: Collection[str], classes: int, *, random: bool = False
) -> list[Attack]:
    """Return the attacks of a suite, in the order in which they run.

    - `"quick"`: FGSM and PGD along the model's own gradient, and PGD along the plain model's.
    - `"paper"`: FGSM, PGD, the margin loss of Carlini and Wagner, and AutoAttack (NRPM, Table 5).
    - `"standard"`: AutoAttack by torchattacks.
    - `"autoattack"`: AutoAttack by its authors' code, if that is installed.
    - `"adaptive"`: PGD along every gradient that can be compared, and then stages of a pursuit. Each stage has rounds,
      an ascent along another source and a random search from the worst points so far, and may end with an evolution.
      Later stages attack the images that are nearest to breaking.

    Args:
        suite: Name of the suite, one of `timm_nrpm.choices.SUITES`.
        threat: What an attacker may change.
        effort: Numbers of steps, queries and stages.
        sources: Names of the sources whose gradients can be followed.
        classes: Number of classes of the model.
        random: Whether the model's forward is random, so that gradients have to be averaged.

    Raises:
        ValueError: `suite` is not known, or has no attacks under the norm of `threat`.
        ImportError: The authors' AutoAttack is not installed.
    """
    check_choice("suite", suite, SUITES)
    library = threat.norm in ("Linf", "L2")
    if (suite in ("paper", "standard") and not library) or (suite == "autoattack" and threat.norm in SPARSE):
        raise ValueError(f'suite={suite!r} has no attacks under {threat.norm}: choose suite="adaptive" or "quick".')
    attacks: list[Attack] = []
    if suite not in ("standard", "autoattack"):
        if threat.norm == "Linf":
            attacks.append(Attack("fgsm", "own", once(fgsm(threat.eps)), 2, always=True))
        pursue, passes = once(pgd(threat, effort.pgd) if library else _direct(threat, effort)), 2 * effort.pgd
        attacks.append(Attack("pgd", "own", pursue, passes, always=True))
        # The same attack on every image along other gradients: if they break more, the model's own gradient misleads.
        compared = {"quick": ("plain",), "adaptive": ("plain", "base", "bpda")}.get(suite, ())
        compared += members_of(sources) if compared else ()
        attacks += [Attack(f"pgd_{name}", name, pursue, passes, always=True) for name in compared if name in sources]
    if suite == "paper":
        attacks.append(Attack("cw", "own", once(_carlini_wagner(threat, effort.steps)), 2 * effort.steps))
    if suite in ("paper", "standard", "autoattack"):
        make_runs = original_auto_attack if suite == "autoattack" else auto_attack
        for name, run in make_runs(threat, classes, effort.auto, effort.queries).items():
            scores = name == "aa_square"
            cost = effort.queries if scores else 2 * effort.auto * (1 if name == "aa_apgd_ce" else MOST_TARGETS)
            attacks.append(Attack(name, "scores" if scores else "own", once(run), cost))
    if suite == "adaptive":
        average = EXPECTATION if random else 1
        attacks += (
            _sparse(threat, effort, sources, average)
            if threat.norm in SPARSE
            else _pursuit(effort, sources, classes, average)
        )
        if library and effort.queries:
            attacks.append(Attack("square", "scores", once(square(threat, SQUARE)), SQUARE))
    return attacks


def _pursuit(effort: Effort, sources: Collection[str], classes: int, average: int) -> Iterator[Attack]:
    """Yield first ascents, and then the stages: rounds of an ascent and a random search, and evolutions.

    Of every three ascents two continue from the worst points, one up the margin and one up the cross-entropy. The third
    starts anew, alternately up one of these losses and up the margin of the next most likely target.
    """
    followed = _followed(sources)
    # Sources without an estimate come first: they are cheap, and leave fewer images to the others.
    starts = [name for name in ("plain", "base", "bpda") if name in sources] if "plain" in sources else ["own"]
    for name in (*starts, *members_of(sources)):
        yield _ascent(effort, name, "margin", average, size=0.5, momentum=0.75, fresh=name in ("plain", "own"))
    targets = count()
    turns = [(stage, rounds_left) for stage in effort.stages for rounds_left in reversed(range(stage.rounds))]
    herds = count()
    for turn, (stage, rounds_left) in enumerate(turns):
        group, kind = divmod(turn, 3)
        if kind < 2:
            loss = TURNS[kind]
            size = SIZES[turn % len(SIZES)]
            ascent = _ascent(effort, followed[turn % len(followed)], loss, average, size=size, momentum=0.5)
        else:
            rank = next(targets) % min(MOST_TARGETS, classes - 1) if group % 2 and classes > 2 else None
            loss = TURNS[group // 2 % 2] if rank is None else "margin"
            name = followed[group % len(followed)]
            ascent = _ascent(effort, name, loss, average, size=2.0, momentum=0.75, fresh=True, rank=rank)
        yield replace(ascent, near=stage.near)
        if effort.queries:
            yield Attack("search", "best", _search(effort.queries), effort.queries, near=stage.near, points=1)
        if effort.queries and stage.evolution and not rounds_left:
            # The start of a herd matters: three herds follow the smoothest source before one follows the next source.
            name = followed[next(herds) // 3 % len(followed)]
            evolution = _evolution(2 * effort.steps, stage.evolution * effort.queries // average, name, average)
            yield replace(evolution, near=stage.near)


def members_of(sources: Collection[str]) -> tuple[str, ...]:
    """Return the names of those sources that are parts of an ensemble."""
    return tuple(name for name in sources if name.startswith(MEMBER))


def _followed(sources: Collection[str]) -> list[str]:
    """Return the names of the sources that the rounds follow in turn."""
    members = members_of(sources)
    found = [name for name in CYCLE if name in sources] if "plain" in sources else ["own"]
    return [*(["own"] if members and "own" not in found else []), *found, *members]


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
    """Return an attack by :func:`timm_nrpm.attacks.pursuit.ascend`.

    Args:
        effort: Number of steps; an ascent that starts anew takes twice as many.
        source: Name of the source whose gradient it follows.
        loss: Loss to climb, one of `timm_nrpm.attacks.gradients.LOSSES`.
        average: Number of forwards that are averaged for each gradient.
        size: Size of the first step, in units of the threat's eps.
        momentum: Factor of the previous direction when the gradient is added to it.
        fresh: Whether to start anew, from random points within the threat.
        rank: Place of the target class among the likely targets; None for the strongest other class.
    """
    steps = effort.steps * (2 if fresh else 1)
    predicts = source in ("own", "bpda") and average == 1  # a single forward of a random model tells little

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

    passes = steps * (2 * average) + (0 if predicts else steps // EVERY)
    return Attack(f"ascent_{source}", source, pursue, passes, points=1)


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
    passes = HERD * (2 * gradients + queries) * average
    return Attack(f"evolution_{source}", source, pursue, passes, points=HERD)


def _climb(threat: Threat, steps: int, loss: str) -> Run:
    """Return Auto-PGD that takes all of its steps, even after the followed model gets an image wrong."""

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        return climb(net, pixels, labels, threat, seeds, steps=steps, loss=loss, fooled=False)[0]

    return run


def _direct(threat: Threat, effort: Effort) -> Run:
    """Return the attack that replaces PGD where torchattacks has none: Auto-PGD under L1, and few pixels otherwise."""
    if threat.norm == "L1":
        return _climb(threat, effort.pgd, "cross_entropy")
    return _few_pixels(threat, effort.pgd)


def _sparse(threat: Threat, effort: Effort, sources: Collection[str], average: int) -> Iterator[Attack]:
    """Yield the attacks of the adaptive suite on few pixels, or on those of a patch. Judged ones start from the images
    along every source, and then from the worst points along one source for each stage. A random search ends them."""
    kind = SPARSE[threat.norm]
    for source in ("plain", "base", "own", "bpda", "soft", "soft_short", "halfway", *members_of(sources)):
        if source in sources:
            yield _judged(kind, effort, source, average, fresh=True)
    for stage, source in zip(effort.stages, cycle(_followed(sources)), strict=False):
        yield replace(_judged(kind, effort, source, average, fresh=False), near=stage.near)
    queries = effort.queries * sum(stage.rounds + stage.evolution for stage in effort.stages)
    if queries:
        yield Attack(kind.search.__name__, "scores", once(_random_pixels(threat, queries)), queries)


def _judged(kind: Sparse, effort: Effort, source: str, average: int, *, fresh: bool) -> Attack:
    """Return an attack on few pixels that goes on from what the attacked model judges best."""

    def pursue(pursuit: Pursuit, rows: Tensor, net: PixelModel, seeds: list[int]) -> Tensor:
        kind.judged(pursuit, rows, net, rounds=effort.pgd, fresh=fresh, average=average)
        return pursuit.right[rows]

    passes = effort.pgd * average * (2 + PROPOSED)
    return Attack(f"{kind.judged.__name__}_{source}", source, pursue, passes, points=1)


def _few_pixels(threat: Threat, steps: int) -> Run:
    ascent = SPARSE[threat.norm].ascent

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        return ascent(net, pixels, labels, threat, rounds=steps, average=1, fooled=False)

    return run


def _random_pixels(threat: Threat, queries: int) -> Run:
    search = SPARSE[threat.norm].search

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        return search(net, pixels, labels, threat, seeds, queries=queries)

    return run


def _carlini_wagner(threat: Threat, steps: int) -> Run:
    """Return the attack of Carlini and Wagner: under L2 with their binary search over c, whose result is kept where it
    is within the bound; under Linf projected ascent of their loss, since the points that their search finds are near
    only in L2."""
    if threat.norm == "Linf":

        def climbed(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
            return climb(net, pixels, labels, threat, seeds, steps=steps, loss="margin")[0]

        return climbed

    def run(net: PixelModel, pixels: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
        attacked = carlini_wagner(net, pixels, labels, steps=10 * steps)
        near = threat.allows(pixels, attacked)
        return torch.where(near.view(-1, 1, 1, 1), attacked, pixels)

    return run
