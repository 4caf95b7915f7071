"""The rows that measure what else a report says: on models that know nothing, once, and read again afterwards."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

RELATED = Path(__file__).resolve().parents[1] / "scripts" / "related"


@pytest.fixture
def reports(scripts, monkeypatch):
    monkeypatch.syspath_prepend(str(RELATED))
    before = set(sys.modules)
    module = importlib.import_module("reports")
    for name, count in (("CLASSIFIED", 40), ("IMAGES", 4), ("EMBEDDED", 3), ("PHOTOS", 2)):
        monkeypatch.setattr(module, name, count)
    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(RELATED)):
            del sys.modules[name]


class Untrained:
    """Bases of models that were not trained, and of noise."""

    def __init__(self, shared):
        self.shared = shared
        generator = np.random.default_rng(0)
        for name in ("3", "500"):
            (shared / "data" / "photos" / name).mkdir(parents=True)
            for number in range(2):
                image = Image.fromarray(generator.integers(0, 256, (260, 300, 3), np.uint8))
                image.save(shared / "data" / "photos" / name / f"{number}.png")

    def narrow(self, *, robust):
        torch.manual_seed(int(robust))
        return timm.create_model("resnet18_cifar_narrow").eval()

    def cifar(self, part, count):
        assert part == "report"
        pixels = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            right = self.narrow(robust=True)(pixels).argmax(1)
        return pixels, torch.where(torch.arange(count) % 4 < 2, right[0], (right[0] + 1) % 10)

    def efficientnet(self):
        torch.manual_seed(0)
        return timm.create_model("tf_efficientnet_lite0").eval()

    def photos(self):
        return torch.rand(3, 3, 224, 224), torch.tensor([3, 500, 3])


@pytest.mark.slow
def test_the_rows_are_measured_once(reports, tmp_path, monkeypatch):
    bases = Untrained(tmp_path / "shared")
    rows = reports.rows(bases, tmp_path / "kept")
    assert [row.method for row in rows].count("adversarially trained") == 4 + 3 + 2
    assert len(rows) == 4 + 12 + 7 + 2
    for row in rows:
        assert all(np.isfinite((row.before, row.after)))
        assert " to " in row.effect
    for name in ("evaluate", "evaluate_shifts", "evaluate_resolutions", "embedding_change"):
        monkeypatch.setattr(reports, name, None)  # it would fail if it were called
    assert reports.rows(bases, tmp_path / "kept") == rows
