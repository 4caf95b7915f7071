"""A plugin of pytest for the examples in docstrings: it gives them what they take for granted, a model and images.

The model is the bundled one, calibrated, and the images are a few of the digits. Each example runs in an empty folder.
"""

import argparse
import copy
import dataclasses
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from _pytest.doctest import DoctestItem
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm.data.loaders import digits

IMAGES = 32

GIVEN = {"model", "plain", "report", "pixels", "labels", "attacked", "loader", "training_loader"}
"""Objects that examples take for granted: what a reader has before."""

IMPORTED = {
    "argparse": argparse,
    "dataclasses": dataclasses,
    "Image": Image,
    "nn": nn,
    "np": np,
    "Path": Path,
    "timm": timm,
    "timm_nrpm": timm_nrpm,
    "torch": torch,
}
"""What examples use without an import."""


@pytest.fixture(scope="session")
def names():
    """What examples may name, beside what the module has."""
    torch.manual_seed(0)
    pixels, labels = (part[:IMAGES] for part in digits("test"))
    training = DataLoader(TensorDataset(*(part[:64] for part in digits("train"))), batch_size=32)
    plain = timm.create_model("resnet8_digits", pretrained=True).eval()
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    timm_nrpm.calibrate_(model, training)
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=IMAGES)
    report = timm_nrpm.evaluate(model, loader, timm_nrpm.Threat("Linf", 0.15), "quick")
    ours = {name: getattr(timm_nrpm, name) for name in timm_nrpm.__all__ if not name.startswith("_")}
    given = {
        "model": model,
        "plain": plain,
        "report": report,
        "pixels": pixels,
        "labels": labels,
        "attacked": (pixels + 0.1).clamp(0, 1),
        "loader": loader,
        "training_loader": training,
    }
    assert given.keys() == GIVEN
    return ours | given | IMPORTED


@pytest.fixture(autouse=True)
def _given_to_examples(request, tmp_path, monkeypatch):
    """The names, copied where an example may change them."""
    if not isinstance(request.node, DoctestItem):
        return
    if "from peft import" in request.node.dtest.docstring and not find_spec("peft"):
        pytest.skip("PEFT is not installed: pip install 'timm_nrpm[lora]'")
    monkeypatch.chdir(tmp_path)
    names = dict(request.getfixturevalue("names"))
    request.node.dtest.globs.update({**names, "model": copy.deepcopy(names["model"]), **request.node.dtest.globs})
