import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_nrpm import NRPMConfig, TuneConfig
from timm_nrpm.choices import GRADIENTS, OBJECTIVES, PARADIGMS, PENALTIES

positive = st.floats(1e-9, 1e3)
lam = st.floats(0, 1)


@given(
    lam=lam | st.lists(lam, min_size=1) | st.dictionaries(st.text(), lam),
    iterations=st.integers(0, 99),
    eps=positive,
    penalty=st.sampled_from(PENALTIES),
    layers=st.none() | st.text() | st.lists(st.text()),
)
def test_json_round_trip(lam, iterations, eps, penalty, layers):
    config = NRPMConfig(lam=lam, iterations=iterations, eps=eps, penalty=penalty, layers=layers)
    assert NRPMConfig.from_json(config.to_json()) == config
    json.loads(config.to_json())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.1}, "lam=1.1 is not allowed"),
        ({"lam": -0.1}, "from 0"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"lam": "0.5"}, "lam='0.5'"),
        ({"lam": True}, "lam=True"),
        ({"lam": [0.5, 2]}, r"lam\[1\]=2"),
        ({"lam": {"fc": float("inf")}}, r"lam\['fc'\]=inf"),
        ({"iterations": -1}, "an integer >= 0, the paper's K"),
        ({"iterations": 1.5}, "iterations=1.5"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": -1e-3}, ">= 1e-15"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"delta": 0}, "delta=0"),
        ({"layers": 5}, "layers=5 is not understood"),
        ({"layers": ["stem", 3]}, "is not understood"),
        ({"penalty": "L1"}, "choose one of l1, huber"),
        ({"penalty": "huber-mcp", "delta": 4.0, "gamma": 4.0}, "gamma=4.0 must be larger"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        NRPMConfig(**settings)


def test_numbers_of_other_libraries():
    config = NRPMConfig(lam=np.linspace(0, 1, 3), iterations=np.int64(2), eps=np.float32(0.5))
    assert config.lam == (0.0, 0.5, 1.0)
    assert NRPMConfig(lam=torch.tensor(0.5)) == NRPMConfig(lam=np.float64(0.5)) == NRPMConfig(lam=0.5)


def test_a_function_has_no_json():
    with pytest.raises(ValueError, match="give the names it selects"):
        NRPMConfig(layers=lambda name, module: True).to_json()


@pytest.mark.parametrize(
    ("objective", "beta", "temperature"),
    [("trades", 6.0, 1.0), ("srat", 1.0, 0.1), ("comp-sum", 0.3, 1.0), ("kl-dro", 6.0, 1.0)],
)
def test_defaults_of_an_objective_are_its_own(objective, beta, temperature):
    config = TuneConfig(objective=objective)
    assert (config.beta, config.temperature) == (beta, temperature)
    given = TuneConfig(objective=objective, beta=2, temperature=0.5)
    assert (given.beta, given.temperature) == (2.0, 0.5)
    with pytest.raises(ValueError, match=r"temperature=0 is not allowed: .* since logits and losses are divided by it"):
        TuneConfig(objective=objective, temperature=0)


@given(
    paradigm=st.sampled_from(PARADIGMS),
    objective=st.sampled_from(OBJECTIVES),
    gradient=st.sampled_from(GRADIENTS),
    trainable=st.none() | st.text() | st.lists(st.text()),
    eps=st.floats(0, 1),
    steps=st.integers(1, 99),
    clip=st.none() | positive,
    trackers=st.lists(st.text()),
)
def test_tune_config_json_round_trip(**settings):
    config = TuneConfig(**settings)
    assert TuneConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"objective": "pgd", "eps": 0.08}, {"attack_steps": 7, "attack_step_size": 0.02, "validation_eps": 0.08}),
        ({"objective": "pgd", "eps": 0.08, "steps": 1}, {"attack_step_size": 0.08}),
        ({"objective": "pgd", "step_size": 0.5, "evaluate_eps": 0.3}, {"attack_step_size": 0.5, "validation_eps": 0.3}),
        ({"objective": "fgsm", "eps": 0.08, "steps": 5}, {"attack_steps": 1, "attack_step_size": 0.08}),
        ({"objective": "clean", "eps": 0}, {"attack_step_size": 0, "validation_eps": 8 / 255}),
        ({"norm": "L1", "eps": 12}, {"attack_step_size": 3, "validation_eps": 12}),
        ({"trainable": "*.lam", "trackers": "tensorboard"}, {"trainable": ("*.lam",), "trackers": ("tensorboard",)}),
        ({"lam_lr": np.float64(0.5), "epochs": np.int64(2)}, {"lam_lr": 0.5, "epochs": 2}),
    ],
)
def test_tune_defaults(settings, want):
    config = TuneConfig(**settings)
    assert {name: getattr(config, name) for name in want} == want


def test_what_follows_from_a_setting_follows_another():
    config = replace(TuneConfig(objective="fgsm", eps=0.1), eps=0.3)
    assert (config.attack_step_size, config.validation_eps) == (0.3, 0.3)
    assert replace(config, objective="pgd").attack_steps == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paradigm": "lam"}, "paradigm='lam' is not known: choose one of lambda, all"),
        ({"objective": "apgd"}, "objective='apgd' is not known: choose one of clean, fgsm"),
        ({"gradient": "sign"}, "gradient='sign'"),
        ({"precision": "fp16"}, "choose one of no, bf16"),
        ({"optimizer": "lookahead_adamw"}, "choose one of sgd, momentum"),
        ({"schedule": "plateau"}, "choose one of cosine, tanh"),
        ({"eps": 8}, "eps=8 is not allowed: give a number from 0 to 1"),
        ({"norm": "L0", "eps": 10}, "norm='L0' is not known: choose one of Linf, L2, L1"),
        ({"norm": "L2"}, "eps= is missing: under L2 it is the length of the change"),
        ({"norm": "L2", "eps": float("inf")}, "eps=inf is not allowed"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"step_size": "1"}, "step_size='1'"),
        ({"target_momentum": 1.5}, "from 0 to 1"),
        ({"lr": float("inf")}, "lr=inf is not allowed: give a number >= 0"),
        ({"lam_lr": True}, "lam_lr=True"),
        ({"beta": -1}, "beta=-1"),
        ({"epochs": 0}, "epochs=0 is not allowed: give an integer >= 1"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"calibrate": -1}, "integer >= 0"),
        ({"keep": 0}, "keep=0"),
        ({"clip": float("inf")}, "clip=inf is not allowed: give a number > 0, or None"),
        ({"clip": 0}, "clip=0 is not allowed: give a number > 0, or None"),
        ({"evaluate_eps": 0}, "evaluate_eps=0 attacks nothing"),
    ],
)
def test_bad_tune_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TuneConfig(**settings)


def test_settings_of_earlier_versions_are_the_same():
    """`standardize` came later: runs, searches and variants that do not have it are as they were."""
    assert "standardize" not in NRPMConfig(lam=0.5, eps=0.1).settings
    assert NRPMConfig(standardize=True).settings["standardize"] is True
    for wrong in ({"standardize": 1}, {"learnable": "yes"}):
        with pytest.raises(ValueError, match="give True or False"):
            NRPMConfig(**wrong)
