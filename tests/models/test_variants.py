import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forked
import pytest
import timm
import torch
import torch.nn as nn

import timm_nrpm
from timm_nrpm import NRPMConfig, calibrate_, from_pretrained, lambdas, reprogram_, save_pretrained
from timm_nrpm.errors import BrokenVariant, WrongBase
from timm_nrpm.models.registry import DIGITS

FILES = ["nrpm_config.json", "nrpm.safetensors", "config.json"]


def variant(**settings):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, **{"lam": 0.7, "layers": "layer*", **settings}).eval()
    return calibrate_(model, [torch.rand(32, 1, 8, 8)])


@torch.no_grad()
def same(a, b, *shape):
    x = torch.randn(4, *shape)
    return torch.equal(a.eval()(x), b.eval()(x))


@pytest.mark.parametrize("full", [False, True])
def test_round_trip(tmp_path, full):
    model = variant(penalty="huber", iterations=2, eps=0.01)
    folder = save_pretrained(model, tmp_path / "deep" / "v", full=full)
    again = from_pretrained(folder)
    assert same(model, again, 1, 8, 8)
    assert lambdas(again) == lambdas(model)
    config = again.layer1[0].conv1.config
    assert (config.penalty, config.iterations, config.eps) == ("huber", 2, 0.01)
    plain = timm.create_model(DIGITS, pretrained=True)
    assert same(timm_nrpm.restore_(again), plain, 1, 8, 8)  # the old statistics came along
    files = sorted(f.name for f in folder.iterdir())
    assert files == sorted(FILES + ["model.safetensors"] * full)
    if not full:
        assert sum(f.stat().st_size for f in folder.iterdir()) < 8192
    assert os.listdir(tmp_path / "deep") == ["v"]


def test_a_resnet50_is_a_few_kilobytes(tmp_path):
    model = timm_nrpm.create_model("resnet50", lam=0.8).eval()
    assert sum(tensor.nbytes for tensor in timm_nrpm.plain_copy(model).state_dict().values()) // 10**6 == 102
    sizes = []
    for folder in ("lambdas", "calibrated"):
        sizes.append(sum(f.stat().st_size for f in save_pretrained(model, tmp_path / folder).iterdir()))
        calibrate_(model, [torch.rand(2, 3, 64, 64)])
    assert sizes[0] < 7000 < sizes[1] < 229_000


def test_a_layer_alone(tmp_path):
    base = nn.Linear(4, 3)
    model = reprogram_(nn.Linear(4, 3), NRPMConfig(lam=0.3))
    base.load_state_dict(timm_nrpm.plain_copy(model).state_dict())
    assert same(from_pretrained(save_pretrained(model, tmp_path / "v"), base=base), model, 4)


def test_a_module_with_two_names_has_no_full_folder(tmp_path):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, layers="layer1*")
    model.layer1.again = model.layer1[0]
    with pytest.raises(ValueError, match=r"12 not in the model, like layer1\.again"):
        save_pretrained(model, tmp_path / "v", full=True)
    assert not (tmp_path / "v").exists()


def test_a_full_folder_is_the_plain_model_to_timm(tmp_path):
    folder = save_pretrained(variant(), tmp_path / "v", full=True)
    assert same(
        timm.create_model(f"local-dir:{folder}", pretrained=True), timm.create_model(DIGITS, pretrained=True), 1, 8, 8
    )


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mixer_s32_224", "efficientnet_b0"])
def test_full_folders_of_timm_models(tmp_path, name):
    model = timm_nrpm.create_model(name, lam=0.6, iterations=1, layers="first:2", num_classes=3)
    assert same(from_pretrained(save_pretrained(model, tmp_path / "v", full=True)), model, 3, 224, 224)


