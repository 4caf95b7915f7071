"""What is advised among any candidates in any time: nothing better is left, and no image serves two purposes."""

import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from torch import nn

import timm_nrpm
from timm_nrpm import Shift
from timm_nrpm.advice import inquiry as wing
from timm_nrpm.advice.advise import _check_apart, _divided
from timm_nrpm.advice.inquiry import SHARE, Inquiry
from timm_nrpm.advice.strategy import Candidate, Strategy
from timm_nrpm.advice.study import Part, Study
from timm_nrpm.evaluation.trials import NEAR, NOTHING, Bounds

N = 20
LOSS, SLOWDOWN = 20.0, 3.0  # four images of the twenty, and three forwards
PLAIN = (16, 8)


def images(numbers):
    """Images that tell their number, a batch of three at a time."""
    pixels = torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1) / 1000
    labels = torch.zeros(len(numbers), dtype=torch.long)
    return list(zip(pixels.split(3), labels.split(3), strict=True))


class Table(nn.Module):
    """A model that is right on so many of N clean images, and on so many shifted ones, which are brighter by 0.5."""

    def __init__(self, clean, shifted):
        super().__init__()
        self.layer, self.right = nn.Linear(1, 2), (clean, shifted)

    def forward(self, x):
        pixels = x.flatten(1)[:, 0]
        number = (1000 * (pixels % 0.5)).round() % N
        hits = (number < torch.where(pixels < 0.5, *self.right)).float()
        return torch.stack([hits, 1 - hits], 1)


def advice_of(offers, seconds):
    """The advice on some candidates, and the settings of those that were tried, on a clock that making them moves.

    `offers` has them by strategy: what each is right on, clean and shifted, its forwards, and its seconds, which are
    known before. The second of a strategy and those after it have the first as their control.
    """
    clock, tried = [0.0], []

    def now():
        clock[0] += 1e-6  # measuring takes next to no time
        return clock[0]

    def candidates(name):
        def of(study):
            for number, (clean, shifted, forwards, cost) in enumerate(offers[name]):

                def make(setting=f"{name}{number}", model=(clean, shifted), cost=cost):
                    clock[0] += cost
                    tried.append(setting)
                    return Table(*model)

                control = f"{name}0" if number else ""
                yield Candidate(f"{name}{number}", make, control=control, forwards=forwards, seconds=cost)

        return of

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(wing, "STRATEGIES", tuple(Strategy(name, candidates(name)) for name in offers))
        patch.setattr(wing.time, "perf_counter", now)
        patch.setattr(Inquiry, "_save", lambda *_: None)  # a variant of what timm cannot build
        model = timm_nrpm.reprogram_(Table(*PLAIN), timm_nrpm.NRPMConfig(lam=1.0))
        parts = [Part.of(images(range(start, start + N))) for start in (0, N)]
        bounds = Bounds(clean_loss=LOSS, slowdown=SLOWDOWN, effect=50.0, seconds=seconds)
        study = Study(model, Shift(), *parts, None, bounds, "fast", 0, Path(folder), (0.0,), (1.0,))
        study._shifted = {name: part.pixels + 0.5 for name, part in study.parts.items()}
        study.danger = Shift("fog")
        return Inquiry(study, Progress(disable=True)).advice(), list(dict.fromkeys(tried))


candidate = st.tuples(st.integers(8, N), st.integers(0, N), st.integers(1, 4), st.integers(0, 30))
offered = st.dictionaries(st.sampled_from("abcd"), st.lists(candidate, min_size=1, max_size=3), min_size=1)


