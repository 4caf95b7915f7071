"""A program that tunes on the digits, for tests that need processes: `python tune_digits.py '{"config": ...}'`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm.data.loaders import digits


class Slow(TensorDataset):
    """Images that take their time."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(SETTINGS.get("delay", 0.0))
        return super().__getitem__(index)


def model() -> torch.nn.Module:
    if SETTINGS.get("model") == "mlp":  # without BatchNorm, which on CPU processes takes statistics of its own images
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        return timm_nrpm.reprogram_(net, timm_nrpm.NRPMConfig(lam=0.5))
    return timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5, eps=SETTINGS.get("eps", 1e-3))


def main() -> None:
    torch.set_num_threads(1)
    config = timm_nrpm.TuneConfig(**SETTINGS["config"])
    images, labels = digits("train")
    count = SETTINGS.get("images", 256)
    loader = DataLoader(Slow(images[:count], labels[:count]), batch_size=SETTINGS.get("batch", 16), shuffle=True)
    test = TensorDataset(*(t[:45] for t in digits("test")))
    validation = DataLoader(test, batch_size=10) if SETTINGS.get("validation") else None
    net = model()
    history = timm_nrpm.tune(net, loader, config, validation=validation, resume=SETTINGS.get("resume", False))
    if os.environ.get("RANK", "0") == "0":
        torch.save(net.state_dict(), SETTINGS["result"])
        print(history.to_json())


if __name__ == "__main__":
    SETTINGS = json.loads(sys.argv[1])
    main()
