"""ImageNet weights of timm's tf_efficientnet_lite0 on real photos, where they are beside the clone."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import timm_nrpm

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "checkpoints" / "tf_efficientnet_lite0.safetensors"
NAME = "tf_efficientnet_lite0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS.exists(), reason=f"{WEIGHTS.name} and the photos are not in ../shared"),
]


@pytest.fixture(scope="module")
def transform():
    config = resolve_model_data_config(timm.create_model(NAME))
    return create_transform(
        config["input_size"], mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )  # fmt: skip


def pixels_of(files, transform):
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files]).clamp(0, 1)


@pytest.fixture(scope="module")
def photos(transform):
    """Every third photo, and its class."""
    files = sorted((SHARED / "data" / "photos").glob("*/*.jpg"))[::3]
    return pixels_of(files, transform), torch.tensor([int(file.parent.name) for file in files])


@pytest.fixture(scope="module")
def unlabelled(transform):
    return pixels_of(sorted((SHARED / "data" / "photos-unlabelled").glob("*.jpg"))[:32], transform)


def accuracy(model, photos):
    pixels, labels = photos
    net = timm_nrpm.pixel_model.PixelModel(model).eval()
    with torch.no_grad():
        right = [
            (net(part).argmax(1) == wanted).float()
            for part, wanted in zip(pixels.split(32), labels.split(32), strict=True)
        ]
    return float(torch.cat(right).mean())


def test_calibration_gives_back_what_reprogramming_takes(photos, unlabelled):
    plain = timm_nrpm.create_model(NAME, checkpoint_path=str(WEIGHTS), lam=1.0).eval()
    clean = accuracy(plain, photos)
    assert clean == pytest.approx(0.784, abs=0.1)
    model = timm_nrpm.create_model(NAME, checkpoint_path=str(WEIGHTS), lam=0.8).eval()
    assert accuracy(model, photos) < 0.1
    timm_nrpm.calibrate_(model, [unlabelled])
    assert accuracy(model, photos) > clean - 0.1


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_export_with_corrections(ending, unlabelled, tmp_path):
    model = timm_nrpm.create_model(NAME, checkpoint_path=str(WEIGHTS), lam=0.8, layers="first:8").eval()
    timm_nrpm.calibrate_(model, [unlabelled[:8]])
    done = timm_nrpm.export(model, tmp_path / f"model.{ending}", example=unlabelled[:2, :, ::2, ::2], pixels=True)
    # In float32 this model's own logits of up to 20 are about 0.002 from those in float64.
    assert done.difference <= 5e-3
    assert done.facts.statistics == "calibrated on 8 images"