def test_arguments_of_timms_factory_do_not_reach_the_model(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "w.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), file)
    kwargs = {"checkpoint_path": str(file), "exportable": True, "pretrained_cfg_overlay": {"mean": (0.1, 0.1, 0.1)}}
    model = timm_nrpm.create_model("resnet18", layers="layer1.*", **kwargs)
    again = from_pretrained(save_pretrained(model, tmp_path / "v", full=True))
    assert same(again, model, 3, 64, 64)
    assert again.pretrained_cfg["mean"] == (0.1, 0.1, 0.1) or list(again.pretrained_cfg["mean"]) == [0.1] * 3


@pytest.mark.parametrize("full", [False, True])
def test_half_precision(tmp_path, full):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, dtype=torch.bfloat16, layers="layer1.*").eval()
    again = from_pretrained(save_pretrained(model, tmp_path / "v", full=full))
    x = torch.randn(4, 1, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_link_to_another_disk(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        (tmp_path / "v").symlink_to(other)
        assert lambdas(from_pretrained(save_pretrained(variant(), tmp_path / "v")))


def test_a_stray_weight_file_is_not_read(tmp_path):
    folder = save_pretrained(variant(), tmp_path / "v")
    (folder / "model.safetensors").write_bytes(b"not mine")
    assert lambdas(from_pretrained(folder))


def test_a_base_that_is_reprogrammed(tmp_path):
    model = variant()
    with pytest.raises(ValueError, match="give the plain model"):
        from_pretrained(save_pretrained(model, tmp_path / "v"), base=model)


def test_features_only(tmp_path):
    model = timm_nrpm.create_model("resnet18", features_only=True, layers="layer1*")
    with pytest.raises(ValueError, match="no timm classifier"):
        save_pretrained(model, tmp_path / "v", full=True)
    assert not (tmp_path / "v").exists()


def test_learned_lambdas_and_weights(tmp_path):
    model = reprogram_(variant(), NRPMConfig(lam=0.5, learnable=True))
    with torch.no_grad():
        for i, layer in enumerate(m for m in model.modules() if hasattr(m, "lam")):
            layer.lam.fill_(i / 20)
        model.layer1[0].conv1.lam.fill_(1.3)  # an optimizer went past the end
    again = from_pretrained(save_pretrained(model, tmp_path / "a"))
    assert lambdas(again) == lambdas(model)
    assert lambdas(again)["layer1.0.conv1"] == 1.0
    with torch.no_grad():
        model.conv1.weight.add_(0.01)
    with pytest.raises(ValueError, match="would lose them: save with full=True"):
        save_pretrained(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    again = from_pretrained(save_pretrained(model, tmp_path / "b", full=True))
    assert torch.equal(again.conv1.weight, model.conv1.weight)


def test_timms_model_reprogrammed_and_its_lambdas_learned(tmp_path):
    """What is said about the base does not depend on which create_model made it."""
    config = NRPMConfig(lam=0.5, learnable=True, layers="layer1.*")
    model = reprogram_(timm.create_model(DIGITS, pretrained=True).eval(), config)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith(".lam")], lr=0.1)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    again = from_pretrained(save_pretrained(model, tmp_path / "v"))
    assert lambdas(again) == lambdas(model)
    assert set(lambdas(model).values()) != {0.5}
    assert same(again, model, 1, 8, 8)
    model.train()(torch.randn(4, 1, 8, 8))  # moves BatchNorm statistics
    again = from_pretrained(save_pretrained(model.eval(), tmp_path / "w"))
    assert same(again, model, 1, 8, 8)
    plain = timm.create_model(DIGITS, pretrained=True)
    assert torch.equal(timm_nrpm.restore_(again).bn1.running_mean, plain.bn1.running_mean)


def test_weights_without_a_public_name_need_their_base(tmp_path):
    model = timm_nrpm.create_model("resnet18", lam=0.5, layers="layer1.*", num_classes=3)
    folder = save_pretrained(model, tmp_path / "v")
    with pytest.raises(WrongBase, match="give it as base="):
        from_pretrained(folder)
    with pytest.raises(WrongBase, match="weights sha256"):
        from_pretrained(folder, base=timm.create_model("resnet18", num_classes=3))
    base = timm.create_model("resnet18", num_classes=3)
    base.load_state_dict(timm_nrpm.plain_copy(model).state_dict())
    assert same(from_pretrained(folder, base=base), model, 3, 64, 64)


def test_a_model_that_is_not_timms(tmp_path):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    base = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    base.load_state_dict(plain.state_dict())
    model = calibrate_(reprogram_(plain, NRPMConfig(lam=0.3)), [torch.rand(32, 3, 2, 2)])
    folder = save_pretrained(model, tmp_path / "v")
    assert same(from_pretrained(folder, base=base), model, 3, 2, 2)  # the corrections came along
    with pytest.raises(ValueError, match="is no timm classifier"):
        save_pretrained(model, tmp_path / "w", full=True)
    assert os.listdir(tmp_path) == ["v"]


def test_saving_over_a_variant(tmp_path):
    folder = tmp_path / "v"
    save_pretrained(variant(lam=0.2), folder, full=True)
    (folder / "notes.txt").write_text("mine")
    model = variant(lam=0.9)
    save_pretrained(model, folder)
    assert sorted(os.listdir(folder)) == sorted([*FILES, "notes.txt"])
    assert same(from_pretrained(folder), model, 1, 8, 8)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds no variant"):
        save_pretrained(model, other)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_only_reprogrammed_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="not reprogrammed"):
        save_pretrained(timm.create_model(DIGITS), tmp_path / "v")
    assert os.listdir(tmp_path) == []


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def link(path, target="elsewhere"):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(target)


