"""Two of the paper's published models on real data, in `shared/` beside the repository: the numbers to hold.

Four minutes on two cores.
"""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path

import forked
import pytest
import timm
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from timm_nrpm import NRPMConfig, Threat, TuneConfig, calibrate_, evaluate, from_pretrained, lambdas, reprogram_, tune
from timm_nrpm.attacks.flags import MASKED
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.evaluation.history import History
from timm_nrpm.models.backbones import load_published_

SHARED = Path(__file__).resolve().parents[3] / "shared"
pytestmark = pytest.mark.skipif(
    not (SHARED / "checkpoints").exists(),
    reason=f"needs the published models and data in {SHARED.name}/ beside the repository",
)

ROBUST = [
    f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)
]  # as published: the blocks' 3x3


def published(name: str, file: str) -> nn.Module:
    return load_published_(timm.create_model(name), SHARED / "checkpoints" / file).eval()


def narrow_resnet18() -> nn.Module:
    """67.89 % clean by its authors."""
    return published("resnet18_cifar_narrow", "tinyresnet18_cifar10_model.t7")


def mlp() -> nn.Module:
    return published("mlp3_mnist", "mlp3_mnist_model.pth")


def images(dataset: Dataset, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = zip(*(dataset[i] for i in numbers), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


@cache
def cifar(split: str, every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels `[N, 3, 32, 32]` in [0, 1] and labels, of every so many-th image; the tar is ordered by class."""
    dataset = pixel_loader("tar", SHARED / "data" / "cifar10-jpeg", split=split, input_size=(3, 32, 32)).dataset
    pixels, labels = images(dataset, range(0, len(dataset), every))
    # The layout decides the order of sums, and so the last image or two under attack: the README's numbers have this.
    return pixels.contiguous(memory_format=torch.channels_last), labels


def mnist(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images(
        pixel_loader("torch/mnist", SHARED / "data", split=split, input_size=(1, 28, 28)).dataset, range(count)
    )


@torch.no_grad()
def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    right = [(model(x).argmax(1) == y) for x, y in zip(pixels.split(250), labels.split(250), strict=True)]
    return 100 * torch.cat(right).double().mean().item()


def reprogrammed(lam: float, eps: float, calibrated: bool) -> nn.Module:
    model = reprogram_(narrow_resnet18(), NRPMConfig(lam=lam, iterations=1, eps=eps, layers=ROBUST))
    return calibrate_(model, cifar("train", 50)[0].split(250)) if calibrated else model


RESNET = [  # lam, eps, calibrated, lowest and highest accuracy
    (1.0, 5e-4, False, 67.0, 67.6),
    (0.9, 5e-4, False, 57.0, 59.0),
    (0.5, 5e-4, False, 15.0, 17.0),
    (0.8, 5e-2, False, 39.2, 41.2),
    (0.9, 5e-4, True, 67.0, 100.0),
    (0.5, 5e-4, True, 67.0, 100.0),
    (0.8, 5e-2, True, 67.7, 100.0),
]


@pytest.mark.parametrize(("every", "margin"), [(10, 4.5), pytest.param(1, 0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("lam", "eps", "calibrated", "low", "high"),
    [RESNET[0], *(pytest.param(*row, marks=pytest.mark.slow) for row in RESNET[1:])],
)
def test_narrow_resnet18_on_the_test_set(lam, eps, calibrated, low, high, every, margin):
    """On a tenth of it, with three standard deviations of an accuracy on 1000 images; slowly, on the whole."""
    got = accuracy(reprogrammed(lam, eps, calibrated), *cifar("test", every))
    print(f"lam={lam} eps={eps} calibrated={calibrated}: {got:.2f} %")
    assert low - margin <= got <= high + margin


@pytest.mark.slow
def test_calibration_recovers_what_reprogramming_lost():
    """On the same thousand images, so without sampling error between the two: within two points of the plain model."""
    data = cifar("test", 10)
    plain = accuracy(narrow_resnet18(), *data)
    assert accuracy(reprogrammed(0.5, 5e-4, True), *data) > plain - 2


def test_relative_calibration_at_lambda_one_moves_no_logit():
    pixels, _ = cifar("test", 50)
    with torch.no_grad():
        moved = reprogrammed(1.0, 5e-4, True)(pixels) - narrow_resnet18()(pixels)
    assert moved.abs().max().item() <= 1e-4


def test_mlp_under_fgsm():
    """Table 1's protocol at lambda 0.9, K = 1: an image already wrong counts as wrong."""
    model = reprogram_(mlp(), NRPMConfig(lam=0.9, iterations=1, eps=5e-5))
    pixels, labels = mnist("test", 1000)
    loader = list(zip(pixels.split(100), labels.split(100), strict=True))
    reports = [evaluate(model, loader, Threat("Linf", eps), "quick", steps=1) for eps in (0.05, 0.1, 0.15)]
    got = [100 * reports[0].accuracy("clean"), *(100 * report.accuracy("fgsm") for report in reports)]
    assert got == pytest.approx([91.2, 58.2, 18.7, 6.7], abs=0.3)


def test_matching_moments_helps_a_model_without_batchnorm():
    """Calibration of the MLP, measured: at lambda 0.3 it recovers more than fifteen points of clean accuracy."""
    model = reprogram_(mlp(), NRPMConfig(lam=0.3, iterations=1, eps=5e-5))
    data = mnist("test", 1000)
    before = accuracy(model, *data)
    after = accuracy(calibrate_(model, [mnist("train", 1000)[0]]), *data)
    assert after > before + 15
    assert after > accuracy(mlp(), *data) - 2


@pytest.mark.parametrize(
    ("lam", "calibrated"),
    [
        (1.0, False),
        *(pytest.param(lam, each, marks=pytest.mark.slow) for lam in (0.5, 0.3) for each in (False, True)),
    ],
)
def test_mlp_is_no_more_robust_in_the_worst_case(lam, calibrated):
    """PGD-20 at Linf 0.05: its own gradient says that lambda helps, and the worst case that it does not."""
    model = reprogram_(mlp(), NRPMConfig(lam=lam, iterations=1, eps=5e-5))
    if calibrated:
        calibrate_(model, [mnist("train", 1000)[0]])
    pixels, labels = mnist("test", 1000)
    data = list(zip(pixels.split(250), labels.split(250), strict=True))
    report = evaluate(model, data, Threat("Linf", 0.05), "quick")
    print(f"lam={lam} calibrated={calibrated}: {report}")
    assert report.worst_case <= 0.46  # the plain model has 0.438
    assert report.flags == (() if lam == 1.0 else (MASKED,))


@pytest.mark.slow
def test_narrow_resnet18_is_masked():
    """PGD-20 at 8/255 on 200 images, lambda 0.5, calibrated: the paper's protocol, and what is left of its gain."""
    pixels, labels = cifar("test", 50)
    loader = list(zip(pixels.split(50), labels.split(50), strict=True))
    plain = evaluate(narrow_resnet18(), loader, Threat("Linf", 8 / 255), "quick")
    ours = evaluate(reprogrammed(0.5, 5e-4, True), loader, Threat("Linf", 8 / 255), "quick")
    for report in (plain, ours):
        print(report)
    assert ours.accuracy("pgd") > plain.accuracy("pgd") + 0.1
    assert ours.worst_case < plain.worst_case + 0.05
    assert ours.flags == (MASKED,)


RESULTS = Path(__file__).resolve().parents[2] / "results" / "worst-case.json"


def test_the_recorded_worst_case_is_what_the_readme_says():
    """As `scripts/reproduce/worst_case.py` wrote it down: 500 images, 8/255, K = 1, eps = 5e-4."""
    rows = json.loads(RESULTS.read_text())
    half, plain = rows["resnet18-0.5-calibrated"], rows["resnet18-1-published"]
    assert half["images"] == plain["images"] == 500
    assert half["protocol"] >= 0.57
    assert half["worst_case"] <= 0.43
    assert MASKED in half["flags"]
    assert plain["flags"] == []
    assert half["control"] == plain["control"]
    assert abs(plain["worst_case"] - plain["control"]["worst_case"]) <= 0.01  # the same model, under the same attacks


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_narrow_resnet18_in_the_worst_case(lam):
    """The same on the first 200 of these images, four minutes."""
    pixels, labels = (part[:200] for part in cifar("test", 20))
    loader = list(zip(pixels.split(100), labels.split(100), strict=True))
    report = evaluate(reprogrammed(lam, 5e-4, lam < 1), loader, Threat("Linf", 8 / 255))
    print(report)
    assert report.samples == 200
    assert report.worst_case <= 0.43
    assert report.accuracy("pgd") >= 0.57 or lam == 1.0
    assert (MASKED in report.flags) == (lam < 1)
    assert lam < 1 or report.flags == ()


RUNS = {  # the command, and how many processes share it
    "MNIST, paradigm 2": ("mnist", "lambda", 1),
    "MNIST, paradigm 3": ("mnist", "all", 2),
    "CIFAR-10 tars, paradigm 2": ("cifar", "lambda", 2),
    "CIFAR-10 tars, paradigm 3": ("cifar", "all", 1),
}
COMMANDS = {
    "mnist": f"--model mlp3_mnist --weights {SHARED}/checkpoints/mlp3_mnist_model.pth "
    f"--data torch/mnist --root {SHARED}/data --objective fgsm --eps 0.1 --calibrate 0",
    "cifar": f"--model resnet18_cifar_narrow --weights {SHARED}/checkpoints/tinyresnet18_cifar10_model.t7 --data tar "
    f"--root {SHARED}/data/cifar10-jpeg --estimator-eps 5e-4 --steps 2 --calibrate 64",
}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "paradigm", "processes"), RUNS.values(), ids=RUNS)
def test_the_command_tunes_the_published_models(tmp_path, data, paradigm, processes):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [*launcher, "-m", "timm_nrpm.cli", "tune", *COMMANDS[data].split(), "--paradigm", paradigm]
    command += ["--iterations", "1", "--epochs", "1", "--samples", "64", "--batch-size", "16", "--evaluate-steps", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, "--validation-samples", "30", "--output", str(tmp_path)]
    done = forked.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    history = History.from_json((tmp_path / "history.json").read_text())
    assert len(history.steps) == 4 // processes
    assert all(row.loss is not None and not row.skipped for row in history.steps)
    assert [row.step for row in history.evaluations] == [0, 4 // processes]
    assert 0.5 < history.evaluations[0].clean <= 1
    variant = from_pretrained(tmp_path / "variant")
    assert tuple(lambdas(variant).values()) == history.steps[-1].lams


@pytest.mark.slow
def test_paradigm_3_is_stable_where_the_gradient_is_steep():
    """eps = 1e-3, learning rate 0.02. scripts/reproduce/mnist_mlp.py has five epochs, and the same without clipping."""
    model = reprogram_(mlp(), NRPMConfig(lam=0.5, iterations=3, eps=1e-3))
    loader = DataLoader(TensorDataset(*mnist("train", 3000)), batch_size=100, shuffle=True)
    config = TuneConfig(paradigm="all", objective="fgsm", eps=0.1, epochs=2, lr=0.02, lam_lr=0.02)
    history = tune(model, loader, config)
    assert len(history.steps) == 60
    assert history.steps[-1].loss < history.steps[0].loss
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
