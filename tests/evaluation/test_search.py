import dataclasses
import math
import sys
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat, calibrate_, evaluate, lambdas, reprogram_
from timm_nrpm.evaluation.search import Candidate, ParetoFront, search_lambda
from timm_nrpm.figures.pareto import draw_front
from timm_nrpm.models.registry import DIGITS

optuna = pytest.importorskip("optuna", reason="needs Optuna, of timm_nrpm[search]")

TOY = {"mean": (0.5,), "std": (1.0,), "steps": 3, "bound": 10.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(split):
    try:
        from timm_nrpm.data.loaders import digits
    except ImportError:
        from timm_nrpm.cli.demo import digits
    return digits(split)


def toy(lam=0.6):
    """Two layers, of which the first needs a low lambda and the second a high one.

    The first sums eight pixels that tell the class and one with a weight of 45 that tells nothing: an attacker moves
    the plain sum with that one, and the robust estimate disregards it. The second passes on one number beside four
    zeros, with an offset of 3 that its bias takes away: of these the robust estimate keeps the zeros.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Linear(5, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[1].weight[0] = torch.tensor([1.0] * 8 + [45.0])
        model[1].bias[0] = 3.0
        model[2].weight[0, 0] = 1.0
        model[2].bias[0] = -3.0
    return reprogram_(model, NRPMConfig(lam=lam))


def toy_images(batch=8):
    """Class 0 is bright, class 1 dark, `[8, 1, 3, 3]`."""
    labels = torch.arange(8) % 2
    pixels = 0.8 - 0.6 * labels.float().view(8, 1, 1, 1).expand(8, 1, 3, 3)
    pixels = pixels + torch.linspace(-0.05, 0.05, 8).view(8, 1, 1, 1)
    pixels[:, 0, 2, 2] = 0.5
    return list(zip(pixels.split(batch), labels.split(batch), strict=True))


@pytest.fixture(scope="module")
def data():
    pixels, labels = (t[:24] for t in digits("test"))
    return list(zip(pixels.split(16), labels.split(16), strict=True))


@pytest.fixture(scope="module")
def training():
    return list(digits("train")[0][:60].split(30))


@pytest.fixture(scope="module")
def found(data, training):
    """A search of the bundled model, nine settings."""
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7)
    return search_lambda(model, data, Threat("Linf", 0.1), budget=9, steps=2, calibration=training)


def clean(model, data):
    """Share of the images that a model is right on."""
    with torch.no_grad():
        return torch.cat([model((x - 0.5) / 0.5).argmax(1) == y for x, y in data]).double().mean().item()


@pytest.mark.slow
def test_every_trial_is_what_reprogram_calibrate_and_evaluate_give(found, data, training):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.3).eval()
    stale = {}
    assert [c.kind for c in found.trials] == ["plain"] + 2 * ["global"] + 6 * ["layerwise"]
    for candidate in found.trials:
        reprogram_(model, dataclasses.replace(model.nrpm.config, lam=candidate.lams))
        stale[candidate.kind] = clean(model, data)
        if candidate.kind != "plain":
            calibrate_(model, training)
        report = evaluate(model, data, Threat("Linf", 0.1), "quick", steps=2)
        assert candidate.quick == report.worst_case
        assert candidate.clean_accuracy == report.accuracy("clean")
        assert candidate.flags == report.flags
        assert candidate.clean_accuracy == clean(model, data)
    assert stale["global"] < found.trials[2].clean_accuracy - 0.2  # calibration was used, and helps


def test_a_model_in_standard_units_is_searched_in_them(data, training, tmp_path):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7, eps=1.0).eval()
    options = {"budget": 3, "steps": 1, "layerwise": False, "resume": tmp_path / "rows.jsonl"}
    search_lambda(model, data, Threat("Linf", 0.05), calibration=training, **options)
    reprogram_(model, dataclasses.replace(model.nrpm.config, standardize=True))
    with pytest.raises(ValueError, match="standardize"):  # the file holds a search in other units
        search_lambda(model, data, Threat("Linf", 0.05), calibration=training, **options)
    options["resume"] = tmp_path / "standard.jsonl"
    search_lambda(model, data, Threat("Linf", 0.05), calibration=training, **options)
    other = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7, eps=1.0).eval()
    with pytest.raises(ValueError, match="standardize: True then, None now"):  # and the other way round
        search_lambda(other, data, Threat("Linf", 0.05), calibration=training, **options)
    options["resume"] = None
    with pytest.raises(ValueError, match="give calibration="):
        search_lambda(model, data, Threat("Linf", 0.05), **options)
    last = search_lambda(model, data, Threat("Linf", 0.05), calibration=training, **options).trials[-1]
    reprogram_(model, dataclasses.replace(model.nrpm.config, lam=last.lams))
    calibrate_(model, training)
    report = evaluate(model, data, Threat("Linf", 0.05), "quick", steps=1)
    assert (last.quick, last.clean_accuracy) == (report.worst_case, report.accuracy("clean"))


def test_the_plain_model_is_first_and_is_the_restored_one(found, data):
    plain = timm_nrpm.restore_(timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7)).eval()
    report = evaluate(plain, data, Threat("Linf", 0.1), "quick", steps=2)
    assert found.plain is found.trials[0]
    assert set(found.plain.lams.values()) == {1.0}
    assert (found.plain.quick, found.plain.clean_accuracy) == (report.worst_case, report.accuracy("clean"))
    assert found.plain.clean_accuracy == clean(plain, data)


def test_without_calibration_nothing_is_calibrated(data):
    """A calibrated model, too, is searched as it was before."""
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.8).eval()
    stale = clean(model, data)
    calibrate_(model, [digits("train")[0][:60]])
    assert clean(model, data) > stale
    front = search_lambda(model, data, Threat("Linf", 0.1), budget=3, steps=1, layerwise=False)
    lam = front.trials[1].lams["conv1"]
    again = timm_nrpm.create_model(DIGITS, pretrained=True, lam=lam).eval()
    assert front.trials[1].clean_accuracy == clean(again, data)


@pytest.mark.parametrize("state", [None, "learnable", "numbers"])
def test_the_same_seed_gives_the_same_trials(state):
    """Whatever the lambdas of the model are, and whatever the global generator has drawn."""
    model = toy()
    if state == "learnable":
        reprogram_(model, NRPMConfig(lam=0.2, learnable=True))
    if state == "numbers":
        torch.rand(7)
    fronts = [search_lambda(m, toy_images(), Threat("Linf", 0.1), budget=14, seed=3, **TOY) for m in (toy(), model)]
    assert fronts[0] == fronts[1]
    if state is None:
        other = search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=14, seed=4, **TOY)
        assert [c.lams for c in other.trials] != [c.lams for c in fronts[0].trials]


@pytest.mark.slow
def test_a_lambda_for_each_layer_beats_every_global_one():
    globals_ = search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=200, layerwise=False, **TOY)
    assert {c.lams["1"] for c in globals_.trials} == {i / 100 for i in range(101)}  # every one there is
    assert all(c.lams["1"] == c.lams["2"] for c in globals_.trials)
    assert max(c.quick for c in globals_.trials) < 1.0
    for seed in range(2):
        both = search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=40, seed=seed, **TOY)
        assert both.best.kind == "layerwise"
        assert both.best.quick == 1.0
        assert both.best.lams["1"] < both.best.lams["2"]
        assert len({tuple(c.lams.values()) for c in both.trials}) == len(both.trials) == 40  # none twice


def test_the_best_is_at_least_the_best_global_one_within_the_bound(found):
    within = [c for c in found.trials if found.lost(c) <= found.bound]
    assert found.plain in within
    assert found.best in within
    assert found.best.quick == max(c.quick for c in within)
    for bound in (0.0, 5.0, 50.0, 100.0):
        assert found.lost(dataclasses.replace(found, bound=bound).best) <= bound


def trial(clean, worst, kind="layerwise"):
    return Candidate(kind, {"a": 0.5}, clean, worst)


numbers = st.one_of(st.integers(0, 4).map(lambda n: n / 4), st.floats(0, 1))


@given(st.lists(st.tuples(numbers, st.integers(0, 5)), max_size=12), st.floats(0, 100))
def test_the_front_is_what_comparing_all_with_all_leaves(points, bound):
    trials = (trial(0.75, 0.6, "plain"), *(trial(clean, worst / 5) for clean, worst in points))
    searched = ParetoFront(Threat(), 1, 0, 5, bound, trials)

    def beats(a, b):
        no_worse = a.clean_accuracy >= b.clean_accuracy and a.quick >= b.quick
        return no_worse and (a.clean_accuracy > b.clean_accuracy or a.quick > b.quick)

    want = [c for c in trials if not any(beats(other, c) for other in trials)]
    front = searched.front
    assert sorted(map(id, front)) == sorted(map(id, want))
    assert [c.clean_accuracy for c in front] == sorted((c.clean_accuracy for c in front), reverse=True)
    assert [c.quick for c in front] == sorted(c.quick for c in front)
    assert searched.lost(searched.best) <= bound + 1e-6
    assert searched.best.quick >= 0.6
    assert ParetoFront.from_json(searched.to_json()) == searched


def test_ties_go_to_the_higher_clean_accuracy():
    trials = (trial(0.9, 0.6, "plain"), trial(0.8, 0.8), trial(0.85, 0.8), trial(0.7, 0.9))
    assert ParetoFront(Threat(), 1, 0, 5, 10.0, trials).best is trials[2]
    assert ParetoFront(Threat(), 1, 0, 5, 0.0, trials).best is trials[0]


def test_json_both_ways(found):
    assert ParetoFront.from_json(found.to_json()) == found
    assert "NaN" not in str(found)
    assert str(found).startswith("9 settings, 24 images, Linf 0.1; plain: clean ")


class Failing:
    """A loader that fails while it is run for the n-th time."""

    def __init__(self, batches, error, runs):
        self.batches, self.error, self.runs = batches, error, runs

    def __iter__(self):
        self.runs -= 1
        yield self.batches[0]
        if not self.runs:
            raise self.error
        yield from self.batches[1:]


@pytest.mark.parametrize("error", [None, OSError("the disk is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["loader", "calibration"])
def test_the_model_is_left_as_it_was(data, training, error, where):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7).train()
    reprogram_(model, NRPMConfig(lam=0.7, learnable=True))
    model.fc.weight.requires_grad_(False)
    model.bn1.eval()
    calibrate_(model, [digits("train")[0][:20]])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (t.clone(), t.requires_grad, t.data_ptr()) for name, t in tensors.items()}
    modes = {name: m.training for name, m in model.named_modules()}
    loaders = {"loader": data[:1] * 2, "calibration": training}
    if error is not None:
        loaders[where] = Failing(loaders[where], error, 4)
        with pytest.raises(type(error)):
            search_lambda(model, **loaders, threat=Threat("Linf", 0.1), budget=4, steps=1)
    else:
        search_lambda(model, **loaders, threat=Threat("Linf", 0.1), budget=4, steps=1)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is t for name, t in tensors.items())
    for name, (value, learns, place) in before.items():
        assert torch.equal(after[name], value), name
        assert (after[name].requires_grad, after[name].data_ptr()) == (learns, place)
        assert after[name].grad is None
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_corrections_of_a_model_without_batchnorm_are_left():
    model = toy()
    calibrate_(model, toy_images())
    gain = model[1].correction.gain
    want = gain.clone()
    pixels = [x for x, _ in toy_images()]
    search_lambda(model, toy_images(), Threat("Linf", 0.1), budget=5, calibration=pixels, **TOY)
    assert model[1].correction.gain is gain
    assert torch.equal(gain, want)
    assert lambdas(model) == {"1": 0.6, "2": 0.6}


def test_a_small_budget_and_a_single_layer():
    two = search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=2, **TOY)
    assert [c.kind for c in two.trials] == ["plain", "global"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    one = search_lambda(reprogram_(model, NRPMConfig()), toy_images(), Threat("Linf", 0.1), budget=5, **TOY)
    assert [c.kind for c in one.trials] == ["plain"] + 4 * ["global"]


class Breaking(nn.Module):
    """Gives numbers only while its layer is plain."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x.flatten(1))
        moved = (h - F.linear(x.flatten(1), self.a.weight, self.a.bias)).abs().max() > 1e-3
        return self.b(h) * (math.nan if moved else 1.0)


def test_a_setting_that_gives_no_numbers_is_tried_and_not_taken():
    front = search_lambda(reprogram_(Breaking(), NRPMConfig()), toy_images(), Threat("Linf", 0.1), budget=12, **TOY)
    broken = [c for c in front.trials if c.clean_accuracy == 0]
    assert len(broken) > 3
    assert front.best not in broken
    assert ParetoFront.from_json(front.to_json()) == front


def test_optuna_is_quiet_and_stays_as_it_was(capfd):
    level = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=8, **TOY)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == level


