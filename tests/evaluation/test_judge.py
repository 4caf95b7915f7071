"""The order of a judgement: what is attacked with which seeds, what is told meanwhile, what is probed."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from timm_nrpm import Threat
from timm_nrpm.attacks.efforts import EFFORTS
from timm_nrpm.attacks.sources import sources_of
from timm_nrpm.attacks.suites import EXPECTATION
from timm_nrpm.evaluation import judge as wing
from timm_nrpm.evaluation.judge import Judge, Places, Protocol

THREAT = Threat("Linf", 0.04)  # which breaks some images, and not others


class Noisy(nn.Module):
    """A linear model of eight by eight pixels whose logits jump at every forward."""

    def __init__(self, noise):
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.noise = nn.Linear(64, 4), noise

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        return logits + self.noise * torch.rand_like(logits)


def made(suite="quick", noise=0.0):
    effort = replace(EFFORTS[suite], steps=2, queries=4)
    return Judge(sources_of(Noisy(noise)), Protocol(THREAT, suite, effort, 7))


def images(judge, count):
    """Images and the classes that the model gives them, but for the last image, whose class is another."""
    pixels = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = judge.logits(pixels).argmax(1)
    labels[-1] = (labels[-1] + 1) % 4
    return pixels, labels


def places(count, first=0):
    return Places(list(range(first, first + count)), [count])


def quiet(share, activity):
    pass


@pytest.mark.parametrize("suite", ["quick", "adaptive"])
def test_what_is_told(suite):
    """The share of the work, which never falls, and the attack with the number of images that are left."""
    judge, told = made(suite), []
    judge(*images(judge, 6), places(6), lambda *each: told.append(each))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert len(set(shares)) > 2
    assert told[-1][1] == "looking for flags"
    assert all(re.fullmatch(r"\w+, [0-5] of 6 left", activity) for _, activity in told[:-1])
    assert told[0][1].endswith(", 5 of 6 left")


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_random_forward_is_averaged_over(monkeypatch, noise):
    judge, asked, pursued = made("adaptive", noise), [], []
    attacks_of, pursuit = wing.attacks_of, wing.Pursuit
    monkeypatch.setattr(wing, "attacks_of", lambda *given, random: (asked.append(random), attacks_of(*given))[1])
    monkeypatch.setattr(wing, "Pursuit", lambda *given: (pursued.append(given[-1]), pursuit(*given))[1])
    judge(*images(judge, 4), places(4), quiet)
    assert (asked, pursued) == ([noise > 0], [EXPECTATION if noise else 1])


def test_what_is_noted_of_each_image():
    """Attacks that are compared with each other are made on all that were right, and say nothing of the others; a later
    one says that an image which still stands survived, whether it was near enough to be attacked or not.
    """
    judge = made("adaptive")
    outcome = judge(*images(judge, 6), places(6), quiet)
    assert outcome.clean == "111110"
    assert outcome.attacks["pgd"].source == "own"
    codes = {name: turn.survived for name, turn in outcome.attacks.items()}
    assert all(code[-1] == "-" for code in codes.values())
    assert set(codes["pgd"][:-1]) == {"0", "1"}
    later = [code for name, code in codes.items() if name not in ("fgsm", "pgd")]
    broken = [any(code[i] == "0" for code in codes.values()) for i in range(5)]
    assert later
    assert all(code[i] == "1" for code in later for i in range(5) if not broken[i])
    assert any("-" in code[:-1] for code in later)  # broken before


def test_seeds_are_those_of_the_images_and_the_turn(monkeypatch):
    """Comparable attacks share theirs, every later turn has its own, and probes have those before all turns."""
    judge, seeds, seed_of = made("adaptive"), [], wing.seed_of
    monkeypatch.setattr(wing, "seed_of", lambda *given: (seeds.append(given), seed_of(*given))[1])
    judge(*images(judge, 4), places(4, first=30), quiet)
    assert seeds[0] == (7, -2, 30)
    turns = {}
    for seed, turn, number in seeds[1:]:
        assert seed == 7
        turns.setdefault(turn, set()).add(number)
    assert turns[0] == {30, 31, 32}  # the fourth is wrong when clean
    assert set(turns[-1]) <= {30, 31, 32}
    assert len(turns) > 3
    assert all(numbers <= {30, 31, 32} for numbers in turns.values())


@pytest.mark.parametrize(("suite", "steps"), [("quick", 0), ("adaptive", 2)])
def test_what_is_probed(monkeypatch, suite, steps):
    """The first images of the loader that are right, with attacks only where the suite has the time."""
    judge, probed = made(suite), []
    monkeypatch.setattr(wing, "probe", lambda *given, steps: (probed.append((len(given[1]), given[-1], steps)), {})[1])
    judge(*images(judge, 6), places(6, first=wing.PROBED - 3), quiet)
    assert probed == [(3, [wing.seed_of(7, -1, wing.PROBED - 3 + i) for i in range(3)], steps)]


def test_a_label_for_each_image():
    judge = made()
    pixels, labels = images(judge, 4)
    with pytest.raises(ValueError, match="label"):
        judge(pixels, labels[:3], places(4), quiet)
    with pytest.raises(ValueError, match="4"):
        judge(pixels, labels + 4, places(4), quiet)
