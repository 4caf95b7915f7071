"""Signatures against arithmetic in NumPy, taken off bit for bit, and files that are not what was saved."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_nrpm
from timm_nrpm import NRPMConfig
from timm_nrpm.errors import BrokenFolder, BrokenSignature
from timm_nrpm.models.signatures import CONFIG, TENSORS, Signature, signature


@pytest.fixture(scope="module")
def natural():
    return timm.create_model("resnet8_digits", pretrained=True).eval()


def moved(model: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """A model near another one, with other statistics as well."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = size * torch.rand(value.shape, generator=generator)
                value.add_(noise if name.endswith("running_var") else noise - size / 2)
    return model


@pytest.fixture(scope="module")
def robust(natural):
    return moved(natural, 1)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_is_the_difference_in_the_first_layers_and_their_norms(natural, robust):
    made = signature(natural, robust, "first:2")
    assert made.layers == ("conv1", "layer1.0.conv1")
    modules = {name.rpartition(".")[0] for name in made.tensors}
    assert modules == {"conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"}
    ours, theirs = natural.state_dict(), robust.state_dict()
    for name, value in made.tensors.items():
        np.testing.assert_array_equal(value.numpy(), theirs[name].numpy() - ours[name].numpy())
    assert not [name for name in made.tensors if name.endswith("num_batches_tracked")]
    assert made.architecture == "resnet8_digits"
    assert made.natural != made.robust


def test_adding_all_of_it_gives_the_robust_model(natural, robust):
    model = copy.deepcopy(natural)
    signature(natural, robust, None).add_(model)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, robust.state_dict()[name])


def test_with_a_start_it_is_orthogonal_to_what_natural_training_did(natural, robust):
    """In float64 by NumPy; of the statistics and other numbers of one dimension, the difference."""
    start = moved(natural, 2)
    made = signature(natural, robust, "first:3", start=start)
    states = [{k: v.double().numpy() for k, v in m.state_dict().items()} for m in (natural, robust, start)]
    for name, value in made.tensors.items():
        n, r, s = (each[name].ravel() for each in states)
        if value.ndim > 1:
            want = (r - s) - (n - s) * ((r - s) @ (n - s)) / ((n - s) @ (n - s))
            assert abs(value.double().numpy().ravel() @ (n - s)) < 1e-5 * np.linalg.norm(n - s)
        else:
            want = r - n
        np.testing.assert_allclose(value.numpy().ravel(), want, atol=1e-6)
    same = signature(natural, robust, "first:3", start=natural)  # which has no direction to take away
    plain = signature(natural, robust, "first:3")
    assert all(torch.allclose(same.tensors[name], plain.tensors[name], atol=1e-7) for name in plain.tensors)


@pytest.mark.parametrize("is_reprogrammed", [False, True])
def test_it_is_added_by_its_strength_and_taken_off_bit_for_bit(natural, robust, is_reprogrammed):
    made = signature(natural, robust, "first:4")
    model = moved(natural, 3, 0.05)
    if is_reprogrammed:
        timm_nrpm.reprogram_(model, NRPMConfig(lam=0.5))
    before = state(model)
    patch = made.add_(nn.DataParallel(model), strength=0.7)
    after = state(model)
    for name, value in before.items():
        want = value + 0.7 * made.tensors[name] if name in made.tensors else value
        torch.testing.assert_close(after[name], want)
    patch.take_off_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_signatures_stack_and_come_off_in_reverse(natural, robust):
    one, two = signature(natural, robust, "first:2"), signature(natural, moved(natural, 4), "first:4")
    model = copy.deepcopy(natural)
    before = state(model)
    first = one.add_(model)
    second = two.add_(model, strength=0.5)
    between = state(model)
    with pytest.raises(ValueError, match=r"conv1.weight has changed since .* take off what was added later first"):
        first.take_off_()
    assert all(torch.equal(value, between[name]) for name, value in model.state_dict().items())
    second.take_off_()
    first.take_off_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saved_and_loaded_it_is_the_same(natural, robust, tmp_path):
    made = signature(natural, robust, start=moved(natural, 2))
    (tmp_path / "notes").mkdir()
    folder = made.save(tmp_path / "signature")
    (folder / "README.md").write_text("mine")
    loaded = Signature.load(made.save(folder))  # once more, over the first
    assert (loaded.layers, loaded.natural, loaded.robust, loaded.start) == (
        made.layers, made.natural, made.robust, made.start
    )  # fmt: skip
    assert all(torch.equal(loaded.tensors[name], value) for name, value in made.tensors.items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        CONFIG,
        TENSORS,
    ]
    size = sum(file.stat().st_size for file in folder.glob("nrpm_signature.*"))
    assert size < sum(value.numel() * 4 for value in natural.state_dict().values()) / 2


