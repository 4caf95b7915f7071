"""What people do to train a timm model does the same to a reprogrammed one, lambdas included."""

import copy
import os
import socket
import sys
import textwrap
from pathlib import Path

import forked
import pytest
import timm
import timm.optim
import torch
from small_timm_models import DIGITS, SMALL, images, small
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn

from timm_nrpm import (
    NRPMConfig,
    calibrate_,
    lambdas,
    reprogram_,
    restore_,
)
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.reprogramming import reprogrammed_layers


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


def test_layer_decay_treats_a_lambda_like_the_weight_beside_it(name):
    model = reprogram_(small(name), NRPMConfig(lam=0.8, learnable=True))
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    scales = {key: groups[id(layer.weight)]["lr_scale"] for key, layer in reprogrammed_layers(model).items()}
    assert len(set(scales.values())) > 2
    for key, layer in reprogrammed_layers(model).items():
        assert groups[id(layer.lam)]["lr_scale"] == scales[key]
        assert groups[id(layer.lam)]["weight_decay"] == 0
        assert groups[id(layer.weight)]["weight_decay"] == 0.05
    plain = small(name)
    decayed = timm.optim.create_optimizer_v2(plain, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5)
    theirs = {id(p): group["lr_scale"] for group in decayed.param_groups for p in group["params"]}
    assert {n: groups[id(model.get_parameter(n))]["lr_scale"] for n, _ in plain.named_parameters()} == {
        n: theirs[id(p)] for n, p in plain.named_parameters()
    }
    assert model.group_matcher() == plain.group_matcher()
    if hasattr(plain, "no_weight_decay"):
        assert model.no_weight_decay() == plain.no_weight_decay()


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_gives_the_same_gradients(name):
    x, model = images(name), reprogram_(small(name), NRPMConfig(lam=0.8, learnable=True)).train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    calls = []
    layer = list(reprogrammed_layers(again).values())[-3]
    layer.register_forward_hook(lambda *_: calls.append(1))
    want, got = gradients(model, x), gradients(again, x)
    assert len(calls) == 2, "the block is computed again in the backward pass"
    assert want.keys() == got.keys() == dict(model.named_parameters()).keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    assert any(bool(value) for key, value in want.items() if key.endswith(".lam"))


def test_an_average_of_weights_averages_lambdas_too(name):
    model = reprogram_(small(name), NRPMConfig(lam=0.8, learnable=True)).eval()
    average = ModelEmaV3(model, decay=0.75)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    average.update(model)
    layers = reprogrammed_layers(average.module)
    assert lambdas(average) == lambdas(average.module) != lambdas(model)
    for key, value in model.named_parameters():
        torch.testing.assert_close(average.module.get_parameter(key), 0.75 * before[key] + 0.25 * value)
    mean = copy.deepcopy(model)
    mean.load_state_dict(
        {k: v.lerp(before[k], 0.75) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    with torch.no_grad():
        torch.testing.assert_close(average(images(name)), mean(images(name)))
    assert all(layer is not reprogrammed_layers(model)[key] for key, layer in layers.items())


def test_freezing_all_but_some_layers(name):
    model = reprogram_(small(name), NRPMConfig(lam=0.8, learnable=True)).eval()
    x, classifier = images(name), str(model.default_cfg["classifier"])
    frozen = [n for n, _ in model.named_children() if n != classifier.partition(".")[0]]
    want = gradients(model, x)
    freeze(model, frozen)
    got = gradients(model, x)
    assert {f"{classifier}.weight", f"{classifier}.bias", f"{classifier}.lam"} <= got.keys()
    assert not [key for key in got if key.partition(".")[0] in frozen]
    torch.testing.assert_close(got, {key: want[key] for key in got}, atol=1e-5, rtol=1e-4)
    unfreeze(model)
    torch.testing.assert_close(gradients(model.eval(), x), want, atol=1e-5, rtol=1e-4)  # timm's new BatchNorms train


def test_unfreezing_lets_lambdas_learn_as_any_parameter():
    model = small(DIGITS, 0.8)
    assert not any(layer.lam.requires_grad for layer in reprogrammed_layers(model).values())
    unfreeze(model)
    assert all(layer.lam.requires_grad for layer in reprogrammed_layers(model).values())


def test_frozen_statistics_are_the_reprogrammed_models_and_restoring_says_so():
    model, x = small(DIGITS, 0.5).eval(), images(DIGITS)
    calibrate_(model, [x])
    calibrated = model.bn1.running_mean.clone()
    with torch.no_grad():
        want = model(x)
        freeze(model)
        torch.testing.assert_close(model(x), want)
    assert torch.equal(model.bn1.running_mean, calibrated)
    with pytest.warns(ReprogrammingWarning, match="or its BatchNorms were replaced"):
        restore_(copy.deepcopy(model))
    unfreeze(model)
    with pytest.warns(ReprogrammingWarning, match="or its BatchNorms were replaced"):
        restore_(model)


@torch.no_grad()
def test_synchronised_statistics_are_the_same_numbers():
    """As timm's train.py converts them for several processes."""
    x, model = images(DIGITS), small(DIGITS, 0.6).eval()
    want = model(x)
    converted = convert_sync_batchnorm(model).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert torch.equal(converted(x), want)
    again = reprogram_(timm.create_model(DIGITS), NRPMConfig(lam=0.8)).eval()
    again.load_state_dict(converted.state_dict())
    assert torch.equal(again(x), want)


WORKER = """
    import sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import timm_nrpm
    from small_timm_models import images, small
    from timm_nrpm import NRPMConfig, reprogram_
    folder, name, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(reprogram_(small(name), NRPMConfig(lam=0.8, learnable=True)).eval())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(images(name).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    assert len(timm_nrpm.lambdas(model)) > 5
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pth")
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "name", [DIGITS, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != DIGITS)]
)
def test_two_processes_train_as_one(name, tmp_path):
    """As BatchNorm is in evaluation mode, the mean gradient of two halves of a batch is that of the batch."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    environment["GLOO_SOCKET_IFNAME"] = next((n for _, n in socket.if_nameindex() if n.startswith("lo")), "lo")
    workers = [
        forked.Popen([sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path), name, str(rank)], env=environment)
        for rank in (0, 1)
    ]
    model = reprogram_(small(name), NRPMConfig(lam=0.8, learnable=True)).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(images(name)).square().mean().backward()
        optimizer.step()
    assert [worker.wait(60) for worker in workers] == [0, 0]
    states = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    for key, value in model.state_dict().items():
        assert torch.equal(states[0][key], states[1][key]), key
        torch.testing.assert_close(states[0][key], value, atol=1e-6, rtol=1e-4, msg=key)
    moved = [key for key, value in start.items() if key.endswith(".lam") and not torch.equal(value, states[0][key])]
    assert len(moved) > len(lambdas(model)) / 2
