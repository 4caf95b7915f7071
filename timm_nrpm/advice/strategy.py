"""The interface of strategies: what each tries, one candidate after the other, and why it may not be tried at all."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from timm_nrpm.advice.study import Study
from timm_nrpm.evaluation.trials import Kept, Trial


@dataclass(frozen=True)
class Candidate:
    """A model that may be tried.

    Attributes:
        setting: Its settings in words, which name it among all candidates.
        make: Function that makes it. It is not called where the trial is known from an earlier run.
        on_clean: Function that makes the model that would be used on clean images, where that is another one.
        control: Setting of the candidate that costs as much and has no estimate; empty for the model as it is.
        is_trained: Whether its weights are others than the model's.
        seconds: Expected time of making it, in seconds.
        judged: Function from the model and the name of a part to the images that it is right on, where these are not
            found by attacks.
        forwards: Number of forwards for one prediction.
    """

    setting: str
    make: Callable[[], nn.Module]
    on_clean: Callable[[], nn.Module] | None = None
    control: str = ""
    is_trained: bool = False
    seconds: float = 0.0
    judged: Callable[[nn.Module, str], Kept] | None = None
    forwards: int = 1


Candidates: TypeAlias = Generator[Candidate, Trial, None]
"""Candidates one after the other; each is answered by its trial, on which the next may depend."""


def anything(_: Study) -> str:
    """No obstacle to any study."""
    return ""


@dataclass(frozen=True)
class Strategy:
    """A way to make a model more robust.

    Attributes:
        name: Its name in tables.
        candidates: Function that yields its candidates for a study.
        obstacle: Function that says why it cannot be tried; an empty text if it can.
    """

    name: str
    candidates: Callable[[Study], Candidates]
    obstacle: Callable[[Study], str] = anything
