"""What is saved loads to the same model, bit for bit, or is refused before anything is written."""

import os

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

import timm_nrpm
from timm_nrpm import NRPMConfig, from_pretrained, reprogram_, save_pretrained
from timm_nrpm.data.loaders import digits
from timm_nrpm.errors import WrongBase
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.loadable import _difference
from timm_nrpm.models.reprogramming import reprogrammed_layers

DIGITS = "resnet8_digits"


def bundled(**more):
    return timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.5, iterations=1, **more).eval()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def mixed(model, dtype=torch.float16):
    """All in half precision but the norms, as mixed-precision training was done by hand."""
    model.to(dtype)
    for norm in norms(model):
        norm.float()


TYPES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "mixed": mixed,
    "mixed bfloat16": lambda m: mixed(m, torch.bfloat16),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", TYPES.values(), ids=TYPES)
def test_every_type_of_number(tmp_path, change, when):
    model = timm.create_model(DIGITS, pretrained=True).eval()
    if when == "before":
        change(model)
    reprogram_(model, NRPMConfig(lam=0.7, iterations=1))
    if when == "after":
        change(model)
    again = from_pretrained(save_pretrained(model, tmp_path / "v", full=True))
    types = {k: v.dtype for k, v in model.state_dict().items() if not k.endswith(".lam")}
    assert {k: v.dtype for k, v in again.state_dict().items() if k in types} == types
    assert {layer.lam.dtype for layer in reprogrammed_layers(again).values()} == {torch.float32}
    images = torch.randn(4, 1, 8, 8, dtype=model.conv1.weight.dtype)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_another_default_type_does_not_matter(tmp_path):
    model = bundled()
    torch.set_default_dtype(torch.float64)
    try:
        folder = save_pretrained(model, tmp_path / "v", full=True)
        again = from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())


ALLOWED = {
    "a new head": lambda m: m.reset_classifier(4),
    "other pooling": lambda m: m.reset_classifier(4, "max"),
    "frozen and thawed": lambda m: timm.layers.unfreeze_batch_norm_2d(freeze_batch_norm_2d(m)).eval(),
    "synchronised norms": nn.SyncBatchNorm.convert_sync_batchnorm,
    "another dropout": lambda m: m.fc.register_module("drop", nn.Dropout(0.5)),
}


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_may_be_changed(tmp_path, change):
    model = bundled()
    change(model)
    again = from_pretrained(save_pretrained(model, tmp_path / "v", full=True))
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def replace_modules(model, kind, make):
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))


class Halves(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(model):
    parametrize.register_parametrization(model.layer3[0].bn1, "weight", Halves())


def another_layer(model):
    model.fc = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), model.fc)


def narrower(model):
    block = model.layer3[0]
    block.conv1 = nn.Conv2d(block.conv1.in_channels, 16, 3, block.conv1.stride, padding=1, bias=False)
    block.bn1 = nn.BatchNorm2d(16)
    block.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)


def another_eps(model):
    for norm in norms(model):
        norm.eps = 0.1


def two_names(model):
    model.layer1.again = model.layer1[0]


REFUSED = {
    "frozen": (freeze_batch_norm_2d, "missing, like bn1.num_batches_tracked.*timm.layers.unfreeze_batch_norm_2d"),
    "frozen as torchvision does": (
        lambda m: replace_modules(m, nn.BatchNorm2d, lambda norm: FrozenBatchNorm2d(norm.num_features)),
        "missing, like bn1.num_batches_tracked.*timm.layers.unfreeze_batch_norm_2d",
    ),
    "parametrized": (parametrized, "not in the model, like layer3.0.bn1.parametrizations.*remove_parametrizations"),
    "another layer": (another_layer, "2 missing, like fc.bias; 4 not in the model, like fc.0.bias"),
    "narrower": (narrower, "of another shape, like layer3.0.conv1.weight"),
    "two names": (two_names, "not in the model, like layer1.again.bn1.bias"),
    "another activation": (lambda m: replace_modules(m, nn.ReLU, lambda _: nn.GELU()), "computes other logits"),
    "another padding": (lambda m: setattr(m.conv1, "padding_mode", "circular"), "computes other logits"),
    "another eps": (another_eps, "computes other logits"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, change, message, when):
    model = bundled(layers="layer1.*") if when == "after" else timm.create_model(DIGITS, pretrained=True).eval()
    change(model)
    if when == "before":
        reprogram_(model, NRPMConfig(lam=0.5, iterations=1, layers="layer1.*"))
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s)^resnet8_digits cannot be saved with its weights: .*({message})"):
        save_pretrained(model, tmp_path / "v", full=True)
    assert os.listdir(tmp_path) == []
    assert torch.equal(torch.get_rng_state(), random)


