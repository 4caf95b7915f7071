"""The measuring of guarantees in scripts/related, on a few of the digits."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.certification import certify
from timm_nrpm.evaluation.conformal import conformal
from timm_nrpm.evaluation.halves import certify_halves
from timm_nrpm.models.registry import DIGITS

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def guarantees(monkeypatch):
    """The script, and none of its modules left behind."""
    monkeypatch.syspath_prepend(str(SCRIPTS / "related"))
    path, before = list(sys.path), set(sys.modules)
    module = importlib.import_module("guarantees")
    monkeypatch.setattr(module, "COPIES", 20)
    yield module
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model():
    return timm.create_model(DIGITS, pretrained=True).eval()


def images(start, stop):
    pixels, labels = digits("test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[start:stop]
    return pixels[order], labels[order]


def test_sets_are_counted_by_image(guarantees, model, tmp_path):
    """The numbers of a split are those of a predictor that was calibrated on its images; without noise, to the set."""
    splits = [(range(40), range(40, 60)), (range(20, 60), range(20))]
    base = guarantees.Conformal("digits", model, images(0, 60), splits, 0.25, 0.1, 3, 4)
    rows = base.rows(tmp_path)
    kept = [json.loads((tmp_path / f"digits-sets-{kind}.json").read_text()) for kind in ("plain", "noisy")]
    tallies = kept[0] | kept[1]
    pixels, labels = images(0, 60)
    for known, test in splits:
        vanilla = conformal(model, [(pixels[list(known)], labels[list(known)])], 0.1, 0.25, 0.1, "vanilla")
        for i, each in zip(test, vanilla.sets(pixels[list(test)]), strict=True):
            tally = tallies["vanilla"][i]
            assert (tally["splits"], tally["clean"], tally["size"]) == (1, int(int(labels[i]) in each), len(each))
            assert tally["attacked"] <= 1
    assert sum(each["splits"] for each in tallies["one-sample"]) == 40
    vanilla, one = (
        np.array([each["attacked"] for each in tallies[name] if each["splits"]]) for name in ("vanilla", "one-sample")
    )
    row = next(row for row in rows if row.method == "conformal sets, one-sample" and "attacked" in row.measure)
    assert (row.before, row.after) == (pytest.approx(100 * vanilla.mean()), pytest.approx(100 * one.mean()))
    half = 196 * np.std(one - vanilla, ddof=1) / np.sqrt(40)
    middle = row.after - row.before
    assert row.effect == f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"
    assert len(rows) == 6
    again = guarantees.Conformal("digits", None, images(0, 60), splits, 0.25, 0.1, 3, 4).rows(tmp_path)
    assert again == rows  # what is kept asks no model


@pytest.mark.slow
def test_halves_are_compared_at_the_best_sigma_of_each(guarantees, model, tmp_path):
    few, many = images(0, 4), images(4, 10)
    first, second = guarantees.Smoothing("digits", model, few, many, (0.12, 0.5), 4).rows(tmp_path)
    assert "6 images" in first.note
    assert "4 images" in second.note
    for measure in (certify, certify_halves):
        tried = {sigma: measure(model, [few], sigma) for sigma in (0.12, 0.5)}
        name = "before" if measure is certify else "after"
        best = max(
            tried, key=lambda sigma: (tried[sigma].certified_accuracy(0.25), tried[sigma].average_certified_radius)
        )
        assert getattr(first, name) == pytest.approx(100 * measure(model, [many], best).certified_accuracy(0.25))
        best = max(tried, key=lambda sigma: tried[sigma].average_certified_radius)
        report = measure(model, [images(4, 8)], best)
        assert getattr(second, name) == pytest.approx(1000 * report.average_certified_radius)
    assert first.control == "smoothing of the whole, 1100 forwards each"
