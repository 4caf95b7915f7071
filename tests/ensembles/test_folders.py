"""Ensembles on disk: saved, loaded, damaged, replaced."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch

import timm_nrpm
from timm_nrpm import NRPMConfig, from_pretrained, reprogram_, save_pretrained
from timm_nrpm.data.loaders import digits
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing, Gate
from timm_nrpm.ensembles.crossmax import CrossMax
from timm_nrpm.ensembles.folders import ENSEMBLE, JOINTS
from timm_nrpm.ensembles.probes import fit_probes
from timm_nrpm.errors import BrokenVariant, MissingFile
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.models.reprogramming import reprogrammed_layers
from timm_nrpm.nn.pixel_model import PixelModel


def mixture(**settings):
    plain = timm.create_model(DIGITS, pretrained=True).eval()
    ours = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7, layers="layer1.*").eval()
    timm_nrpm.calibrate_(ours, [digits("train")[0][:64]])
    return AdaptiveSmoothing(plain, ours, **settings)


def deep():
    model = timm.create_model(DIGITS, pretrained=True).eval()
    probes = fit_probes(model, [tuple(part[:100] for part in digits("train"))], ["layer1"])
    return CrossMax(PixelModel(model, (0.1,), (0.9,)), sizes=(8, 5), probes=probes, rank=2)


MADE = {
    "fixed": lambda: mixture(share=0.65, robust_scale=2.5),
    "gate": lambda: mixture(gate=Gate(0.1, 0.8, 1.0, -2.0, 0.5, 0.1)),
    "crossmax": deep,
}


@torch.no_grad()
def logits(model):
    return PixelModel(model).eval()(digits("test")[0][:20])


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("full", [False, True])
def test_round_trip(tmp_path, name, full):
    model = MADE[name]()
    folder = save_pretrained(model, tmp_path / "deep" / "it", full=full)
    again = from_pretrained(folder)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert again.settings() == model.settings()
    for member in model.members:
        ours, theirs = (each.member(member).net.model for each in (model, again))
        assert bool(reprogrammed_layers(ours)) == bool(reprogrammed_layers(theirs))
        assert (folder / f"{member}.model.safetensors").exists() == full
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["it"]


def test_weights_without_a_public_name_are_written(tmp_path):
    trained = timm.create_model(DIGITS, pretrained=True).eval()
    trained.fc.weight.data.mul_(1.5)
    folder = save_pretrained(AdaptiveSmoothing(trained, timm.create_model(DIGITS, pretrained=True)), tmp_path / "it")
    assert (folder / "accurate.model.safetensors").exists()
    assert not (folder / "robust.model.safetensors").exists()
    assert torch.equal(from_pretrained(folder).member("accurate").net.model.fc.weight, trained.fc.weight)


def test_another_ensemble_replaces_it(tmp_path):
    folder = save_pretrained(mixture(), tmp_path / "it")
    (folder / "notes.txt").write_text("mine")
    save_pretrained(deep(), folder)
    names = {path.name for path in folder.iterdir()}
    assert "notes.txt" in names
    assert not any(name.startswith(("accurate.", "robust.")) for name in names)
    assert isinstance(from_pretrained(folder), CrossMax)


def test_a_variant_and_an_ensemble_do_not_replace_each_other(tmp_path):
    variant = save_pretrained(timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5), tmp_path / "variant")
    with pytest.raises(ValueError, match="exists and holds no ensemble"):
        save_pretrained(mixture(), variant)
    ensemble = save_pretrained(mixture(), tmp_path / "ensemble")
    with pytest.raises(ValueError, match="exists and holds no variant"):
        save_pretrained(timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5), ensemble)
    assert from_pretrained(variant) is not None
    assert from_pretrained(ensemble) is not None


def hash_of_object(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_of_state(state):
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name]
        digest.update(json.dumps([name, f"torch.{values.dtype}", list(values.shape)]).encode() + values.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("gate", [None, Gate(0.1, 0.8, 1.0, -2.0, 0.5, 0.1)])
def test_the_hash_is_that_of_the_documented_state(tmp_path, gate):
    """By a second implementation of docs/format.md, from the files and timm's plain model alone."""
    folder = save_pretrained(mixture(share=0.65, robust_scale=2.5, gate=gate), tmp_path / "it")
    content = json.loads((folder / ENSEMBLE).read_text())
    plain = {k: v.numpy() for k, v in timm.create_model(DIGITS, pretrained=True).state_dict().items()}
    state, estimates = {}, {}
    for name, member in content["members"].items():
        config = json.loads((folder / f"{name}.nrpm_config.json").read_text())
        place = f"members.{name}.net.model."
        state |= {f"{place}{key}": values for key, values in plain.items()}
        state |= {f"members.{name}.net.{key}": np.float32(member[key]).reshape(-1, 1, 1) for key in ("mean", "std")}
        state[f"members.{name}.resized_to"] = np.zeros(2, np.int64)
        if member["plain"]:
            continue
        kept = safetensors.numpy.load_file(folder / f"{name}.nrpm.safetensors")
        state |= {f"{place}{key}": values for key, values in kept.items()}
        keys = ("iterations", "eps", "penalty", "delta", "gamma")
        estimates |= {f"{place}{layer}": {key: config["settings"][key] for key in keys} for layer in config["layers"]}
    settings = content["settings"]
    numbers = [settings[key] for key in ("share", "accurate_scale", "robust_scale")]
    numbers += [] if settings["gate"] is None else list(settings["gate"].values())
    state["numbers"] = np.array(numbers, np.float32)
    assert hash_of_object({"estimates": estimates, "state": hash_of_state(state)}) == content["model"]
    checksum = content.pop("sha256")
    assert hash_of_object(content) == checksum
    for name, expected in content["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert set(content["files"]) | {ENSEMBLE} == {path.name for path in folder.iterdir()}


def changed(folder, change):
    content = json.loads((folder / ENSEMBLE).read_text())
    content.pop("sha256")
    change(content)
    (folder / ENSEMBLE).write_text(json.dumps({**content, "sha256": checksum_of(content)}))


DAMAGE = {
    "a byte of a member": lambda f: (f / "robust.nrpm.safetensors").write_bytes(
        (f / "robust.nrpm.safetensors").read_bytes()[:-1] + b"\x01"
    ),
    "a byte of the joints": lambda f: (f / JOINTS).write_bytes((f / JOINTS).read_bytes() + b" "),
    "a member is missing": lambda f: (f / "robust.nrpm_config.json").unlink(),
    "cut short": lambda f: (f / ENSEMBLE).write_text((f / ENSEMBLE).read_text()[:50]),
    "no object": lambda f: (f / ENSEMBLE).write_text("[]"),
    "another share, without its hash": lambda f: (f / ENSEMBLE).write_text(
        (f / ENSEMBLE).read_text().replace('"share": 0.5', '"share": 0.9')
    ),
    "another share, with a hash": lambda f: changed(f, lambda c: c["settings"].update(share=0.9)),
    "a share outside its range": lambda f: changed(f, lambda c: c["settings"].update(share=9)),
    "an unknown setting": lambda f: changed(f, lambda c: c["settings"].update(other=1)),
    "a later format": lambda f: changed(f, lambda c: c.update(format=2)),
    "an unknown kind": lambda f: changed(f, lambda c: c.update(kind="os.system")),
    "a path outside": lambda f: changed(f, lambda c: c["files"].update({"../x": "0" * 64})),
    "members exchanged": lambda f: changed(
        f, lambda c: c.update(members={"accurate": c["members"]["robust"], "robust": c["members"]["accurate"]})
    ),
    "a member with a path": lambda f: changed(f, lambda c: c["members"].update({"../x": c["members"]["robust"]})),
    "another normalisation": lambda f: changed(f, lambda c: c["members"]["robust"].update(mean=[0.9])),
    "a normalisation that is none": lambda f: changed(f, lambda c: c["members"]["robust"].update(mean=["x"])),
    "a size that is none": lambda f: changed(f, lambda c: c["members"]["robust"].update(size=[0])),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused(tmp_path, what):
    folder = save_pretrained(mixture(), tmp_path / "it")
    DAMAGE[what](folder)
    with pytest.raises((BrokenVariant, MissingFile)):
        from_pretrained(folder)


def test_what_cannot_be_loaded_so(tmp_path):
    folder = save_pretrained(mixture(), tmp_path / "it")
    with pytest.raises(ValueError, match="leave out base="):
        from_pretrained(folder, base=timm.create_model(DIGITS, pretrained=True))
    with pytest.raises(MissingFile, match="holds no nrpm_config"):
        from_pretrained(tmp_path)


def test_a_reprogrammed_member_that_was_tuned_keeps_its_weights(tmp_path):
    ours = reprogram_(timm.create_model(DIGITS, pretrained=True), NRPMConfig(lam=0.6)).eval()
    ours.fc.weight.data.add_(0.1)
    model = AdaptiveSmoothing(timm.create_model(DIGITS, pretrained=True).eval(), ours)
    again = from_pretrained(save_pretrained(model, tmp_path / "it"))
    assert torch.equal(logits(again), logits(model))
