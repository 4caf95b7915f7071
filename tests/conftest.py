"""Shared by all tests: one thread a worker, no network, fixed seeds."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from pathlib import Path

# Before anything imports huggingface_hub: a test that would reach the network fails at once instead.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, settings

# A shell that starts the tests in the background has them ignore Ctrl-C, and everything that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The same examples each time, and no limit of time, which a busy machine misses: the first text alone reads a table of
# all characters.
settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "reproduce"

LONGEST = (
    *("test_published.py", "test_publishing.py", "test_tune.py", "test_hostile.py", "test_backbones.py"),
    *("test_field_reports.py", "test_flags.py", "test_evaluate.py", "test_examples.py"),
)
"""The longest files: they come first, so that no process waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)  # which timm's augmentation draws from
    torch.manual_seed(0)


@pytest.fixture
def scripts(monkeypatch):
    """Modules of scripts/reproduce by name, and none of them left behind."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(SCRIPTS)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def stocked_hub(tmp_path_factory):
    from stocked_hub import StockedHub

    with StockedHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(autouse=True)
def _no_results_of_other_runs(request, monkeypatch) -> None:
    """A command would take what attacks left of a plain model from the user's cache."""
    if "cached" not in request.keywords:
        monkeypatch.setattr("timm_nrpm.cli.evaluate._controls", lambda: None)


class SmallNet(nn.Module):
    """Convolutions, a BatchNorm, a layer used twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1, bias=False)
        self.alias = self.twice
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.alias(self.twice(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> SmallNet:
    model = SmallNet()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8)
