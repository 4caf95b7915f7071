"""Folders through timm's own factory, and folders that anyone can load, in one process."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_nrpm
from timm_nrpm import NRPMConfig, from_pretrained, lambdas, reprogram_, save_pretrained
from timm_nrpm.errors import BrokenVariant
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.downloads import sha256_of
from timm_nrpm.models.format import LARGEST
from timm_nrpm.models.loading import find_variant, from_timm, is_variant, with_random_weights
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.models.reprogramming import record_of
from timm_nrpm.models.saving import complete, needs_weights, save_loadable

PIXELS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def digits(**settings):
    return timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7, **settings).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(PIXELS)


def test_timm_builds_what_was_saved(tmp_path):
    model = digits(layers="layer*")
    folder = save_pretrained(model, tmp_path / "v")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(again), logits(model))
    assert lambdas(again) == lambdas(model)


def test_timm_builds_it_with_random_weights(tmp_path):
    model = digits(layers="layer*")
    folder = save_pretrained(model, tmp_path / "v")
    torch.manual_seed(1)
    first, second = (timm.create_model(f"local-dir:{folder}", pretrained=False) for _ in range(2))
    assert lambdas(first) == lambdas(second) == lambdas(model)
    assert not torch.equal(logits(first), logits(second))
    assert not torch.equal(first.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


@pytest.mark.parametrize("pretrained", [False, True])
def test_timms_arguments_that_a_variant_refuses(tmp_path, pretrained):
    folder = save_pretrained(digits(), tmp_path / "v")
    with pytest.raises(ValueError, match=r"^.*/v is a variant, and is loaded as it was saved: without num_classes, dr"):
        timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=3, drop_rate=0.1)
    made = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, num_classes=None, cache_dir=tmp_path)
    assert lambdas(made) == lambdas(digits())


def test_where_timms_config_says_that_a_variant_is(tmp_path, monkeypatch):
    """A folder, or a repository with the revision behind the at sign, and the cache that was asked for."""
    asked = []
    monkeypatch.setattr("timm_nrpm.models.loading.load_variant", lambda source, **rest: asked.append((source, rest)))
    from_timm({"source": "local-dir", "file": str(tmp_path)}, True, {})
    from_timm({"source": "hf-hub", "hf_hub_id": "me/x"}, True, {"cache_dir": "there", "pretrained_model_args": {}})
    from_timm({"source": "hf-hub", "hf_hub_id": "me/x@v1"}, True, {"num_classes": None})
    assert asked == [
        (tmp_path, {"revision": None, "cache_dir": None}),
        ("hf-hub:me/x", {"revision": None, "cache_dir": "there"}),
        ("hf-hub:me/x", {"revision": "v1", "cache_dir": None}),
    ]
    with pytest.raises(
        ValueError, match=r"^me/x is a variant, and is loaded as it was saved: without in_chans\. Change"
    ):
        from_timm({"source": "hf-hub", "hf_hub_id": "me/x@v1"}, True, {"in_chans": 1})


@pytest.mark.parametrize(
    ("cfg", "is_one"),
    [
        ({"source": "hf-hub"}, True),
        ({"source": "local-dir"}, True),
        ({"source": "timm"}, False),
        ({}, False),
        (None, False),
        ("hf-hub", False),
    ],
)
def test_what_timm_read_from_a_variant(cfg, is_one):
    assert is_variant(cfg) is is_one


def test_a_variant_that_timm_cannot_build(tmp_path, monkeypatch):
    found = find_variant(save_pretrained(digits(), tmp_path / "v"))
    monkeypatch.setitem(found.variant.base.kwargs, "no_such_argument", 1)
    with pytest.raises(BrokenVariant, match=r"^here holds no model that timm can build: TypeError\(.*no_such_argument"):
        with_random_weights(found.variant, "here")


def named():
    return digits()


def trained():
    model = digits()
    with torch.no_grad():
        model.fc.weight.add_(0.1)
    return model


def unnamed():
    torch.manual_seed(0)
    return reprogram_(timm.create_model(DIGITS), NRPMConfig(lam=0.7))


@pytest.mark.parametrize(
    ("make", "changed", "holds"), [(named, False, False), (trained, True, True), (unnamed, False, True)]
)
def test_a_folder_that_can_be_loaded_anywhere(tmp_path, make, changed, holds):
    """It holds the weights where no public name leads to them: they were trained, or are of the user's own."""
    model = make()
    assert needs_weights(model) is changed
    folder = tmp_path / "v"
    assert save_loadable(model, folder) is holds
    assert (folder / "model.safetensors").exists() is holds
    assert complete(model, folder) is holds  # and a second time
    assert torch.equal(logits(from_pretrained(folder)), logits(model))


def test_weights_are_added_to_a_folder_that_lacks_them(tmp_path):
    model = unnamed()
    folder = save_pretrained(model, tmp_path / "v")
    assert not (folder / "model.safetensors").exists()
    assert complete(model, folder) is True
    assert torch.equal(logits(from_pretrained(folder)), logits(model))


def test_what_was_fitted_is_recorded(tmp_path):
    """Of which kind it was and from how many images, also in what is loaded."""
    model = timm_nrpm.calibrate_(digits(), [PIXELS, PIXELS])
    folder = save_pretrained(model, tmp_path / "v")
    (step,) = find_variant(folder).variant.statistics
    assert (step.kind, step.images) == ("calibration", 8)
    assert record_of(from_pretrained(folder)).statistics == (step,)
    assert find_variant(save_pretrained(digits(), tmp_path / "w")).variant.statistics == ()