def test_progress_shows_the_best_so_far(capsys):
    search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=4, progress=True, **TOY)
    assert "4/4" in capsys.readouterr().err


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'timm_nrpm\[search\]'"):
        search_lambda(toy(), toy_images(), budget=8, **TOY)
    front = search_lambda(toy(), toy_images(), Threat("Linf", 0.1), budget=4, layerwise=False, **TOY)
    assert len(front.trials) == 4


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot(found, tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="needs Matplotlib, of timm_nrpm[demo]")
    path = draw_front(found, tmp_path / f"front{suffix}")
    assert path.stat().st_size > 5000
    alone = ParetoFront(Threat(), 1, 0, 5, 0.0, (trial(1.0, 0.0, "plain"), trial(0.0, 0.0)))
    assert draw_front(alone, tmp_path / f"alone{suffix}").exists()


def test_the_plot_says_what_it_can_write(found, tmp_path):
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        draw_front(found, tmp_path / "front.jpg")


class Shuffling:
    def __iter__(self):
        batches = toy_images()
        order = torch.randperm(8)
        pixels, labels = torch.cat([x for x, _ in batches])[order], torch.cat([y for _, y in batches])[order]
        return iter([(pixels, labels)])


class Once:
    """Not an iterator, and empty the second time all the same."""

    def __init__(self):
        self.batches = iter(toy_images())

    def __iter__(self):
        yield from self.batches


