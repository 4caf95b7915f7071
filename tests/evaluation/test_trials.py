"""Advice as a result: which trial is chosen, when it is advised, and what is said."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_nrpm.evaluation.trials import NOTHING, Advice, Bounds, Effect, Kept, Trial

N = 120


def digits(right, of=N):
    """The first so many of the images are right."""
    return "1" * right + "0" * (of - right)


def trial(name, selection=None, report=None, clean=N, clean_report=None, **more):
    selection = None if selection is None else Kept(digits(clean), digits(selection))
    clean_report = clean if clean_report is None else clean_report
    report = None if report is None else Kept(digits(clean_report), digits(report))
    return Trial(name, f"{name} as set", 1.0, 1.0, selection=selection, report=report, **more)


def advice(*trials, **untried):
    return Advice("Linf 0.1", Bounds(), (trial("nothing", 40, 40), *trials), untried)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_effect_is_that_of_its_definition(pairs):
    ours, theirs = ("".join(str(int(pair[i])) for pair in pairs) for i in (0, 1))
    effect = Effect.of(ours, theirs)
    b, c, n = sum(a and not t for a, t in pairs), sum(t and not a for a, t in pairs), len(pairs)
    assert effect.points == pytest.approx(100 * (b - c) / n)
    # Agresti and Min: Wald's interval after half an image is added to each cell of the table of both models
    p, q, m = (b + 0.5) / (n + 2), (c + 0.5) / (n + 2), n + 2
    half = 1.96 * math.sqrt((p + q - (p - q) ** 2) / m)
    assert (effect.low, effect.high) == pytest.approx((100 * (p - q - half), 100 * (p - q + half)))
    tails = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert effect.p_value == pytest.approx(min(1.0, 2 * tails))


def test_the_interval_covers_the_truth_and_chance_is_rarely_taken_for_a_gain():
    random = np.random.default_rng(0)
    covered, gains = 0, 0
    for _ in range(1000):
        both = random.choice(4, size=N, p=[0.5, 0.15, 0.15, 0.2])  # equally good models that differ
        effect = Effect.of("".join("01"[int(k in (0, 1))] for k in both), "".join("01"[int(k in (0, 2))] for k in both))
        covered += effect.low <= 0 <= effect.high
        gains += effect.is_gain
    assert 930 <= covered <= 975
    assert gains <= 30


def test_the_best_on_the_selection_is_advised_if_the_report_tells_its_gain():
    found = advice(trial("a", 60, 70), trial("b", 70, 80), trial("c", 65, 90))
    assert found.chosen.strategy == "b"  # on the report c is better, which nobody may look at
    assert found.helps
    assert found.sentence.startswith("Against Linf 0.1, b (b as set): +33.3 (")
    assert "120 images that nothing was chosen on" in found.sentence


def test_of_nearly_the_same_gain_the_one_that_costs_less_clean_accuracy_is_chosen():
    dear, cheap, poor = trial("a", 80, 80, clean=118), trial("b", 77, 77, clean=119), trial("c", 70, 70)
    assert advice(dear, cheap, poor).chosen is cheap  # 37 images of 40 gained, at a loss of one in place of two
    assert advice(dear, trial("b", 75, 75, clean=119), poor).chosen is dear
    fast, slow = trial("d", 78, 78), replace(trial("e", 79, 79), slowdown=5.0)
    assert advice(slow, fast).chosen is fast  # neither loses any
    assert advice(trial("a", 40, 40)).chosen.strategy == NOTHING


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "nothing can be advised: nothing was tried"),
        ([trial("a", 40, 80)], "leave the model as it is: nothing that was tried gains"),  # no gain on the selection
        ([trial("a", 60, 44)], "leave the model as it is: the best, a .a as set., has .3.3 .* cannot be told from"),
        ([trial("a", 60, 30)], "leave the model as it is: the best, a .* has -8.3 "),
        ([trial("a", 90, 90, clean=110)], "leave the model as it is: nothing that was tried gains"),  # 8.3 points
        ([trial("a", 90, 90, clean_report=110)], r"but it loses 8.3 points clean \(3.1 to 13.3\), more than 2\.$"),
        ([trial("a", 90, 90, clean_report=117)], r"loses 2.5 points clean .*, more than 2; with more images it might"),
        ([trial("a", rejected="12.0 times the latency")], "leave the model as it is: nothing"),
        ([trial("a", 60)], "nothing can be advised yet: a .* the time was over"),
    ],
)
def test_what_is_not_advised(trials, words):
    found = advice(*trials)
    assert not found.helps
    assert re.search(words, found.sentence)


def test_what_its_control_does_as_well_is_not_advised():
    plain = trial("tuning", 80, 85)
    ours = trial("tuned too", 82, 87, control="tuning as set")
    found = advice(plain, ours)
    assert found.chosen is ours
    assert found.advised is plain  # two images more of 120 are chance
    assert found.helps
    assert "tuning (tuning as set)" in found.sentence
    alone = advice(trial("tuning", rejected="loses 3.0 points clean"), ours)
    assert alone.advised is ours  # a control that is not allowed controls nothing
    better = advice(plain, trial("tuned too", 82, 100, control="tuning as set"))
    assert better.advised.strategy == "tuned too"


def test_the_table_has_a_row_for_each_strategy(capsys):
    found = advice(
        trial("a", 50, 50), trial("a", 60, 70), trial("b", rejected="12.0 times the latency"), c="there is no time"
    )
    lines = str(found).splitlines()
    assert len(lines) == 6
    assert [line.split("  ")[0] for line in lines[1:4]] == ["nothing", "a", "b"]
    assert "+16.7 (" in lines[2]  # the better of both
    assert "12.0 times the latency" in lines[3]
    assert lines[4] == "not tried: c, since there is no time"


def test_json_both_ways():
    found = advice(trial("a", 60, 70), trial("b", rejected="too slow"), trial("c", 20), d="why")
    assert Advice.from_json(found.to_json()) == found


@pytest.mark.parametrize(("effect", "images"), [(5, 120), (1, 600), (7, 86), (100, 6)])
def test_the_fewest_images_that_an_effect_can_be_told_on(effect, images):
    assert Bounds(effect=effect).images == images
    more = round(effect * images / 100 + 1e-9) if effect * images % 100 == 0 else math.ceil(effect * images / 100)
    assert Effect.of(digits(more, images), digits(0, images)).is_gain
    assert not Effect.of(digits(5, images), digits(0, images)).is_gain
