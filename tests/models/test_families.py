"""A small architecture of each of 79 families, run on the smallest image that it takes, plain and reprogrammed.

The nightly run of `scripts/census.py --forward` does the same with every architecture, by the same function.
"""

import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import model_entrypoint

from timm_nrpm import NRPMConfig, reprogram_, restore_

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

TINY = (
    *("test_vit", "test_byobnet", "test_coatnet", "test_convnext", "test_nfnet", "test_resnet", "test_efficientnet"),
    *("test_mambaout", "test_vit_relpos", "resnet8_digits"),
)
SMALL = (
    *("coat_tiny", "convit_tiny", "convmixer_768_32", "cpubone_nano", "crossvit_tiny_240", "cs3darknet_focus_s"),
    *("cspnext_tiny", "deit_tiny_patch16_224", "densenet121", "dla46_c", "dpn48b", "ese_vovnet19b_slim_dw"),
    *("edgenext_xx_small", "efficientformerv2_s0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0"),
    *("eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "mobilenetv3_small_050", "gcvit_xxtiny", "ghostnet_050"),
    *("gmlp_ti16_224", "hardcorenas_b", "hgnetv2_b0", "hrnet_w18_small", "iformer_t", "inception_next_atto"),
    *("lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s", "lowformer_b0", "mobilevit_xxs"),
    *("mvitv2_tiny", "nest_tiny", "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnetx_002", "repghostnet_050"),
    *("repvit_m1", "res2next50", "resnest14d", "resnetv2_18", "rexnet_100", "shvit_s1", "skresnet18", "starnet_s050"),
    *("swiftformer_xs", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_svt_small", "visformer_tiny"),
    *("vitamin_small_224", "xcit_nano_12_p8_224", "csatv2", "inception_v3", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "davit_tiny", "focalnet_tiny_srf", "hiera_tiny_224"),
    *("volo_d1_224", "caformer_s18", "cait_xs24_384", "sequencer2d_s"),
)
LARGER = {"resnet8_digits": 8, "csatv2": 64, "inception_v3": 96}
"""Those whose smallest image has another side than 32 pixels."""


@pytest.fixture
def forward(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import census_forward

    yield census_forward.forward
    sys.modules.pop("census_forward", None)


@pytest.mark.parametrize("name", [*TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL)])
def test_lambda_one_is_the_plain_model_and_a_smaller_one_gives_other_numbers(name, forward):
    row = forward(name)
    assert row["image"][1:] == [LARGER.get(name, 32)] * 2
    assert {check: row[check] for check in ("sound", "equal", "finite", "different")} == {
        "sound": True,
        "equal": True,
        "finite": True,
        "different": True,
    }


def test_each_is_of_a_family_of_its_own():
    families = {model_entrypoint(name).__module__ for name in (*TINY, *SMALL)}
    assert len(families) == len(TINY + SMALL) == 79


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_restoring_gives_the_plain_model(name):
    model = timm.create_model(name).eval()
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    before = model(images)
    assert torch.equal(restore_(reprogram_(model, NRPMConfig(lam=0.9)))(images), before)
