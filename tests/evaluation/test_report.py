import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from timm_nrpm import RobustnessReport, Threat
from timm_nrpm.evaluation.report import AttackResult


def attack(name, *survived, source="own"):
    return AttackResult(name, source, survived, 10, 5, 0.5)


def report(**changes):
    found = RobustnessReport(
        threat=Threat("Linf", 0.1),
        suite="adaptive",
        steps=50,
        queries=300,
        seed=3,
        correct=(True, True, True, False),
        attacks=(attack("pgd", True, True, False, None), attack("square", False, True, None, None, source="scores")),
        flags=("gradient_masking",),
        evidence={"gradient_masking": 0.25},
        versions={"torch": "2"},
        sha256="abc",
        warnings=("careful </script> & <b>",),
        seconds=1.0,
    )
    return dataclasses.replace(found, **changes)


def test_shares_by_hand():
    r = report()
    assert r.accuracy() == 0.75
    assert (r.accuracy("pgd"), r.accuracy("square")) == (0.5, 0.25)
    assert r.survivors == (False, True, False, False)
    assert r.worst_case == 0.25
    assert [(a.tried, a.broke) for a in r.attacks] == [(3, 1), (2, 1)]
    with pytest.raises(ValueError, match="it has clean, pgd, square"):
        r.accuracy("pdg")


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_interval_is_clopper_and_pearsons(case):
    n, right = case
    low, high = report(correct=(True,) * right + (False,) * (n - right), attacks=()).interval()
    assert low == pytest.approx(beta.ppf(0.025, right, n - right + 1) if right else 0.0)
    assert high == pytest.approx(beta.ppf(0.975, right + 1, n - right) if right < n else 1.0)
    assert low <= right / n <= high


def test_json_both_ways():
    r = report(control=report(flags=(), seed=3))
    text = r.to_json()
    assert RobustnessReport.from_json(text) == r
    assert RobustnessReport.from_json(text).to_json() == text
    summary = json.loads(text)["summary"]
    assert summary["worst_case"] == 0.25
    assert summary["flags"] == ["gradient_masking"]
    assert summary["accuracies"] == {"clean": 0.75, "pgd": 0.5, "square": 0.25}


def test_text_says_the_flags_first_and_every_attack():
    lines = str(report(control=report())).splitlines()
    assert lines[0] == "FLAGS: gradient_masking. See docs/flags.md."
    assert lines[1] == report(control=report()).verdict
    assert lines[2] == "4 images, Linf 0.1, adaptive: clean 75.0 %; the plain model 75.0 %"
    assert [line.split()[:2] for line in lines[3:]] == [["pgd", "50.0"], ["square", "25.0"]]
    assert not str(report(flags=())).startswith("FLAGS")
    assert str(report(attacks=())).count("\n") == 2


def beside(ours: str, theirs: str, **changes) -> RobustnessReport:
    """A report in which images survive as digits say."""
    model, plain = (
        report(correct=(True,) * len(digits), attacks=(attack("pgd", *(d == "1" for d in digits)),), flags=())
        for digits in (ours, theirs)
    )
    return dataclasses.replace(model, control=plain, **changes)


def test_the_verdict_is_one_sentence_with_mcnemars_test_behind_it():
    worse = beside("1" * 10 + "0" * 20, "1" * 25 + "0" * 5)
    assert worse.apart == (0, 15)
    assert worse.p_value == pytest.approx(2 * 0.5**15)  # all fifteen on one side, two-sided
    assert worse.verdict == (
        "At Linf 0.1 this variant keeps 33.3 % (17.3 to 52.8) of 30 images in the worst case, the plain model 83.3 %: "
        "it is worse, by 15 images against 0 (McNemar's exact test, p = 6.1e-05)."
    )
    assert "it is better, by 15 images against 0" in beside("1" * 25 + "0" * 5, "1" * 10 + "0" * 20).verdict
    told = "no difference can be told, 1 images against 2 (McNemar's exact test, p = 1)"
    assert told in beside("1100", "1011").verdict
    assert "no difference can be told, 0 images against 0" in beside("10", "10").verdict
    assert "the same weights at lambda 1 83.3 %" in dataclasses.replace(worse, plain="trained").verdict
    assert "under the suite quick, which is no worst case" in dataclasses.replace(worse, suite="quick").verdict
    assert report().verdict.endswith("in the worst case; nothing stands beside it.")
    assert json.loads(worse.to_json())["summary"]["verdict"] == worse.verdict


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_p_value_is_that_of_the_binomial(pairs):
    ours, theirs = ("".join(str(int(pair[i])) for pair in pairs) for i in (0, 1))
    b, c = (sum(pair == which for pair in pairs) for which in ((True, False), (False, True)))
    want = min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))
    assert beside(ours, theirs).p_value == pytest.approx(want)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().seed = 4


@pytest.mark.parametrize(
    "change",
    [
        {"correct": []},
        {"correct": [1, 0, 1, 1]},
        {"correct": [True]},
        {"plain": "another"},
        {"flags": [["x"]]},
        {"warnings": [3]},
        {"data": None},
        {"suite": {}},
    ],
)
def test_what_is_no_report(change):
    told = json.loads(report().to_json())
    assert RobustnessReport.from_dict(told) == report()
    with pytest.raises(ValueError, match="This is no report"):
        RobustnessReport.from_dict({**told, **change})
