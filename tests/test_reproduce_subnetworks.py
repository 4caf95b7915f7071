"""The second paper's experiments on generated images: Algorithm 1 in its two forms, Algorithm 2, and the front of
layers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "reproduce"
SMALL = {
    "resnet18_cifar": {"layers": (1, 1, 1, 1), "channels": (4, 8, 16, 32)},
    "wideresnet34_cifar": {"layers": (1, 1, 1), "channels": (4, 8, 16)},
    "resnet18_cifar_narrow": {},
}


@pytest.fixture
def folders(scripts, tmp_path, monkeypatch):
    """Images of ten shades, a hundred to train on and four to test on of each, and weights in the published names."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 4)):
        for label in range(10):
            folder = tmp_path / "data" / "images" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                shade = np.clip(25 * label + generator.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(shade).save(folder / f"{number}.png")
    lab = scripts("lab")
    images = (("folder", "images"),)
    monkeypatch.setattr(lab, "READERS", dict.fromkeys(("cifar10", "cifar100"), images))
    for mode in ("quick", "full"):
        effort = replace(lab.EFFORTS[mode]["resnet"], samples=1000, epochs=1, tuning=1)
        monkeypatch.setitem(lab.EFFORTS, mode, dict.fromkeys(lab.FAMILIES, effort))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "tinyresnet18_cifar10_model.t7"
    torch.save(timm.create_model("resnet18_cifar_narrow").state_dict(), file)
    return ["--data", str(tmp_path / "data"), "--checkpoints", str(tmp_path / "checkpoints")]


def run(module, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    module.main()


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_algorithm_1_on_generated_images(scripts, folders, tmp_path, monkeypatch, full):
    module = scripts("subnetworks")
    monkeypatch.setattr(module, "STEPS", 1)
    name = "FULL" if full else "QUICK"
    cases = tuple(
        replace(
            case, samples=1000, natural_samples=1000, natural_epochs=1, epochs=1, trials=1, late_epochs=1, images=20,
            suites=("quick",), build=SMALL[case.network],
        )
        for case in getattr(module, name)[::3]
    )  # fmt: skip
    assert [(case.network, case.dataset) for case in cases] == (
        [("resnet18_cifar", "cifar10"), ("wideresnet34_cifar", "cifar100")] if full
        else [("resnet18_cifar_narrow", "cifar10")]
    )  # fmt: skip
    monkeypatch.setattr(module, name, cases)
    kept, out = tmp_path / "kept", tmp_path / "out"
    arguments = [
        *folders,
        "--kept",
        str(kept),
        "--out",
        str(out),
        *(["--full", "--late", "1"] if full else ["--late", "1", "2"]),
    ]
    run(module, [*arguments, "--networks"], monkeypatch)
    assert not out.exists()
    run(module, arguments, monkeypatch)
    found = json.loads((out / "subnetworks.json").read_text())
    assert set(found) == {case.name for case in cases}
    for case in cases:
        assert set(found[case.name]) == ({"1"} if full else {"1", "2"})
        assert Image.open(out / module.picture(case)).size[0] > 300
    page = (out / "subnetworks.md").read_text()
    for wanted in ("The last 1 of", "| layer | natural | tuned | fgsm | pgd |"):
        assert page.count(wanted) >= len(cases)
    assert ("before tuning, a longer robust part" in page) == (not full)
    before = {file: file.read_bytes() for file in out.iterdir()}
    run(module, [*arguments, "--page"], monkeypatch)
    assert before == {file: file.read_bytes() for file in out.iterdir()}


def test_the_papers_numbers_stand_beside_ours(scripts):
    module = scripts("subnetworks")
    for case in (*module.QUICK, *module.FULL):
        for late in module.LATE:
            assert [len(row) for row in module.PAPER[case.paper, case.dataset, late]] == [4] * len(module.MEASURES)


@pytest.mark.slow
def test_algorithm_2_on_generated_images(scripts, folders, tmp_path, monkeypatch):
    module = scripts("linear_readout")
    monkeypatch.setattr(module, "IMAGES", 40)
    monkeypatch.setattr(module, "BATCH", 20)
    run(module, [*folders, "--out", str(tmp_path / "out")], monkeypatch)
    found = json.loads((tmp_path / "out" / "linear-readout.json").read_text())
    assert set(found) == set(module.PAPER)
    assert all(set(rows) == {"17", "13", "9"} for rows in found.values())
    networks = [rows["17"]["network"] for rows in found.values()]
    assert networks[0] >= networks[1]
    page = (tmp_path / "out" / "linear-readout.md").read_text()
    assert page.count("\n| ") == 1 + 12


@pytest.mark.slow
def test_the_front_on_generated_images(scripts, folders, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    module = scripts("layers_front")
    few = {"NETWORK": "resnet10_cifar_narrow", "SAMPLES": 32, "EPOCHS": 1, "STEPS": 1, "BATCH": 16}
    few |= {"TUNED_COUNTS": (1, 3), "REPROGRAMMED_COUNTS": (1,)}
    for name, value in {**few, "CHOSEN_ON": 10, "JUDGED_ON": 10, "CLEAN_SAMPLES": 1000, "CLEAN_EPOCHS": 1}.items():
        monkeypatch.setattr(module, name, value)
    arguments = [*folders[:2], "--kept", str(tmp_path / "kept"), "--out", str(tmp_path / "out")]
    for part in ("0", "1"):
        run(module, [*arguments, "--part", part, "2"], monkeypatch)
        assert not (tmp_path / "out").exists()
    run(module, arguments, monkeypatch)
    found = json.loads((tmp_path / "out" / "layers-front.json").read_text())
    wanted = {f"tuned-{kind}-{number}" for kind in ("first", "last", "critical") for number in (1, 3)}
    wanted |= {"tuned-plain-0", "tuned-all-10", "reprogrammed-all-10"}
    assert set(found["selection"]) == wanted | {"reprogrammed-first-1", "reprogrammed-last-1"}
    first, last = (
        load_file(tmp_path / "kept" / "choices" / f"tuned-{kind}-1.safetensors") for kind in ("first", "last")
    )
    differ = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, last[name])}
    assert differ == {"conv1", "bn1", "fc"}
    assert found["report"]["tuned, all"]["choice"] == "tuned-all-10"
    assert Image.open(tmp_path / "out" / "layers-front.png").size[0] > 300
    page = (tmp_path / "out" / "layers-front.md").read_text()
    assert page.count("| tuned, ") + page.count("| reprogrammed, ") == len(found["report"])
