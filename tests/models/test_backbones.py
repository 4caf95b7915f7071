import argparse
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.mlp_mixer import MixerBlock
from timm.models.resnet import BasicBlock
from torch import nn

import timm_nrpm
from timm_nrpm.models.backbones import BACKBONES, LinearMLP, load_published_
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.subnetworks.splitting import split

CHECKPOINTS = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
PUBLISHED = {"mlp3_mnist": "mlp3_mnist_model.pth", "resnet18_cifar_narrow": "tinyresnet18_cifar10_model.t7"}
published = pytest.mark.skipif(
    not CHECKPOINTS.exists(), reason="needs the published models in shared/checkpoints beside the repository"
)

SMALLER = {"wideresnet34_cifar": {"channels": (16, 32, 64)}}
"""Arguments that make a backbone of many millions of weights a small one of the same form."""

PARAMETERS = {
    "mlp1_mnist": 784 * 10 + 10,
    "mlp2_mnist": 784 * 64 + 64 + 64 * 10 + 10,
    "mlp3_mnist": 784 * 256 + 256 + 256 * 64 + 64 + 64 * 10 + 10,
    "lenet_mnist": 25 * 10 + 10 + 250 * 20 + 20 + 320 * 50 + 50 + 50 * 10 + 10,
    "lenet_svhn": 75 * 10 + 10 + 250 * 20 + 20 + 500 * 50 + 50 + 50 * 10 + 10,
    "lenet_imagenet10": 75 * 10 + 10 + 250 * 20 + 20 + 20 * 53 * 53 * 50 + 50 + 50 * 10 + 10,
    "resnet10_cifar": 4_903_242,
    "resnet18_cifar": 11_173_962,  # as everywhere for this form
    "resnet34_cifar": 21_282_122,
    "wideresnet34_cifar": 46_160_474,  # as everywhere for this form
    "resnet10_cifar_narrow": 78_002,
    "resnet18_cifar_narrow": 176_402,
    "resnet34_cifar_narrow": 335_154,
    # The stem, the norm and head, and so many blocks of two norms and two pairs of linear maps.
    **{
        f"mixer{n}_cifar": 48 * 128 + 128 + 256 + 1290 + n * (2 * 256 + 2 * 64 * 64 + 128 + 2 * 128 * 512 + 512 + 128)
        for n in (2, 4, 8)
    },
}


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


def small(name, make=timm.create_model, **arguments):
    return make(name, **SMALLER.get(name.removeprefix("nrpm_"), {}), **arguments)


@pytest.mark.parametrize("name", BACKBONES)
def test_each_is_a_timm_model(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]
    model = small(name).eval()
    row = BACKBONES[name]
    assert timm.data.resolve_model_data_config(model)["input_size"] == row.input_size
    pixels = torch.rand(2, *row.input_size)
    logits = model(pixels)
    assert logits.shape == (2, 10)
    features = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model.get_classifier()(features), logits)
    assert model.get_classifier() is model.get_submodule(row.classifier)
    normalised = timm_nrpm.attacks.library.PixelModel(model)
    assert torch.equal(normalised(pixels), logits)  # pixels as they are
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", [DIGITS, f"nrpm_{DIGITS}", "resnet10_cifar_narrow", "nrpm_mixer2_cifar"])
def test_checkpointing_gives_the_same_gradients(name):
    pretrained = DIGITS in name
    plain, checkpointed = (timm.create_model(name, pretrained=pretrained) for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.set_grad_checkpointing()
    pixels = torch.rand(3, *plain.pretrained_cfg["input_size"])
    blocks, counted = [m for m in checkpointed.modules() if isinstance(m, (BasicBlock, MixerBlock))], []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: counted.append(1))
    for model in (plain, checkpointed):
        model.train()(pixels).square().sum().backward()
    assert len(counted) == 2 * len(blocks)  # each again on the way back
    for (key, want), got in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert want.grad is None if got.grad is None else torch.equal(want.grad, got.grad), key


@pytest.mark.parametrize("name", ["mlp1_mnist", "mlp3_mnist", "lenet_mnist", "lenet_svhn"])
def test_a_few_layers_have_nothing_to_checkpoint(name):
    model = timm.create_model(name)
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match=r"saves hardly any memory in a \w+ of a few layers: leave it off"):
        model.set_grad_checkpointing()


