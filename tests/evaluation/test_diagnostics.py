import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_nrpm import NRPMConfig, create_model, reprogram_
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.diagnostics import (
    NORMS,
    Difference,
    EmbeddingDifferences,
    embedding_differences,
    embeddings,
)
from timm_nrpm.evaluation.landscape import loss_landscape
from timm_nrpm.figures.diagnostics import draw_embeddings
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel


class InPlace(nn.Module):
    """Two layers, between which an activation overwrites the first one's output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.act(self.conv(x)).flatten(1))


def pair(count=3, shape=(1, 2, 2), dtype=torch.float64):
    pixels = torch.rand(count, *shape, dtype=dtype)
    return pixels, (pixels + 0.1 * torch.randn(pixels.shape, dtype=dtype)).clamp(0, 1)


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 8, 8)


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_differences_are_numpys():
    model = InPlace().double()
    model.conv.bias.data.fill_(1.0)  # so that no embedding is all zeros
    pixels, attacked = pair(20)  # more than go through at once
    found = embedding_differences(model, pixels, attacked)
    want = {"pixels": (pixels, attacked)}
    with torch.no_grad():
        for i, x in enumerate((pixels, attacked)):
            z = model.conv(x)
            steps = {"conv input": x, "conv output": z, "fc input": z.relu().flatten(1), "fc output": model(x)}
            for name, value in steps.items():
                want[name] = (*want.get(name, ())[:i], value)
    assert [row.name for row in found.rows] == ["pixels", "conv input", "conv output", "fc input", "fc output"]
    assert found.samples == 20
    for name, (clean, moved) in want.items():
        a, d = clean.numpy().reshape(20, -1), (moved - clean).numpy().reshape(20, -1)
        for norm, order in {"L1": 1, "L2": 2, "Linf": np.inf}.items():
            absolute, whole = np.linalg.norm(d, order, 1), np.linalg.norm(a, order, 1)
            np.testing.assert_allclose(found.of(name).values(norm), absolute, rtol=1e-12)
            np.testing.assert_allclose(found.of(name).values(norm, relative=True), absolute / whole, rtol=1e-12)
            assert found.of(name).mean(norm) == pytest.approx(absolute.mean(), rel=1e-12)
        squares = (d**2).sum(1)
        np.testing.assert_allclose(found.of(name).values("L2^2"), squares, rtol=1e-12)
        np.testing.assert_allclose(found.of(name).values("L2^2", True), squares / (a**2).sum(1), rtol=1e-12)


def test_a_layer_called_twice_counts_both_calls(net, pixels):
    attacked = (pixels * 0.9).clamp(0, 1)
    found = embedding_differences(net, pixels, attacked)
    assert [row.name for row in found.rows if row.side == "input"] == ["stem input", "twice input", "head input"]
    with torch.no_grad():
        both = []
        for x in (pixels, attacked):
            first = net.twice(net.norm(net.stem(x)).relu())
            both.append(torch.cat([first.flatten(1), net.twice(first.relu()).flatten(1)], 1).double())
    want = torch.linalg.vector_norm(both[1] - both[0], dim=1)
    torch.testing.assert_close(torch.tensor(found.of("twice output").values("L2")).double(), want, rtol=1e-5, atol=0)


def test_the_models_normalisation_counts():
    """timm's digits: mean and std 0.5, so a step of 0.1 in pixels is one of 0.2 for the first layer."""
    model = timm.create_model(DIGITS, pretrained=True)
    pixels = torch.full((1, 1, 8, 8), 0.5)
    found = embedding_differences(model, pixels, pixels + 0.1, "conv1")
    assert found.of("pixels").mean("Linf") == pytest.approx(0.1)
    assert found.of("conv1 input").mean("Linf") == pytest.approx(0.2, rel=1e-5)
    bare = embedding_differences(model, pixels, pixels + 0.1, "conv1", mean=(0.0,), std=(1.0,))
    assert bare.of("conv1 input").mean("Linf") == pytest.approx(0.1, rel=1e-5)


def test_equal_images_differ_by_nothing(net, pixels):
    reprogram_(net, NRPMConfig(lam=0.5, layers=["stem", "twice", "head"]))
    found = embedding_differences(net, pixels, pixels.clone())
    for row in found.rows:
        for norm in NORMS:
            assert row.values(norm) == row.values(norm, relative=True) == (0.0, 0.0)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.1, 3.0))
def test_differences_are_symmetric_and_scale(seed, factor):
    torch.manual_seed(seed)
    a, b = pair(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double()
    there, back = embedding_differences(model, a, b), embedding_differences(model, b, a)
    model[1].weight.data *= factor
    scaled = embedding_differences(model, a, b)
    for norm in NORMS:
        x, y, z = (each.of("1 output") for each in (there, back, scaled))
        assert x.values(norm) == pytest.approx(y.values(norm), rel=1e-9)
        power = 2 if norm == "L2^2" else 1
        assert z.values(norm) == pytest.approx([factor**power * v for v in x.values(norm)], rel=1e-9)
        assert z.values(norm, True) == pytest.approx(x.values(norm, True), rel=1e-9)  # which hides the scale
        assert x.mean("L2^2") <= max(v * w for v, w in zip(x.values("L1"), x.values("Linf"), strict=True)) + 1e-12


def test_which_layers(net, pixels):
    def names(layers):
        return {row.layer for row in embedding_differences(net, pixels, pixels, layers).rows} - {"pixels"}

    assert names(None) == {"stem", "twice", "head"}  # never `unused`
    assert names("*e*") == {"stem", "twice", "head"}
    assert names(["stem", "norm"]) == {"stem", "norm"}
    reprogram_(net, NRPMConfig(lam=0.5, layers="stem"))
    assert names(None) == {"stem"}
    assert names("head") == {"head"}


def test_containers_stand_around_what_they_hold():
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Linear(3, 2)).double()
    found = embedding_differences(model, *pair(), ["0", "0.1"])
    assert [row.name for row in found.rows] == ["pixels", "0 input", "0.1 input", "0.1 output", "0 output"]


