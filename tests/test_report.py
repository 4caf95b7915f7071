import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from timm_nrpm import AttackResult, RobustnessReport, Threat


def attack(name, *survived, source="own"):
    return AttackResult(name, source, survived, 10, 5, 0.5)


def report(**changes):
    found = RobustnessReport(
        threat=Threat("Linf", 0.1),
        suite="adaptive",
        steps=50,
        queries=300,
        seed=3,
        clean=(True, True, True, False),
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


@settings(deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_the_interval_is_clopper_and_pearsons(case):
    n, right = case
    low, high = report(clean=(True,) * right + (False,) * (n - right), attacks=()).interval()
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
    assert lines[1].startswith("4 images, Linf 0.1, adaptive: clean 75.0 %, worst case 25.0 % (95 %: 0.6 to 80.6)")
    assert lines[1].endswith("the plain model 75.0 and 25.0 %")
    assert [line.split()[:2] for line in lines[2:]] == [["pgd", "50.0"], ["square", "25.0"]]
    assert not str(report(flags=())).startswith("FLAGS")
    assert str(report(attacks=())).count("\n") == 1


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().seed = 4


@pytest.mark.parametrize(
    "change",
    [
        {"clean": []},
        {"clean": [1, 0, 1, 1]},
        {"clean": [True]},
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