@pytest.mark.parametrize("name", [DIGITS, "resnet10_cifar_narrow"])
def test_intermediate_features_are_as_large_as_they_say(name):
    model = small(name).eval()
    size = model.pretrained_cfg["input_size"]
    pixels = torch.rand(2, *size)
    features = small(name, features_only=True).eval()
    features.load_state_dict(model.state_dict(), strict=False)
    final, maps = model.forward_intermediates(pixels)
    assert torch.equal(final, model.forward_features(pixels))
    assert all(map(torch.equal, maps, features(pixels)))
    info = zip(features.feature_info.channels(), features.feature_info.reduction(), strict=True)
    assert [list(m.shape[1:]) for m in maps] == [[c, size[1] // r, size[2] // r] for c, r in info]


@pytest.mark.parametrize("name", BACKBONES)
def test_classifiers_and_channels(name):
    _, height, width = BACKBONES[name].input_size
    model = small(name, num_classes=7, in_chans=2, dtype=torch.float64).eval()
    pixels = torch.rand(3, 2, height, width, dtype=torch.float64)
    assert model(pixels).shape == (3, 7)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model(pixels).shape == (3, 5)
    model.reset_classifier(0)
    assert model(pixels).shape == (3, model.num_features)
    assert small(name, num_classes=0).num_classes == 0


def test_the_mlp_is_three_linear_layers_and_nothing_else():
    model = timm.create_model("mlp3_mnist").double()
    assert [name for name, _ in model.named_children()] == ["fc1", "fc2", "fc3"]
    assert {type(child) for child in model.children()} == {nn.Linear}
    x = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    at_zero = model(torch.zeros_like(x))
    assert torch.allclose(model(2 * x) - at_zero, 2 * (model(x) - at_zero))


def test_lenet_is_what_its_formula_says():
    """The published architecture by hand: convolution, maximum, rectifier, twice; linear, rectifier, linear."""
    model = timm.create_model("lenet_mnist").double().eval()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    patches = x.unfold(2, 5, 1).unfold(3, 5, 1)[:, 0]  # [B, 24, 24, 5, 5]
    z = torch.einsum("bhwij,oij->bohw", patches, model.conv1.weight[:, 0]) + model.conv1.bias.view(-1, 1, 1)
    z = z.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1)).clamp(min=0)
    patches = z.unfold(2, 5, 1).unfold(3, 5, 1)  # [B, 10, 8, 8, 5, 5]
    z = torch.einsum("bchwij,ocij->bohw", patches, model.conv2.weight) + model.conv2.bias.view(-1, 1, 1)
    z = z.unfold(2, 2, 2).unfold(3, 2, 2).amax((-2, -1)).clamp(min=0).reshape(3, 320)
    z = (z @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    assert torch.allclose(model(x), z @ model.fc2.weight.T + model.fc2.bias, atol=1e-12)


def test_lenet_drops_in_training_alone_and_refuses_small_images():
    model, pixels = timm.create_model("lenet_mnist", drop_rate=0.5), torch.rand(8, 1, 28, 28)
    assert not torch.equal(model(pixels), model(pixels))
    model.eval()
    assert torch.equal(model(pixels), model(pixels))
    whole = timm.create_model("lenet_mnist")
    assert torch.equal(whole(pixels), whole.eval()(pixels))
    assert timm.create_model("lenet_mnist", img_size=16)(torch.rand(2, 1, 16, 16)).shape == (2, 10)
    with pytest.raises(ValueError, match="need images of 16 x 16 pixels at least"):
        timm.create_model("lenet_mnist", img_size=15)


@pytest.mark.parametrize("depth", [10, 18, 34])
def test_the_narrow_resnets_have_an_eighth_of_the_channels(depth):
    wide, narrow = (timm.create_model(f"resnet{depth}_cifar{suffix}") for suffix in ("", "_narrow"))
    convolutions = [
        [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)] for model in (wide, narrow)
    ]
    assert len(convolutions[0]) == depth - 1
    assert [a.out_channels for a in convolutions[0]] == [8 * b.out_channels for b in convolutions[1]]


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


def test_the_wide_resnet_is_that_of_the_paper():
    """32 layers outside shortcuts, which with two 1x1 shortcuts are the 34 of its name; features in three stages."""
    model = small("wideresnet34_cifar")
    assert len(split(model, 4).layers) == 32
    features = small("wideresnet34_cifar", features_only=True).eval()
    shapes = [tuple(x.shape[1:]) for x in features(torch.rand(1, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert features.feature_info.reduction() == [1, 1, 2, 4]


@pytest.mark.parametrize("prefix", ["", "nrpm_"])
@pytest.mark.parametrize("name", BACKBONES)
def test_they_are_reprogrammed_like_any_other(name, prefix):
    make = timm.create_model if prefix else timm_nrpm.create_model
    model = small(f"{prefix}{name}", make, lam=0.5, iterations=1).eval()
    plain = small(name)
    linear_maps = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert list(timm_nrpm.lambdas(model)) == linear_maps
    assert model(torch.rand(2, *BACKBONES[name].input_size)).isfinite().all()
    assert name in timm_nrpm.list_models()


@pytest.mark.parametrize("how", ["state dict", "safetensors", "published", "published in parallel", "t7"])
@pytest.mark.parametrize("name", BACKBONES)
def test_what_can_be_loaded(tmp_path, name, how):
    source = small(name)
    file = tmp_path / ("weights.t7" if how == "t7" else "weights.pth")
    if how == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(source.state_dict(), file)
    else:
        state = source.state_dict() if how == "state dict" else as_published(source, wrapped=how != "published")
        torch.save(state, file)
    model = small(name)
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
    assert "Give a checkpoint of this architecture, the authors' or one of timm's training script" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_file_and_a_reprogrammed_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope\.pth is no file"):
        load_published_(timm.create_model("mlp3_mnist"), tmp_path / "nope.pth")
    with pytest.raises(ValueError, match="load weights into the plain model, then call reprogram_"):
        load_published_(timm_nrpm.create_model("mlp3_mnist"), tmp_path / "nope.pth")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("8_cifar" in name or "34_cifar" in name)) for name in BACKBONES],
)
def test_timm_loads_a_published_file_too_and_the_variant_comes_back(tmp_path, name):
    source = small(name).eval()
    torch.save(as_published(source, wrapped=True), tmp_path / "weights.t7")
    overlay = {"file": str(tmp_path / "weights.t7")}
    model = small(name, timm_nrpm.create_model, pretrained=True, pretrained_cfg_overlay=overlay, lam=0.5).eval()
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