DAMAGE = {
    "a link": (lambda f: link(f / FILES[1]), "is a link"),
    "a link to nowhere": (lambda f: link(f / FILES[0], "/dev/zero"), "is a link"),
    "a folder": (lambda f: ((f / FILES[1]).unlink(), (f / FILES[1]).mkdir()), "is a link or no file"),
    "no config": (lambda f: (f / FILES[0]).unlink(), "holds no nrpm_config.json"),
    "no tensors": (lambda f: (f / FILES[1]).unlink(), "nrpm.safetensors is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "config cut": (lambda f: (f / FILES[0]).write_text((f / FILES[0]).read_text()[:-90]), "cut short"),
    "config empty": (lambda f: (f / FILES[0]).write_text(""), "cut short"),
    "config a list": (lambda f: (f / FILES[0]).write_text("[]"), "no variant's config"),
    "config changed": (lambda f: rewrite(f / FILES[0], lambda c: c["settings"].update(iterations=1)), "was changed"),
    "later format": (lambda f: rewrite(f / FILES[0], lambda c: c.update(format=99)), "format 99"),
    "tensors cut": (lambda f: (f / FILES[1]).write_bytes((f / FILES[1]).read_bytes()[:-8]), "cut short or was changed"),
    "tensors changed": (lambda f: flip(f / FILES[1], -1), "cut short or was changed"),
    "weights changed": (lambda f: flip(f / "model.safetensors", -1), "cut short or was changed"),
    "timm config changed": (lambda f: rewrite(f / "config.json", lambda c: c.update(x=1)), "cut short or was changed"),
    "no folder": (lambda f: f.rename(f.with_name("gone")), "holds no nrpm_config.json"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told(tmp_path, harm, message):
    folder = save_pretrained(variant(), tmp_path / "v", full=True)
    harm(folder)
    with pytest.raises(BrokenVariant, match=message):
        from_pretrained(folder)


FORGERIES = {
    "lambda out of range": ({"layer1.0.conv1.lam": torch.tensor(1.5)}, [], "cannot read|can read"),
    "a tensor too many": ({"layer1.0.conv1.extra": torch.zeros(1)}, [], "no place"),
    "a module that is not there": ({"nowhere.running_mean": torch.zeros(8)}, [], "no place"),
    "a wrong shape": ({"layer1.0.bn1.running_mean": torch.zeros(9)}, [], "no place"),
    "a lambda too few": ({}, ["layer1.0.conv1.lam"], "can read"),
}


@pytest.mark.parametrize(
    "forged",
    [
        {"dtype": "load"},
        {"dtype": "float99"},
        {"kwargs": {"checkpoint_path": "elsewhere.pth"}},
        {"kwargs": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"}}},
    ],
)
def test_a_forged_base_is_not_followed(tmp_path, forged):
    from timm_nrpm.models.base import checksum_of

    folder = save_pretrained(variant(), tmp_path / "v")
    content = json.loads((folder / FILES[0]).read_text())
    del content["sha256"]
    content["base"].update(forged)
    (folder / FILES[0]).write_text(json.dumps({**content, "sha256": checksum_of(content)}))
    with pytest.raises(
        BrokenVariant, match=r"is no dtype of torch|does not name its weights|may say what images are like"
    ):
        from_pretrained(folder)


@pytest.mark.parametrize(("add", "drop", "message"), FORGERIES.values(), ids=FORGERIES)
def test_forged_contents_with_fitting_hashes(tmp_path, add, drop, message):
    """What a hash does not catch: a folder that somebody made, whose hashes are right."""
    import hashlib

    from safetensors.torch import load_file, save_file

    from timm_nrpm.models.base import checksum_of

    folder = save_pretrained(variant(), tmp_path / "v")
    tensors = {k: v for k, v in {**load_file(folder / FILES[1]), **add}.items() if k not in drop}
    save_file(tensors, folder / FILES[1])
    content = json.loads((folder / FILES[0]).read_text())
    del content["sha256"]
    content["files"][FILES[1]] = hashlib.sha256((folder / FILES[1]).read_bytes()).hexdigest()
    (folder / FILES[0]).write_text(json.dumps({**content, "sha256": checksum_of(content)}))
    base = timm.create_model(DIGITS, pretrained=True)
    state = list(base.state_dict())
    with pytest.raises(BrokenVariant, match=message):
        from_pretrained(folder, base=base)
    assert list(base.state_dict()) == state  # plain again


SAVER = """
import sys, timm_nrpm
model = timm_nrpm.create_model("resnet18", lam=0.5, layers="layer1.*", num_classes=3)
print("ready", flush=True)
for i in range(10000):
    timm_nrpm.save_pretrained(model, sys.argv[1], full=True)
"""


def test_killed_while_saving_leaves_a_whole_variant_or_a_refused_one(tmp_path):
    """SIGKILL at several moments: what is then in the folder loads, or says that it is broken; never half of each."""
    folder = tmp_path / "v"
    outcomes = set()
    for delay in (0.0, 0.05, 0.3, 0.7, None, 0.3):
        process = forked.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        while delay is None and not (folder / FILES[0]).exists():  # once, on a machine however slow, it is done
            time.sleep(0.01)
        time.sleep(delay or 0.0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        try:
            outcomes.add(len(lambdas(from_pretrained(folder))))
        except BrokenVariant as error:
            outcomes.add(str(error).rpartition(": ")[2])
    assert outcomes <= {4, "give a folder that save_pretrained wrote.", "get it again."}
    assert 4 in outcomes


def test_nothing_is_pickled_or_executed():
    """What torch.load reads with weights_only=True, as the paper's authors published theirs, cannot run code."""
    for file in Path(timm_nrpm.__file__).parent.rglob("*.py"):
        assert not re.search(
            r"pickle|torch\.save\b|torch\.load\b(?!\([^()]*weights_only=True\))|(?<![.\w])(eval|exec)\(",
            file.read_text(),
        ), file.name
