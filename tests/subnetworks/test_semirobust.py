"""Algorithm 1 on the bundled digits: what is frozen stays, a killed run goes on, and no trial is dropped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import forked
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import TuneConfig
from timm_nrpm.attacks.library import fgsm
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.subnetwork_report import SubnetworkReport, SubnetworkTrial
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.subnetworks.connectivity import connectivity
from timm_nrpm.subnetworks.mutual_information import edge
from timm_nrpm.subnetworks.recording import received
from timm_nrpm.subnetworks.semirobust import semirobust
from timm_nrpm.subnetworks.splitting import split

CONFIG = TuneConfig(paradigm="all", eps=0.15, epochs=1, steps=1, evaluate_steps=2, optimizer="momentum")


def batches(start, stop):
    pixels, labels = (part[start:stop] for part in digits("test"))
    return list(zip(pixels.split(40), labels.split(40), strict=True))


def training(count=1437):
    pixels, labels = (part[:count] for part in digits("train"))
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(pixels, labels), batch_size=64, shuffle=True, generator=generator)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet8_digits", pretrained=True).eval()


def run(model, folder, **settings):
    given = {"config": CONFIG, "trials": 2, "epochs": 2, "tolerance": 0.0, "suites": ("quick",), **settings}
    return semirobust(model, training(), batches(0, 80), batches(80, 160), given.pop("late", 2), folder=folder, **given)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run(model, folder), folder


def test_the_early_part_stays_bit_for_bit(model, found):
    result, folder = found
    parts, robust = split(model, 2), load_file(folder / "robust.safetensors")
    natural = model.state_dict()
    assert any(not torch.equal(robust[name], value) for name, value in natural.items())
    for trial in result.trials:
        tuned = load_file(folder / f"trial-{trial.number}-{trial.epochs}.safetensors")
        for name, value in tuned.items():
            if name not in parts.late_state:
                assert torch.equal(value, robust[name]), name
        assert all(not torch.equal(tuned[f"{name}.weight"], natural[f"{name}.weight"]) for name in parts.late)


def test_the_four_networks_are_those_that_are_measured(model, found):
    result, folder = found
    parts, robust = split(model, 2), load_file(folder / "robust.safetensors")
    best = load_file(folder / f"trial-{result.best.number}-{result.best.epochs}.safetensors")
    states = {
        "natural": model.state_dict(), "robust": robust, "composed": parts.composed(robust, model.state_dict()),
        "tuned": best,
    }  # fmt: skip
    for name, state in states.items():
        net = timm.create_model("resnet8_digits")
        net.load_state_dict(state)
        net = PixelModel(net).eval()
        with torch.no_grad():
            right = [net(pixels).argmax(1).eq(labels) for pixels, labels in batches(80, 160)]
        assert result.accuracy("clean", name) == pytest.approx(torch.cat(right).double().mean().item())
        assert result.accuracy("pgd", name) <= result.accuracy("clean", name)
    assert set(result.right) == {"clean", "fgsm", "pgd"}


def test_connectivity_is_measured_under_the_attacks_too(model, found):
    result, folder = found
    parts = split(model, 2)
    star = load_file(folder / "robust.safetensors")
    net = timm.create_model("resnet8_digits")
    net.load_state_dict(parts.composed(star, model.state_dict()))
    net = PixelModel(net).eval()
    assert {attack: set(rows) for attack, rows in result.attacked.items()} == {
        "fgsm": {"composed", "tuned"}, "pgd": {"composed", "tuned"},
    }  # fmt: skip
    images = training().dataset
    pixels, labels = (
        part[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))] for part in images.tensors
    )
    changed = fgsm(CONFIG.eps)(net, pixels, labels, [0] * len(labels))
    again = connectivity(net, [(changed, labels)], parts, classes=10, seed=CONFIG.seed)
    assert result.attacked["fgsm"]["composed"] == pytest.approx(again, abs=1e-3)
    assert result.attacked["pgd"]["composed"] != result.attacked["pgd"]["tuned"]


def test_trials_end_when_they_are_as_good_and_all_are_reported(found):
    result, _ = found
    assert [trial.number for trial in result.trials] == [0, 1]
    assert result.trials[0].own[0] == result.trials[1].own[0]  # both start from the same network
    for trial in result.trials:
        assert trial.converged == (trial.own[-1] >= result.target)
        assert trial.epochs == 2 or trial.converged
        assert all(own < result.target for own in trial.own[1:-1])
        assert all(len(row) == 2 for row in trial.connectivity)


@pytest.mark.slow
def test_a_trial_that_does_not_converge_is_reported_as_such(model, found, tmp_path, monkeypatch):
    shares = iter([0.9, 0.1, 0.5])
    monkeypatch.setattr("timm_nrpm.subnetworks.semirobust._Run._own", lambda *_: next(shares))
    star = timm.create_model("resnet8_digits")
    star.load_state_dict(load_file(found[1] / "robust.safetensors"))
    result = run(model, tmp_path, robust=star, epochs=1, trials=1)
    assert not (tmp_path / "robust.safetensors").exists()
    assert [trial.own for trial in result.trials] == [(0.1, 0.5)]
    assert not result.converged
    assert "none of 1 trials" in result.verdict
    assert result.right["pgd"]["robust"] == found[0].right["pgd"]["robust"]


def test_thresholds_are_the_smallest_of_the_converged_or_the_largest_of_all(found):
    trials = tuple(
        SubnetworkTrial(number, (0.1, own), ((0.0, 0.0), rho), converged)
        for number, own, rho, converged in (
            (0, 0.5, (1.0, 4.0), False), (1, 0.9, (2.0, 3.0), True), (2, 0.8, (3.0, 2.0), True),
        )
    )  # fmt: skip
    result = replace(found[0], trials=trials)
    assert result.thresholds == (2.0, 2.0)
    assert result.epochs == 1
    assert result.best.number == 1
    assert "2 of 3 trials" in result.verdict
    none = replace(result, trials=tuple(replace(trial, converged=False) for trial in trials))
    assert none.thresholds == (3.0, 4.0)
    assert none.epochs is None


def test_the_report_survives_json_and_prints_the_table(found):
    result, _ = found
    again = SubnetworkReport.from_json(result.to_json())
    assert again == result
    text = str(result)
    for wanted in ("A(F*)", "A(f_a*, f_b*)", "pgd", "layer3.0.conv2", "nats", "before and after tuning"):
        assert wanted in text


@pytest.mark.slow
def test_natural_training_comes_first_where_it_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet8_digits")
    result = run(model, tmp_path, natural_epochs=2, epochs=1, trials=1, late=1, config=replace(CONFIG, lr=0.1))
    assert result.accuracy("clean", "natural") > 0.3
    parts = split(model, 1)
    natural, robust, tuned = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("natural", "robust", "trial-0-1")
    )
    assert not torch.equal(natural["conv1.weight"], robust["conv1.weight"])
    assert torch.equal(tuned["conv1.weight"], robust["conv1.weight"])
    assert set(parts.late_state) == {"fc.weight", "fc.bias"}


def test_statistics_and_dropout_before_the_late_part_are_still(tmp_path):
    """Also of modules without weights, which would follow the block that they stand in."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first = nn.BatchNorm2d(1, affine=False), nn.Linear(64, 8)
            self.dropout, self.last = nn.Dropout(0.9), nn.Linear(8, 10)

        def forward(self, x):
            assert not self.dropout.training or self.first.weight.requires_grad
            return self.last(self.dropout(self.first(self.norm(x).flatten(1)).relu()))

    torch.manual_seed(0)
    run(Net(), tmp_path, late=1, epochs=1, trials=1, mean=(0.0,), std=(1.0,))
    robust, tuned = (load_file(tmp_path / f"{name}.safetensors") for name in ("robust", "trial-0-1"))
    assert not torch.equal(robust["norm.running_mean"], torch.zeros(1))
    changed = {name for name, value in robust.items() if not torch.equal(value, tuned[name])}
    assert changed == {"last.weight", "last.bias"}