def timms_checkpoint(folder, model, ema=None, **more):
    """A checkpoint that timm's training script leaves."""
    args = argparse.Namespace(model="resnet8_digits", lr=0.1, input_size=[1, 8, 8], opt_betas=None, amp=True, **more)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    scaler = timm.utils.NativeScaler(device="cpu")
    about = {"args": args, "model_ema": ema, "amp_scaler": scaler, "checkpoint_dir": str(folder)}
    timm.utils.CheckpointSaver(model, optimizer, **about).save_checkpoint(3, metric=77.5)
    return folder / "last.pth.tar"


class Wrapped(nn.Module):
    """As `DistributedDataParallel` and `torch.compile` name what is inside."""

    def __init__(self, model, *names):
        super().__init__()
        self.add_module(names[0], Wrapped(model, *names[1:]) if names[1:] else model)


@pytest.mark.parametrize(
    "names", [(), ("module",), ("_orig_mod",), ("_orig_mod", "module"), ("module", "_orig_mod")], ids="-".join
)
def test_timms_own_checkpoints(tmp_path, names):
    source = timm.create_model("resnet8_digits")
    wrapped = Wrapped(source, *names) if names else source
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    args = argparse.Namespace(model="resnet8_digits", lr=0.1)
    saver = timm.utils.CheckpointSaver(
        wrapped, optimizer, args, checkpoint_dir=str(tmp_path), unwrap_fn=lambda model: model
    )
    saver.save_checkpoint(3, metric=77.5)
    keys = torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"].keys()
    assert all(key.startswith("".join(f"{name}." for name in names)) for key in keys)
    model = load_published_(timm.create_model("resnet8_digits"), tmp_path / "last.pth.tar")
    theirs = timm.create_model("resnet8_digits", checkpoint_path=str(tmp_path / "last.pth.tar"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])
        assert torch.equal(value, theirs.state_dict()[key])


def test_the_average_of_a_checkpoint_goes_first_as_timm_has_it(tmp_path):
    source = timm.create_model("resnet8_digits")
    ema = timm.utils.ModelEmaV3(source, decay=0.5)
    file = timms_checkpoint(tmp_path, source, ema)
    model = load_published_(timm.create_model("resnet8_digits"), file)
    theirs = timm.create_model("resnet8_digits", checkpoint_path=str(file))
    assert torch.equal(model.fc.weight, ema.module.fc.weight)
    assert not torch.equal(model.fc.weight, source.fc.weight)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "state_dict_ema", "net"])
def test_where_others_keep_their_weights(tmp_path, key):
    source = timm.create_model("resnet8_digits")
    torch.save({"epoch": 3, key: source.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    model = load_published_(timm.create_model("resnet8_digits"), tmp_path / "c.pth")
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_modules_that_have_the_authors_names_in_timm(tmp_path):
    """`shortcut` and `linear` mean others to the authors, and in timm what they are."""
    names = ("ghostnet_050", "efficientvit_m0")
    for name in names:
        source = timm.create_model(name, num_classes=3)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model = load_published_(timm.create_model(name, num_classes=3), tmp_path / "w.pth")
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


class Planted:
    """What runs as it is unpickled, if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    model, mark = timm.create_model("resnet8_digits"), tmp_path / "mark"
    torch.save({"state_dict": model.state_dict(), "args": Planted(mark)}, tmp_path / "c.pth.tar")
    with pytest.raises(
        ValueError, match=r"it holds objects besides tensors and plain values: .*pathlib\..*state dict alone"
    ):
        load_published_(model, tmp_path / "c.pth.tar")
    file = timms_checkpoint(tmp_path, model, planted=Planted(mark))
    with pytest.raises(ValueError, match=r"it holds objects besides tensors and plain values: .*pathlib\."):
        load_published_(model, file)
    assert not mark.exists()


@pytest.mark.parametrize("cut", [0, 100, -100])
def test_a_checkpoint_that_is_cut_short(tmp_path, cut):
    model = timm.create_model("resnet8_digits")
    file = timms_checkpoint(tmp_path, model)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        ValueError, match=r"last.pth.tar cannot be read as weights alone \(it is empty, cut short or"
    ) as e:
        load_published_(model, file)
    assert len(str(e.value)) < 500
    assert "weights_only" not in str(e.value)
