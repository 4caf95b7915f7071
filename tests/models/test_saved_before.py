"""Variants that earlier versions wrote, one of each kind, load as what they were.

Beside each folder lies what that version computed: lambdas, statistics and corrections, and logits of some pixels.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import timm_nrpm

FOLDER = Path(__file__).parent / "saved_before"
KINDS = {
    "lambda_only": "one lambda, the weights of a public name",
    "settings": "a lambda for each of some layers, and another estimate",
    "calibrated": "moved BatchNorm statistics",
    "corrected": "corrections of a model without BatchNorm, and its weights, which have no public name",
    "learnable_and_described": "learnable lambdas, and another normalisation",
    "tuned": "weights that were trained on",
    "half": "a base in half precision",
}


def test_there_is_one_of_each_kind():
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_of_an_earlier_version_loads_bit_for_bit(kind, tmp_path):
    then = load_file(FOLDER / f"{kind}.safetensors")
    pixels, logits = then.pop("pixels"), then.pop("logits")
    model = timm_nrpm.from_pretrained(FOLDER / kind)
    state = model.state_dict()
    assert then
    for name, tensor in then.items():
        assert torch.equal(state[name.removeprefix("state.")], tensor), name
    with torch.no_grad():
        now = model(pixels.to(next(model.parameters()).dtype)).float()
    # Another machine's instructions round otherwise.
    assert torch.allclose(now, logits, rtol=1e-2 if kind == "half" else 1e-4, atol=1e-2 if kind == "half" else 1e-4)
    # What this version writes of it is the same, to the byte.
    again = timm_nrpm.save_pretrained(model, tmp_path / "again", full=(FOLDER / kind / "model.safetensors").exists())
    for name in ("nrpm_config.json", "nrpm.safetensors", "model.safetensors"):
        if (FOLDER / kind / name).exists():
            assert (again / name).read_bytes() == (FOLDER / kind / name).read_bytes(), name
    assert timm_nrpm.inspect(FOLDER / kind).lams == timm_nrpm.lambdas(model)
