from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import timm_nrpm
from timm_nrpm.backbones import BACKBONES, LinearMLP, load_published_

CHECKPOINTS = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"
PUBLISHED = {"mlp3_mnist": "mlp3_mnist_model.pth", "resnet18_cifar_narrow": "tinyresnet18_cifar10_model.t7"}
published = pytest.mark.skipif(
    not CHECKPOINTS.exists(), reason="needs the published models in shared/checkpoints beside the repository"
)

PARAMETERS = {"mlp3_mnist": 784 * 256 + 256 + 256 * 64 + 64 + 64 * 10 + 10, "resnet18_cifar_narrow": 176_402}


def as_published(model, wrapped):
    """The state of a model as the authors' code would have saved it: other names, and lambdas."""
    state = OrderedDict()
    for key, value in model.state_dict().items():
        key = key.replace("downsample", "shortcut")
        key = key.replace("fc.", "linear.")
        state[f"module.{key}" if wrapped else key] = value
        if key.endswith("conv1.weight"):
            state[f"module.{key.removesuffix('weight')}robust_sum.beta"] = torch.ones(1)
    return {"net": state, "acc": 67.89, "epoch": 75} if wrapped else state


@pytest.mark.parametrize("name", BACKBONES)
def test_each_is_a_timm_model(name):
    model = timm.create_model(name).eval()
    row = BACKBONES[name]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert timm.data.resolve_model_data_config(model)["input_size"] == row.input_size
    pixels = torch.rand(2, *row.input_size)
    logits = model(pixels)
    assert logits.shape == (2, 10)
    features = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(features), logits)
    assert model.get_classifier() is model.get_submodule(row.classifier)
    normalised = timm_nrpm.attacks.PixelModel(model)
    assert torch.equal(normalised(pixels), logits)  # pixels as they are
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", BACKBONES)
def test_classifiers_and_channels(name):
    _, height, width = BACKBONES[name].input_size
    model = timm.create_model(name, num_classes=7, in_chans=2, dtype=torch.float64).eval()
    pixels = torch.rand(3, 2, height, width, dtype=torch.float64)
    assert model(pixels).shape == (3, 7)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(pixels).shape == (3, 5)
    model.reset_classifier(0)
    assert model(pixels).shape == (3, model.num_features)
    assert timm.create_model(name, num_classes=0).num_classes == 0


def test_the_mlp_is_three_linear_layers_and_nothing_else():
    model = timm.create_model("mlp3_mnist").double()
    assert [name for name, _ in model.named_children()] == ["fc1", "fc2", "fc3"]
    assert {type(child) for child in model.children()} == {nn.Linear}
    x = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    at_zero = model(torch.zeros_like(x))
    assert torch.allclose(model(2 * x) - at_zero, 2 * (model(x) - at_zero))


def test_other_sizes_of_the_mlp():
    model = timm.create_model("mlp3_mnist", img_size=(14, 20))
    assert timm.models.get_model_input_config(model)["input_size"] == (1, 14, 20)
    assert model(torch.rand(2, 1, 14, 20)).shape == (2, 10)
    assert [name for name, _ in LinearMLP(widths=()).named_children()] == ["fc1"]


def test_the_resnet_keeps_the_resolution_in_its_stem():
    model = timm.create_model("resnet18_cifar_narrow", features_only=True).eval()
    outputs = model(torch.rand(1, 3, 32, 32))
    assert [tuple(x.shape[1:]) for x in outputs] == [(8, 32, 32), (8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("prefix", ["", "nrpm_"])
@pytest.mark.parametrize("name", BACKBONES)
def test_they_are_reprogrammed_like_any_other(name, prefix):
    make = timm.create_model if prefix else timm_nrpm.create_model
    model = make(f"{prefix}{name}", lam=0.5, iterations=1).eval()
    plain = timm.create_model(name)
    linear_maps = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert list(timm_nrpm.lambdas(model)) == linear_maps
    assert model(torch.rand(2, *BACKBONES[name].input_size)).isfinite().all()
    assert name in timm_nrpm.list_models()


@pytest.mark.parametrize("how", ["state dict", "safetensors", "published", "published in parallel", "t7"])
@pytest.mark.parametrize("name", BACKBONES)
def test_what_can_be_loaded(tmp_path, name, how):
    source = timm.create_model(name)
    file = tmp_path / ("weights.t7" if how == "t7" else "weights.pth")
    if how == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(source.state_dict(), file)
    else:
        state = source.state_dict() if how == "state dict" else as_published(source, wrapped=how != "published")
        torch.save(state, file)
    model = timm.create_model(name)
    assert load_published_(model, file) is model
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
    assert model.training


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rubbish", "cannot be read as weights alone"),
        ("module", "cannot be read as weights alone"),
        ("safetensors", "cannot be read as weights alone"),
        ("tensor", r"holds no weights of this LinearMLP \(6 missing, like fc1.bias\)"),
        ("other", r"6 missing, like fc1.bias; \d+ not in the model, like bn1.bias"),
        ("shape", "holds no weights of this LinearMLP .1 of another shape, like fc3.weight"),
        ("number", "1 of another shape, like fc1.bias"),
    ],
)
def test_another_format_is_one_clear_error(tmp_path, content, message):
    model = timm.create_model("mlp3_mnist")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = tmp_path / ("weights.safetensors" if content == "safetensors" else "weights.pth")
    good = timm.create_model("mlp3_mnist").state_dict()
    saved = {
        "module": model,
        "tensor": torch.ones(3),
        "other": timm.create_model("resnet18_cifar_narrow").state_dict(),
        "shape": {**good, "fc3.weight": torch.ones(11, 64)},
        "number": {**good, "fc1.bias": 1.0},
    }
    if content in saved:
        torch.save(saved[content], file)
    else:
        file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=message) as error:
        load_published_(model, file)
    assert "Give the authors' checkpoint of this architecture, or its state dict" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_file_and_a_reprogrammed_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.pth is no file"):
        load_published_(timm.create_model("mlp3_mnist"), tmp_path / "nope.pth")
    with pytest.raises(ValueError, match="load weights into the plain model, then call reprogram_"):
        load_published_(timm_nrpm.create_model("mlp3_mnist"), tmp_path / "nope.pth")


@pytest.mark.parametrize("name", BACKBONES)
def test_timm_loads_a_published_file_too_and_the_variant_comes_back(tmp_path, name):
    source = timm.create_model(name).eval()
    torch.save(as_published(source, wrapped=True), tmp_path / "weights.t7")
    overlay = {"file": str(tmp_path / "weights.t7")}
    model = timm_nrpm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, lam=0.5).eval()
    pixels = torch.rand(2, *BACKBONES[name].input_size)
    with torch.no_grad():
        logits = model(pixels)
        again = timm_nrpm.from_pretrained(timm_nrpm.save_pretrained(model, tmp_path / "variant"), base=source)
        assert torch.equal(again(pixels), logits)
        whole = timm_nrpm.save_pretrained(model, tmp_path / "full", full=True)
        assert torch.equal(timm_nrpm.from_pretrained(whole)(pixels), logits)
        assert torch.equal(timm_nrpm.restore_(model)(pixels), timm_nrpm.restore_(again)(pixels))


@published
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files(name):
    file = CHECKPOINTS / PUBLISHED[name]
    model = load_published_(timm.create_model(name), file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    kept = {key: value for key, value in state.get("net", state).items() if "robust_sum" not in key}
    assert len(kept) == len(model.state_dict())
    for value, theirs in zip(model.state_dict().values(), kept.values(), strict=True):  # both in the modules' order
        assert torch.equal(value, theirs)
