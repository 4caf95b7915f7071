"""How hard the attacks of a suite try: their steps, queries and stages."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """A part of the adaptive suite.

    Attributes:
        near: Largest share of its clean margin that an unbroken image may have left to be attacked in this stage.
        rounds: Number of rounds, each an ascent followed by a random search.
        evolution: Queries for each point of the evolution that ends the stage, as a multiple of the queries of a
            round's random search; 0 for no evolution.
    """

    near: float
    rounds: int = 6
    evolution: int = 0


@dataclass(frozen=True)
class Effort:
    """How hard the attacks of a suite try.

    Attributes:
        steps: Number of gradients of one ascent; in the adaptive suite twice as many where the ascent starts anew.
        queries: Number of forwards of one random search.
        pgd: Number of steps of PGD; the default is the paper's.
        auto: Number of steps of AutoAttack; the default is its authors'.
        stages: Stages of the adaptive suite; empty for the other suites.
    """

    steps: int
    queries: int
    pgd: int = 20
    auto: int = 100
    stages: tuple[Stage, ...] = ()

    @property
    def rounds(self) -> int:
        """Number of rounds in all stages together."""
        return sum(stage.rounds for stage in self.stages)

    @property
    def evolutions(self) -> int:
        """Number of stages that end with an evolution."""
        return sum(stage.evolution > 0 for stage in self.stages)


FAST = (Stage(1.0), Stage(1 / 2))


NEAR = (Stage(1 / 3, 2, 8), Stage(1 / 6, 2, 12), Stage(1 / 12, 2, 20), Stage(1 / 4))
"""Stages that follow `FAST`. Images that many attacks have hardly moved are rarely broken by more of the same, so that
these stages attack fewer and fewer images; the last one climbs from where the evolutions have ended."""


EFFORTS = {
    "quick": Effort(20, 0),
    "paper": Effort(20, 5000),
    "standard": Effort(100, 5000),
    "autoattack": Effort(100, 5000),
    "adaptive": Effort(10, 20, stages=(*FAST, *NEAR)),
}


LEVELS = {
    "fast": replace(EFFORTS["adaptive"], stages=FAST),
    "default": EFFORTS["adaptive"],
    "exhaustive": replace(EFFORTS["adaptive"], stages=20 * (Stage(1.0, 12, 10),)),
}
"""Settings of the adaptive suite, by the name of the effort that a user chooses."""