@pytest.mark.slow
def test_another_norm_is_attacked_in_its_own_terms(model, tmp_path):
    result = run(model, tmp_path, config=replace(CONFIG, norm="L1", eps=2.0), epochs=1, trials=1)
    assert set(result.right) == {"clean", "pgd"}
    assert not result.attacked
    assert "before and after tuning" not in str(result)
    report = timm_nrpm.evaluate(model, batches(80, 160), timm_nrpm.Threat("L1", 2.0), "quick")
    assert result.accuracy("pgd", "natural") == report.accuracy("pgd")


def test_layers_of_windows_are_those_of_their_images():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1), num_heads=(2, 2), num_classes=4
    ).eval()
    parts = split(model, 3)
    with received(model, parts.layers, pooled=True) as found, torch.no_grad():
        whole = model(images := torch.randn(3, 3, 56, 56))
        together = {name: value.clone() for name, value in found.items()}
        assert torch.allclose(model(images[1:2]), whole[1:2], atol=1e-5)
    assert all(torch.allclose(together[name][1:2], found[name], atol=1e-4) for name in parts.layers)


def test_connectivity_is_that_of_consecutive_layers(model):
    pixels, labels = digits("train")
    parts = split(model, 2)
    images = list(zip(pixels.split(100), labels.split(100), strict=True))
    found = connectivity(PixelModel(model).eval(), images, parts, classes=10)
    with torch.no_grad():
        before = model.act1(model.bn1(model.conv1((pixels - 0.5) / 0.5)))
        after = model.layer2(model.layer1(model.maxpool(before)))
        block = model.layer3[0]
        first = block.act1(block.bn1(block.conv1(after))).mean((2, 3))
        pooled = model.global_pool(model.layer3(after))
        logits = model.fc(pooled)
    count = int(torch.bincount(labels).min())  # as many of every class
    rows = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(10)])
    first, pooled, logits, labels = (each[rows] for each in (first, pooled, logits, labels))
    wanted = (edge(first, pooled, given=labels), edge(pooled, logits, given=labels))
    assert found == pytest.approx(wanted, abs=0.01)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_table(tmp_path):
    command = [
        *(sys.executable, "-m", "timm_nrpm.cli", "subnetwork", "--late", "2", "--eps", "0.15", "--epochs", "2"),
        *("--steps", "1", "--trials", "2", "--late-epochs", "2", "--tolerance", "0", "--samples", "80"),
        *("--attacks", "quick", "--quiet"),
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    forked.run([*command, "--output", whole], check=True, capture_output=True)
    for seen in ("robust", "robust.safetensors", "trial-0-1.safetensors"):
        process = forked.Popen([*command, "--output", broken], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until = time.monotonic() + 120
        while not (broken / seen).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (broken / "subnetwork.json").exists()
    forked.run([*command, "--output", broken], check=True, capture_output=True)
    first, second = (json.loads((folder / "subnetwork.json").read_text()) for folder in (whole, broken))
    assert first == second


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree(model, tmp_path):
    """The second time everything is there, and nothing is computed again."""
    star = {**model.state_dict(), "conv1.weight": 1.1 * model.conv1.weight.detach()}
    save_file(star, tmp_path / "star.safetensors")
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = ["--late", "1", "--eps", "0.15", "--steps", "1", "--trials", "1", "--late-epochs", "1", "--samples", "80"]
    command += ["--attacks", "quick", "--json", "--robust-weights", str(tmp_path / "star.safetensors")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    found, kept = [], []
    for _ in range(2):
        done = forked.run(
            [sys.executable, "-m", *launcher, "-m", "timm_nrpm.cli", "subnetwork", *command, "--output", "run"],
            env=environment, cwd=tmp_path, check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["subnetwork"])
        kept.append((tmp_path / "run" / "trial-0-1.safetensors").stat().st_mtime_ns)
    assert found[0] == found[1]
    assert kept[0] == kept[1]
    assert {path.name for path in (tmp_path / "run").glob("*.jsonl*")} == {
        "trials.jsonl", "connectivity.jsonl",
        *(f"{name}-quick.jsonl.{rank}" for name in ("natural", "robust", "composed", "trial-0-1") for rank in (0, 1)),
    }  # fmt: skip
    alone = run(model, tmp_path / "alone", late=1, robust=with_weights(star), trials=1, epochs=1)
    report = SubnetworkReport.from_json(json.dumps(found[0]))
    assert report.trials[0].connectivity[0] == pytest.approx(alone.trials[0].connectivity[0], abs=1e-3)
    tuned = load_file(tmp_path / "run" / "trial-0-1.safetensors")
    assert torch.equal(tuned["conv1.weight"], star["conv1.weight"])
    assert not torch.equal(tuned["fc.bias"], star["fc.bias"])


def with_weights(state):
    net = timm.create_model("resnet8_digits")
    net.load_state_dict(state)
    return net.eval()


def test_processes_without_a_folder_are_refused(model):
    with pytest.raises(ValueError, match="folder=None, and several processes share"):
        run(model, None, accelerator=SimpleNamespace(num_processes=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"late": 8}, "late=8.*from 1 to 7"),
        ({"late": 0}, "late=0"),
        ({"trials": 0}, "trials=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"tolerance": 2}, "tolerance=2.*a share of the images"),
        ({"suites": ()}, "suites="),
        ({"suites": ("paper",)}, "suites=.'paper',. is not allowed"),
        ({"config": replace(CONFIG, norm="L1", eps=1.0), "suites": ("standard",)}, "has no attacks under L1"),
        ({"config": replace(CONFIG, trainable="fc.*")}, "trainable=.*has no place here"),
        ({"config": replace(CONFIG, objective="sat")}, "objective='sat' keeps targets"),
        ({"config": replace(CONFIG, objective="teacher")}, "objective='teacher' has no teacher here"),
        ({"config": replace(CONFIG, output="x", push_to="me/run")}, "push_to='me/run' has no place here"),
        ({"robust": timm.create_model("mlp1_mnist")}, "two of one architecture"),
    ],
)
def test_bad_settings_are_refused_before_any_work(model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "run", **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_images_that_cannot_serve_are_refused(model, tmp_path):
    few = semirobust, model, training(500), batches(0, 80), batches(80, 160), 2
    with pytest.raises(ValueError, match="of the 10 classes 10 have fewer: class 0 has 5"):
        few[0](*few[1:], config=CONFIG, folder=tmp_path)
    pixels, labels = digits("train")
    kept = labels != 3
    loader = DataLoader(TensorDataset(pixels[kept], labels[kept]), batch_size=64)
    with pytest.raises(ValueError, match="1 have fewer: class 3 has 0"):
        semirobust(model, loader, batches(0, 80), batches(80, 160), 2, config=CONFIG, folder=tmp_path)
    with pytest.raises(ValueError, match="training is a list: give a torch DataLoader"):
        semirobust(model, list(training()), batches(0, 80), batches(80, 160), 2, config=CONFIG, folder=tmp_path)
    with pytest.raises(ValueError, match="gave no images"):
        semirobust(model, training(), [], batches(80, 160), 2, config=CONFIG, folder=tmp_path)


def test_another_run_in_the_folder_is_refused(model, found):
    _, folder = found
    with pytest.raises(ValueError, match=r"trials.jsonl holds another run \(.*tolerance"):
        run(model, folder, tolerance=0.5)


def test_it_is_drawn(found, tmp_path):
    result, _ = found
    longer = replace(result, early=result.early[:-1], late=(result.early[-1], *result.late), trials=tuple(
        replace(trial, connectivity=tuple((1.0, *row) for row in trial.connectivity)) for trial in result.trials
    ))  # fmt: skip
    for drawn in (result, [result, longer]):
        assert timm_nrpm.plot(drawn, tmp_path / "picture.png").stat().st_size > 20_000
