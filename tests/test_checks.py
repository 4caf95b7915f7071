from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from timm_nrpm import NRPMConfig, Threat, TuneConfig, certify
from timm_nrpm.checks import check_choice, check_integer, check_number

HALVES = (
    0.5,
    Fraction(1, 2),
    np.float16(0.5),
    np.float32(0.5),
    np.float64(0.5),
    np.array(0.5, np.float32),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16),
    torch.nn.Parameter(torch.tensor(0.5)),
)
TWOS = (2, np.int64(2), np.uint8(2), np.array(2, np.int32), torch.tensor(2), torch.tensor(2, dtype=torch.uint8))
NO_NUMBERS = (
    *(True, False, np.True_, torch.tensor(True), None, "0.5", b"1", 1j, Decimal("0.5"), [0.5], (1,), {}),
    *(np.array([0.5]), torch.tensor([0.5]), torch.tensor(1j), np.datetime64(1, "s"), float, object()),
)


@pytest.mark.parametrize("value", HALVES, ids=repr)
def test_every_half_is_a_half(value):
    found = check_number("x", value, above=0, most=1)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("value", TWOS, ids=repr)
def test_every_two_is_a_two(value):
    for found, kind in ((check_integer("x", value, least=1), int), (check_number("x", value), float)):
        assert type(found) is kind
        assert found == 2


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number(value):
    with pytest.raises(ValueError, match=r"x=.* is not allowed: give a number"):
        check_number("x", value)
    with pytest.raises(ValueError, match=r"x=.* is not allowed: give an integer"):
        check_integer("x", value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "message"),
    [
        ({"above": 0}, (1e-300, 1e300), (0, -1, float("nan"), float("inf"), 10**400), "give a number > 0$"),
        ({"least": 0}, (0, 5), (-1e-9,), "give a number >= 0$"),
        ({"least": 0, "most": 1}, (0, 1), (-1, 1.001), "give a number from 0 to 1$"),
        ({"above": 0, "most": 1}, (1,), (0, 1.5), "give a number > 0 and <= 1$"),
        ({"least": 0.5, "below": 1}, (0.5, 0.999), (0.4, 1), "give a number >= 0.5 and < 1$"),
        ({"above": 0, "why": ", in nats"}, (1,), (0,), "give a number > 0, in nats$"),
        ({}, (-5, 0), (float("-inf"),), "give a number$"),
    ],
)
def test_bounds_of_numbers(bounds, inside, outside, message):
    assert [check_number("x", value, **bounds) for value in inside] == list(inside)
    for value in outside:
        with pytest.raises(ValueError, match=r"x=.* is not allowed") as caught:
            check_number("x", value, **bounds)
        assert str(caught.value).endswith(message.rstrip("$") + ".")


def test_bounds_of_integers():
    assert check_integer("x", 10**400, least=1) == 10**400
    for value, bounds in ((0, {"least": 1}), (6, {"least": 1, "most": 5}), (2.0, {}), (np.float32(2), {})):
        with pytest.raises(ValueError, match="give an integer"):
            check_integer("x", value, **bounds)


def test_a_message_is_short_and_on_one_line():
    with pytest.raises(ValueError) as caught:
        check_number("x", torch.rand(100, 100))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 140


def test_words():
    assert check_choice("norm", "L2", ("Linf", "L2")) == "L2"
    for value in ("L7", None, 2, ["L2"], np.array(["L2", "L2"])):
        with pytest.raises(ValueError, match=r"norm=.* is not known: choose one of Linf, L2"):
            check_choice("norm", value, ("Linf", "L2"))


# --- every setting that is a number --------------------------------------------------------------------------------

FLOATS = {
    NRPMConfig: ("lam", "eps", "delta", "gamma"),
    TuneConfig: (
        *("eps", "step_size", "beta", "weight_perturbation", "target_momentum", "lr", "lam_lr", "weight_decay", "clip"),
        *("evaluate_eps", "temperature"),
    ),
    Threat: ("eps",),
}
# Those that may be None, which stands for a default or for no bound.
OR_NONE = {(TuneConfig, n) for n in ("eps", "clip", "step_size", "evaluate_eps", "beta", "temperature")}
OR_NONE |= {(Threat, "eps")}
COUNTS = {
    NRPMConfig: ("iterations",),
    TuneConfig: (
        *("steps", "target_start", "epochs", "calibrate", "warmup_epochs", "patience", "accumulate", "seed"),
        *("checkpoint_every", "keep", "evaluate_steps", "log_every"),
    ),
}


def numbers(config):
    """Fields whose default is a number, by what it is; those that None may stand in for are in the lists above."""
    kinds = {name: type(value) for name, value in vars(config()).items()}
    return {name for name, kind in kinds.items() if kind is float}, {n for n, kind in kinds.items() if kind is int}


@pytest.mark.parametrize("config", [NRPMConfig, TuneConfig, Threat])
def test_no_setting_is_forgotten(config):
    floats, counts = numbers(config)
    assert floats <= set(FLOATS[config]) <= floats | {"step_size", "evaluate_eps"}
    assert counts == set(COUNTS.get(config, ()))


@pytest.mark.parametrize(("config", "name"), [(c, name) for c, names in FLOATS.items() for name in names])
def test_settings_that_are_numbers(config, name):
    for value in HALVES:
        made = config(**{name: value})
        assert type(getattr(made, name)) is float
        assert made == config(**{name: 0.5})
        assert not hasattr(made, "to_json") or config.from_json(made.to_json()) == made
    for value in (*NO_NUMBERS, float("nan"), float("inf"), -1.0):
        none = value is None and (config, name) in OR_NONE
        if not none and not (name == "lam" and isinstance(value, (list, tuple, dict, np.ndarray, torch.Tensor))):
            with pytest.raises(ValueError, match=f"{name}=|{name}.0.="):
                config(**{name: value})


@pytest.mark.parametrize(("config", "name"), [(c, name) for c, names in COUNTS.items() for name in names])
def test_settings_that_are_counts(config, name):
    for value in TWOS:
        made = config(**{name: value})
        assert type(getattr(made, name)) is int
        assert made == config(**{name: 2})
        assert config.from_json(made.to_json()) == made
    for value in (*NO_NUMBERS, 2.0, -1):
        with pytest.raises(ValueError, match=f"{name}=.* is not allowed: give an integer"):
            config(**{name: value})


def test_a_threat_of_whole_pixels():
    for value in (*TWOS, np.float32(2)):
        assert Threat("L0", value) == Threat("L0", 2)
    assert str(Threat("L0", torch.tensor(2))) == "L0 2"


def test_numbers_given_to_certify():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    data = [(torch.rand(1, 1, 2, 2), torch.tensor([0]))]
    want = certify(model, data, 0.5, n0=2, n=12, confidence=0.75, seed=2, batch_size=2)
    for half, two in zip(HALVES[2:8], TWOS, strict=True):
        found = certify(model, data, half, n0=two, n=two * 6, confidence=half + half / 2, seed=two, batch_size=two)
        assert found == want
        assert type(want).from_json(found.to_json()) == want
    for name in ("sigma", "n0", "n", "confidence", "seed", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=True is not allowed"):
            certify(model, data, **{name: True})