def test_tokens_and_keywords():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.table = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(input=x[:, 0]).mean(1) + self.table(x.new_ones(1, 2))

    model, (pixels, attacked) = Odd().double(), pair()
    assert embedding_differences(model, pixels, attacked, "fc").of("fc input").mean("L1") > 0
    with pytest.raises(ValueError, match=r"table has an embedding \[1, 2\] for 3 images"):
        embedding_differences(model, pixels, attacked)
    alone = embedding_differences(model, pixels[:1], attacked[:1])
    assert alone.of("table output").values() == (0.0,)


def test_tables_and_json(net, pixels):
    found = embedding_differences(net, pixels, pixels.flip(0))
    assert EmbeddingDifferences.from_json(found.to_json()) == found
    assert "values" not in repr(found)
    head, titles, first, *_ = str(found).splitlines()
    assert head.startswith("2 images")
    assert titles.split()[:5] == ["embedding", "L1", "L2", "L2^2", "Linf"]
    assert first.split()[0] == "pixels"
    assert f"{found.of('pixels').mean('L1'):.4g}" in first
    norms = {"L1": (math.inf,), "L2": (0.0,), "Linf": (1.0,)}
    broken = EmbeddingDifferences((Difference("a", "input", norms, {**norms, "Linf": (0.0,)}),))
    assert EmbeddingDifferences.from_json(broken.to_json()) == broken
    assert "Infinity" not in broken.to_json()
    row = broken.of("a input")
    assert (row.values("L1", True), row.values("L2", True), row.values("Linf", True)) == (
        (math.inf,),
        (0.0,),
        (math.inf,),
    )


def test_what_is_no_number_is_infinite():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    model[1].weight.data[0] = math.nan
    pixels = torch.rand(1, 1, 1, 2)
    assert embedding_differences(model, pixels, pixels).of("1 output").mean("L1") == math.inf


def untouched(model, work):
    """Run `work`, and find the model, the gradients and the global generator as they were."""
    model.train()
    frozen, quiet = next(model.parameters()), list(model.modules())[-1].eval()
    frozen.requires_grad_(False)
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    result = work()
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert not quiet.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not hooks(model)
    return result


def test_the_model_is_left_as_it_was(tmp_path):
    model = create_model(DIGITS, pretrained=True, lam=0.5)
    pixels, labels = (t[:2] for t in digits("test"))
    attacked = (pixels + 0.1).clamp(0, 1)
    untouched(model, lambda: embedding_differences(model, pixels, attacked))
    untouched(model, lambda: loss_landscape(model, pixels, labels, eps=0.1, resolution=3))
    untouched(model, lambda: draw_embeddings({"a": model}, pixels[:1], attacked[:1], tmp_path / "a.png", "fc"))
    assert not pixels.requires_grad


def test_hooks_go_after_an_error(net):
    model = net.train()
    wrong = torch.rand(2, 1, 8, 8)
    with pytest.raises(RuntimeError):  # torch's: the stem takes 3 channels
        embedding_differences(model, wrong, wrong)
    assert not hooks(model)
    model.twice.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("theirs")))
    right = torch.rand(2, 3, 8, 8)
    with pytest.raises(KeyError):
        embedding_differences(model, right, right)
    assert len(hooks(model)) == 1  # theirs
    assert model.training
    with pytest.raises(KeyError):
        loss_landscape(model, right, torch.tensor([0, 1]), eps=0.1, resolution=3)
    assert all(p.requires_grad for p in model.parameters())


def test_embeddings_survive_what_overwrites_them():
    model = InPlace().double()
    model.conv.weight.data.fill_(-1.0)
    seen, logits = embeddings(PixelModel(model), torch.rand(1, 1, 2, 2, dtype=torch.float64))
    assert (seen["conv", "output"][0] < model.conv.bias.max()).all()
    assert (seen["fc", "input"][0] >= 0).all()
    assert torch.equal(seen["fc", "output"][0], logits)


IMAGE = torch.full((1, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: embedding_differences(net, IMAGE, IMAGE[:, :1]), r"\[1, 3, 8, 8\] and attacked \[1, 1, 8, 8\]"),
        (lambda net: embedding_differences(net, IMAGE[0], IMAGE), r"pixels is \[3, 8, 8\] of torch.float32"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE + 1), "attacked has values from 1.5 to 1.5"),
        (lambda net: embedding_differences(net, IMAGE * math.nan, IMAGE), "pixels has values from nan"),
        (lambda net: embedding_differences(net, IMAGE.byte(), IMAGE), "of torch.uint8: give floating-point pixels"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE, "sten"), "'sten' matches none.*Near names: stem"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE, []), r"layers=\[\] is not understood"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE, ["stem", "unused"]), "never calls unused"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE, "unu*"), "never calls unused"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE).of("stem out"), "Near names: stem output"),
        (lambda net: embedding_differences(net, IMAGE, IMAGE).rows[0].values("L3"), "choose one of L1, L2, L2\\^2"),
    ],
)
def test_bad_calls(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(net)
    assert not hooks(net)