@settings(max_examples=30)
@given(offered, st.integers(1, 100), st.booleans())
def test_a_strategy_takes_no_more_than_its_share_of_the_time_and_leaves_none_that_fits(offers, whole, fast):
    """Slower candidates may have to leave more of the time to the report images."""
    if fast:
        offers = {
            name: [(clean, shifted, 1, cost) for clean, shifted, _, cost in each] for name, each in offers.items()
        }
    seconds, spent = whole + 0.25, 0.0  # no sum of seconds comes to exactly a share
    _, tried = advice_of(offers, seconds)
    for name, candidates in offers.items():
        sums = list(accumulate(cost for *_, cost in candidates))
        fits = sum(total <= SHARE * (seconds - spent) for total in sums)
        mine = [setting for setting in tried if setting.startswith(name)]
        assert mine == [f"{name}{number}" for number in range(len(mine))]
        assert len(mine) == fits if fast else len(mine) <= fits
        spent += sums[len(mine) - 1] if mine else 0.0
    assert spent <= seconds


def merit(found):
    """What of a trial counts on the images of the selection: points gained, points kept clean, and speed."""
    return found.selection.accuracy, found.selection.clean_accuracy, -found.slowdown


@settings(max_examples=30)
@given(offered)
def test_what_is_chosen_is_within_the_bounds_and_no_other_is_better_in_all(offers):
    advice, _ = advice_of(offers, 1e6)
    every = {f"{name}{i}": offer for name, candidates in offers.items() for i, offer in enumerate(candidates)}
    allowed = {NOTHING: (*PLAIN, 1, 0)}
    least = PLAIN[0] - LOSS / 100 * N
    allowed |= {name: each for name, each in every.items() if each[0] >= least and each[2] <= SLOWDOWN}
    gain = max(shifted for _, shifted, *_ in allowed.values()) - PLAIN[1]
    chosen = NOTHING if advice.chosen is advice.nothing else advice.chosen.setting
    assert chosen in allowed
    clean, shifted, forwards, _ = allowed[chosen]
    assert shifted - PLAIN[1] >= NEAR * gain - 1e-9
    for other in allowed.values():
        better = (other[0] >= clean, other[1] >= shifted, other[2] <= forwards)
        assert not all(better) or other[:3] == (clean, shifted, forwards)
    first = chosen[:1] + "0"
    if chosen != NOTHING and chosen != first and first in allowed:  # its control is judged as well
        assert advice.control(advice.chosen).report is not None
        assert advice.advised.setting in (chosen, first)
    assert all(each.report is not None for each in (advice.nothing, advice.chosen, advice.advised))


@settings(max_examples=20)
@given(offered, st.randoms(use_true_random=False))
def test_the_order_of_the_strategies_chooses_nothing(offers, random):
    """Where there is time for all; of equal candidates the first is taken, which are as good."""
    other = random.sample(sorted(offers), len(offers))
    one, two = (advice_of(each, 1e6)[0] for each in (offers, {name: offers[name] for name in other}))
    assert merit(one.chosen) == merit(two.chosen)


numbers = st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True)


@settings(max_examples=80)
@given(numbers, numbers, st.none() | numbers)
def test_images_of_two_purposes_are_refused_with_their_number(selection, report, training):
    sets = [set(selection), set(report), set(training or ())]
    parts = Part.of(images(selection)), Part.of(images(report))
    shared = [len(sets[a] & sets[b]) for a, b in ((2, 0), (0, 1), (2, 1)) if sets[a] & sets[b]]
    loader = None if training is None else images(training)
    if not shared:
        _check_apart(*parts, loader)
        return
    with pytest.raises(ValueError, match=r"of the images to .* are also among those to ") as caught:
        _check_apart(*parts, loader)
    assert int(str(caught.value).split()[0]) == shared[0]


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(0, 99))
def test_images_that_are_divided_are_each_in_one_half(count, seed):
    halves = [sorted(part.digests()) for part in _divided(images(range(count)), None, seed)]
    assert sorted(halves[0] + halves[1]) == sorted(Part.of(images(range(count))).digests())
    assert len(halves[1]) - len(halves[0]) == count % 2
    again = [sorted(part.digests()) for part in _divided(images(range(count)), None, seed)]
    assert again == halves