def test_a_refusal_knows_the_arguments_of_the_model(tmp_path):
    """What timm would build has them, too, and only what was changed since is named."""
    model = timm_nrpm.create_model(DIGITS, lam=0.5, layers="layer1.*", in_chans=3)
    another_layer(model)
    with pytest.raises(
        ValueError, match=r"\(2 missing, like fc\.bias; 4 not in the model, like fc\.0\.bias\)\. Undo what"
    ):
        save_pretrained(model, tmp_path / "v", full=True)


class Scaled(nn.Linear):
    """A layer with a buffer that is not saved."""

    def __init__(self, scale):
        super().__init__(2, 2)
        self.register_buffer("scale", scale, persistent=False)


@pytest.mark.parametrize(
    ("scale", "differs"),
    [
        (torch.ones(3), False),
        (torch.tensor([1.0, 1.0, 2.0]), True),
        (torch.ones(3, dtype=torch.float64), True),
        (torch.ones(4), False),  # a cache, whose shape is that of the last input
        (None, False),
    ],
)
def test_buffers_that_are_not_saved(scale, differs):
    said = _difference(Scaled(scale), Scaled(torch.ones(3)))
    assert said == ("buffer scale, which is not saved, has other values" if differs else "")


def test_a_refusal_leaves_what_was_there(tmp_path):
    folder = save_pretrained(bundled(), tmp_path / "v", full=True)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = bundled()
    freeze_batch_norm_2d(model)
    with pytest.raises(ValueError, match="unfreeze_batch_norm_2d"):
        save_pretrained(model, folder, full=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_saving_draws_no_random_number_and_keeps_the_model_as_it_is(tmp_path):
    model = bundled().train()
    before, random = weights_sha256(model.state_dict()), torch.get_rng_state()
    save_pretrained(model, tmp_path / "v", full=True)
    save_pretrained(model, tmp_path / "w")
    assert weights_sha256(model.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.endswith(".lam"))


@pytest.mark.parametrize("full", [False, True])
def test_a_wrapper_is_seen_through(tmp_path, full):
    model = bundled()
    again = from_pretrained(save_pretrained(nn.DataParallel(model), tmp_path / "v", full=full))
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())


@pytest.mark.parametrize("change", [freeze_batch_norm_2d, mixed, another_eps], ids=["frozen", "mixed", "another eps"])
def test_lambdas_of_a_changed_model_ask_for_their_base(tmp_path, change):
    """The name leads to weights, and no more to this model."""
    plain = timm.create_model(DIGITS, pretrained=True).eval()
    change(plain)
    model = reprogram_(plain, NRPMConfig(lam=0.5, iterations=1, layers="layer1.*"))
    folder = save_pretrained(model, tmp_path / "v")
    with pytest.raises(WrongBase, match="give it as base="):
        from_pretrained(folder)
    base = timm.create_model(DIGITS, pretrained=True).eval()
    change(base)
    again = from_pretrained(folder, base=base)
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())


def test_a_run_says_early_that_its_model_cannot_be_saved_and_ends_well(tmp_path):
    model = bundled()
    freeze_batch_norm_2d(model)
    pixels, labels = digits("train")
    loader = DataLoader(TensorDataset(pixels[:32], labels[:32]), batch_size=16)
    settings = {"eps": 0.1, "steps": 1, "epochs": 1, "output": str(tmp_path / "run")}
    with pytest.warns(UserWarning, match="unfreeze_batch_norm_2d") as warned:
        history = timm_nrpm.tune(model, loader, timm_nrpm.TuneConfig(paradigm="all", **settings))
    messages = [str(w.message) for w in warned if "unfreeze_batch_norm_2d" in str(w.message)]
    assert len(messages) == 2
    assert "no variant at its end" in messages[0]
    assert "model.state_dict()" in messages[1]
    assert len(history.steps) == 2
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "curves.png", "history.json"]
