"""A program that tunes on the digits, for tests that need processes: `python tune_digits.py '[{"config": ...}, ...]'`.

It makes one run after another, since a process takes longer to start than a run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm.data.loaders import digits


class Slow(TensorDataset):
    """Images that take their time."""

    delay = 0.0

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.delay)
        return super().__getitem__(index)


def model(settings: Mapping[str, Any]) -> torch.nn.Module:
    if settings.get("model") == "mlp":  # without BatchNorm, which on CPU processes takes statistics of its own images
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        return timm_nrpm.reprogram_(net, timm_nrpm.NRPMConfig(lam=0.5))
    return timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5, eps=settings.get("eps", 1e-3))


def run(settings: Mapping[str, Any]) -> None:
    config = timm_nrpm.TuneConfig(**settings["config"])
    images, labels = digits("train")
    count = settings.get("images", 256)
    data = Slow(images[:count], labels[:count])
    data.delay = settings.get("delay", 0.0)
    loader = DataLoader(data, batch_size=settings.get("batch", 16), shuffle=True)
    test = TensorDataset(*(t[:45] for t in digits("test")))
    validation = DataLoader(test, batch_size=10) if settings.get("validation") else None
    net = model(settings)
    history = timm_nrpm.tune(net, loader, config, validation=validation, resume=settings.get("resume", False))
    if os.environ.get("RANK", "0") == "0":
        torch.save(net.state_dict(), settings["result"])
        print(history.to_json(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(sys.argv[1]):
        run(one)
    PartialState().destroy_process_group()  # a process whose threads still wait for others may abort as it ends
