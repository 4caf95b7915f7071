import pytest

from timm_nrpm import RobustnessReport, Threat
from timm_nrpm.attacks.flags import CLIMBING, MASKED, PLAIN_CHANGED
from timm_nrpm.evaluation.report import AttackResult
from timm_nrpm.figures.guide import TOO_WEAK, next_steps

LAST = "Quote the worst case with its interval, and never the accuracy along the own gradient alone."


def made(survived=10, beside=10, suite="adaptive", flags=()):
    """Twenty images, of which the first `survived` stay right, and `beside` in the control; None for no control."""
    settings = {"threat": Threat("Linf", 0.1), "suite": suite, "steps": 1, "queries": 1, "seed": 0}

    def report(kept, **more):
        outcome = tuple(i < kept for i in range(20))
        attacks = (AttackResult("pgd", "own", outcome, 1, 1, 0.0),)
        return RobustnessReport(**settings, correct=(True,) * 20, attacks=attacks, **more)

    return report(survived, flags=flags, control=None if beside is None else report(beside))


@pytest.mark.parametrize(
    ("report", "starts"),
    [
        (made(20, 1), []),  # the two differ
        (made(10, 9), ["Take more images"]),
        (made(20, 1, suite="quick"), ["Run the suite adaptive"]),
        (made(20, None), ["If this model is reprogrammed"]),
        (made(20, 1, flags=(MASKED,)), ["Read what each flag means"]),
        *((made(20, 1, flags=(flag,)), ["Run longer attacks", "Read what each flag means"]) for flag in TOO_WEAK),
        (made(20, 1, flags=(PLAIN_CHANGED,)), ["Give the model", "Read what each flag means"]),
        (
            made(20, None, "quick", (CLIMBING,)),
            ["Run the suite adaptive", "If this model", "Run longer attacks", "Read what each flag means"],
        ),
    ],
)
def test_what_to_do_next_depends_on_the_report(report, starts):
    *steps, last = next_steps([report])
    assert last == LAST
    assert len(steps) == len(starts)
    assert all(step.startswith(start) for step, start in zip(steps, starts, strict=True))


def test_one_report_of_several_is_enough():
    assert next_steps([made(20, 1), made(10, 9)]) == next_steps([made(10, 9)])