def test_another_folder_is_not_overwritten(natural, robust, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and holds no signature"):
        signature(natural, robust).save(tmp_path / "mine")


def changed(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "is missing, cut short or no signature's"),
        (lambda f: (f / CONFIG).write_text("{"), "is missing, cut short"),
        (lambda f: (f / CONFIG).write_text("[]"), "no signature's"),
        (
            lambda f: changed(f / CONFIG, lambda c: c.update(format=2)),
            "has format 2, and this version reads",
        ),
        (
            lambda f: changed(f / CONFIG, lambda c: c.update(layers=["fc"])),
            "was changed after it was saved",
        ),
        (lambda f: (f / TENSORS).write_bytes(b"cut"), "is cut short or was changed"),
        (lambda f: (f / TENSORS).unlink(), "cannot be read"),
    ],
)
def test_damage_is_named(natural, robust, tmp_path, damage, message):
    folder = signature(natural, robust, "first:1").save(tmp_path / "signature")
    damage(folder)
    with pytest.raises(BrokenSignature, match=message):
        Signature.load(folder)
    assert issubclass(BrokenSignature, BrokenFolder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv1.weight", torch.full((8, 1, 3, 3), float("nan")), "does not hold finite numbers"),
        ("conv1.lam", torch.tensor(0.5), "is a lambda"),
        ("conv1.weight", torch.zeros(3, dtype=torch.int64), "does not hold finite numbers"),
    ],
)
def test_what_no_signature_holds_is_refused(natural, robust, tmp_path, name, value, message):
    """Though its hashes are right, as a stranger's may be."""
    made = signature(natural, robust, "first:1")
    folder = Signature(made.architecture, made.layers, {name: value}, made.natural, made.robust).save(tmp_path / "bad")
    with pytest.raises(BrokenSignature, match=message):
        Signature.load(folder)


def test_another_architecture_is_refused(natural, robust):
    made = signature(natural, robust, "first:1")
    other = timm.create_model("mlp1_mnist")
    with pytest.raises(ValueError, match="The signature is of a resnet8_digits, and this is a mlp1_mnist"):
        made.add_(other)
    with pytest.raises(ValueError, match="give models of one architecture"):
        signature(natural, other)
    wider = copy.deepcopy(natural)
    wider.conv1.weight = nn.Parameter(torch.zeros(9, 1, 3, 3))
    with pytest.raises(ValueError, match=r"conv1.weight is \[.*\] in the signature and \[9, 1, 3, 3\] there"):
        made.add_(wider)


def test_it_is_taken_off_a_model_that_was_cast(natural, robust):
    """Casting a module puts other buffers in the place of its own."""
    model = copy.deepcopy(natural)
    patch = signature(natural, robust, "first:1").add_(model)
    model.double().float()
    patch.take_off_()
    assert all(torch.equal(value, natural.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_negative_variance_is_refused_and_nothing_changed(natural):
    tight = copy.deepcopy(natural)
    with torch.no_grad():
        tight.bn1.running_var.mul_(0.1)
    made = signature(natural, tight, "first:1")
    model = copy.deepcopy(natural)
    before = state(model)
    with pytest.raises(ValueError, match=r"strength=3 would make bn1.running_var negative"):
        made.add_(model, strength=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="strength=0"):
        made.add_(model, strength=0)


def test_a_model_that_is_not_timms_takes_an_example_or_its_own_order():
    class Backwards(nn.Module):
        """Its layers are called in the reverse of the order in which they are defined."""

        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 3), nn.Linear(4, 8)

        def forward(self, x):
            return self.last(self.first(x.flatten(1)))

    ours, theirs = Backwards(), Backwards()
    assert signature(ours, theirs, "first:1").layers == ("last",)
    assert signature(ours, theirs, "first:1", example=torch.zeros(1, 1, 2, 2)).layers == ("first",)
    with pytest.raises(ValueError, match="matches none"):
        signature(ours, theirs, "conv*")
