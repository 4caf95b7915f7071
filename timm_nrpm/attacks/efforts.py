"""How hard the attacks of a suite try: their steps, queries and stages."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """A part of the adaptive suite.

    Attributes:
        near: Which of the images that stand it is for: those with at most this share of their clean margin left.
        rounds: Ascents, each with its search.
        evolution: The search of a herd at the end, by how much it is longer than that of a round; 0 for none.
    """

    near: float
    rounds: int = 6
    evolution: int = 0


@dataclass(frozen=True)
class Effort:
    """How hard the attacks of a suite try.

    Attributes:
        steps: Gradients of one ascent; of the adaptive suite, twice as many where it starts anew.
        queries: Forwards of one random search.
        pgd: Steps of PGD, the paper's.
        auto: Steps of AutoAttack, its authors'.
        stages: Of the adaptive suite.
    """

    steps: int
    queries: int
    pgd: int = 20
    auto: int = 100
    stages: tuple[Stage, ...] = ()

    @property
    def rounds(self) -> int:
        """Of all stages together."""
        return sum(stage.rounds for stage in self.stages)

    @property
    def evolutions(self) -> int:
        """How many stages end with one."""
        return sum(stage.evolution > 0 for stage in self.stages)


FAST = (Stage(1.0), Stage(1 / 2))


NEAR = (Stage(1 / 3, 2, 8), Stage(1 / 6, 2, 12), Stage(1 / 12, 2, 20), Stage(1 / 4))
"""More of the same rarely breaks what many attacks have hardly moved, so stages are for fewer and fewer images; the
last climbs from where evolutions have ended."""


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
"""Of the adaptive suite, by the effort a user asks for."""