class Asked:
    """A repository that notes what it is asked for, and has the files of a folder."""

    def __init__(self, folder, *settings):
        self.folder, self.settings, self.fetched = folder, settings, []

    def at(self, path, name):
        assert path == self.folder / name
        return self

    def fetch(self, name, most):
        self.fetched.append((name, most))
        return self.folder / name


def test_what_a_repository_is_asked_for(tmp_path, monkeypatch):
    """Each file with the most that it may hold, and at the place that was named."""
    folder = save_pretrained(trained(), tmp_path / "v", full=True)
    monkeypatch.setattr("timm_nrpm.models.loading.Repository", lambda *settings: Asked(folder, *settings))
    found = find_variant("hf-hub:me/x", revision="v1", cache_dir="there", token="of-me", local_files_only=True)
    assert found.repository.settings == ("me/x", "v1", "there", "of-me", True)
    assert found.repository.fetched == [(name, LARGEST.get(name)) for name, _ in found.repository.fetched]
    assert {name for name, _ in found.repository.fetched} == {*found.names()}
    assert found.where == "me/x"
    assert find_variant("me/x").repository.settings == ("me/x", None, None, None, False)
    built = []
    monkeypatch.setattr(type(found.variant), "build", lambda *given: built.append(given))
    found.build("there", "of-me", True)
    ((variant, find, make_base, where),) = built
    assert (variant, find, where) == (found.variant, found.find, "me/x")
    assert make_base.args == ("there", "of-me", True)


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_a_folder_goes_before_a_repository(tmp_path, monkeypatch, kind):
    folder = save_pretrained(digits(), tmp_path / "me" / "x")
    monkeypatch.chdir(tmp_path)
    for name in (folder, folder.relative_to(tmp_path)):
        found = find_variant(kind(name))
        assert (found.repository, found.where) == (None, str(name))


def changed(folder, change):
    """The config of a variant after a change of its content, with a hash that fits."""
    content = json.loads((folder / "nrpm_config.json").read_text())
    del content["sha256"]
    change(content)
    (folder / "nrpm_config.json").write_text(json.dumps({**content, "sha256": checksum_of(content)}))
    return folder


def test_layers_that_are_no_layers_are_named(tmp_path):
    folder = changed(save_pretrained(digits(), tmp_path / "v"), lambda content: content["layers"].append("layer1"))
    tensors = {**load_file(folder / "nrpm.safetensors"), "layer1.lam": torch.tensor(0.5)}
    save_file(tensors, folder / "nrpm.safetensors")
    changed(
        folder, lambda content: content["files"].update({"nrpm.safetensors": sha256_of(folder / "nrpm.safetensors")})
    )
    with pytest.raises(BrokenVariant, match=r"v does not fit its base model: layers='layer1' matches no layer itself"):
        from_pretrained(folder)


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    folder = save_pretrained(digits(), tmp_path / "v")
    path = folder / "nrpm_config.json"
    path.write_text(path.read_text().replace('"eps": 0.001', '"eps": NaN'))
    with pytest.raises(BrokenVariant, match=r"is cut short or is no variant's config \(ValueError\(.*NaN"):
        from_pretrained(folder)


def test_images_that_are_too_large_are_refused(tmp_path):
    """A stranger's config would have a model claim all memory."""
    folder = save_pretrained(digits(), tmp_path / "v")
    change = {"pretrained_cfg_overlay": {"input_size": [1, 100_000, 100_000]}}
    changed(folder, lambda content: content["base"]["kwargs"].update(change))
    with pytest.raises(BrokenVariant, match=r"v holds no model that timm can build: .*100000"):
        from_pretrained(folder)


def test_a_reason_of_timms_own_has_its_kind(tmp_path):
    folder = changed(save_pretrained(digits(), tmp_path / "v"), lambda content: content["base"]["kwargs"].update(x_y=1))
    with pytest.raises(BrokenVariant, match=r"v holds no model that timm can build: TypeError\("):
        from_pretrained(folder)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    folder = save_pretrained(digits(), tmp_path / "v")
    size = (folder / "nrpm.safetensors").stat().st_size
    monkeypatch.setitem(LARGEST, "nrpm.safetensors", size)
    from_pretrained(folder)
    monkeypatch.setitem(LARGEST, "nrpm.safetensors", size - 1)
    with pytest.raises(
        BrokenVariant, match=rf"nrpm.safetensors has {size} bytes, and such a file has {size - 1} at most"
    ):
        from_pretrained(folder)


def test_a_model_that_was_reprogrammed_before_it_had_weights(tmp_path):
    """On the meta device, as large models are built: what it was made of is known when it is saved."""
    made = {"num_classes": 4, "drop_rate": 0.25}
    plain = timm.create_model(DIGITS, **made)
    whole = reprogram_(copy.deepcopy(plain), NRPMConfig(lam=0.7)).state_dict()
    with torch.device("meta"):
        model = timm.create_model(DIGITS, **made)
    reprogram_(model, NRPMConfig(lam=0.7)).to_empty(device="cpu").load_state_dict(whole)
    base = find_variant(save_pretrained(model, tmp_path / "v")).variant.base
    assert (base.name, base.architecture, base.tuned, base.kwargs) == (None, DIGITS, False, made)
    assert torch.equal(logits(from_pretrained(tmp_path / "v", base=plain)), logits(model))
