import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_nrpm import NRPMConfig
from timm_nrpm.config import PENALTIES

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
        ({"iterations": -1}, "K >= 0"),
        ({"iterations": 1.5}, "iterations=1.5"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": -1e-3}, "> 0"),
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