def one(pixels=0.5, labels=(0, 1)):
    return [(torch.full((2, 1, 3, 3), pixels), torch.tensor(labels))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1}, "budget=1 is not allowed: give an integer >= 2"),
        ({"budget": 2.5}, "budget=2.5 is not allowed"),
        ({"bound": -0.1}, "bound=-0.1 is not allowed"),
        ({"bound": math.inf}, "bound=inf is not allowed"),
        ({"bound": math.nan}, "bound=nan is not allowed"),
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"threat": 0.1}, "threat=0.1 is no Threat"),
        ({"model": nn.Linear(9, 2)}, "is not reprogrammed: call timm_nrpm.reprogram_"),
        ({"loader": []}, "The loader gave no images: there is nothing"),
        ({"loader": iter(toy_images())}, "loader is a list_iterator, which gives its images once"),
        ({"loader": Once()}, "gave other images, or the same in another order"),
        ({"loader": Shuffling()}, "Give shuffle=False"),
        ({"loader": one(-1.0)}, r"from -1 to -1: give pixels in \[0, 1\]"),
        ({"loader": one(labels=(0, 2))}, r"labels .* from 0 to 2, and the model has 2 classes"),
        ({"loader": one(labels=(-1, 1))}, r"labels .* from -1 to 1"),
        ({"loader": one(labels=(0.0, 1.0))}, "give 2 integers, one for each image"),
        ({"loader": one(labels=(0, 1, 1))}, r"labels \[3\] of torch.int64: give 2 integers"),
        ({"loader": [torch.zeros(2, 1, 3, 3)]}, "The loader gives Tensor: give pairs of pixels"),
        ({"calibration": iter([])}, "calibration is a list_iterator"),
        ({"calibration": []}, "calibration gave no images"),
        ({"calibration": [torch.zeros(0, 1, 3, 3)]}, "calibration gives a batch that holds no images"),
        ({"calibration": [torch.full((2, 1, 3, 3), -2.0)]}, "from -2 to -2"),
        ({"calibration": [{"image": 1}]}, "calibration gives dict"),
    ],
)
def test_bad_calls(change, message):
    given = {"model": toy(), "loader": toy_images(), "threat": Threat("Linf", 0.1), "budget": 3, **TOY, **change}
    with pytest.raises(ValueError, match=message):
        search_lambda(**given)


def test_a_search_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    def search(path, eps=0.1, **change):
        settings = {"budget": 12, "resume": path, **TOY, **change}
        return search_lambda(toy(), toy_images(), Threat("Linf", eps), **settings)

    whole = search(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 13
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:7]) + lines[7][:20])  # killed in the middle of a row
    assert search(cut) == whole
    assert cut.read_text() == "".join(lines)
    monkeypatch.setattr("timm_nrpm.evaluation.search.evaluate", None)  # nothing is left to do
    assert search(cut) == whole
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 then, 1 now"):
        search(cut, seed=1)
    with pytest.raises(ValueError, match=r"eps=0.1\)\W+ then, \W+Threat\(norm='Linf', eps=0.1000001\)\W+ now"):
        search(cut, eps=0.1000001)  # however close


def test_the_first_trial_must_be_plain():
    with pytest.raises(ValueError, match="must begin with the plain model"):
        ParetoFront(Threat(), 1, 0, 5, 0.1, (trial(1.0, 0.5),))
