"""Advice on real models: what is measured is what is said, a stopped run goes on, and bad input is refused."""

import copy
import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

import timm_nrpm
from timm_nrpm import Shift, Threat, advise
from timm_nrpm.advice import inquiry as wing
from timm_nrpm.advice import lambdas, mixing, smoothing, tuning
from timm_nrpm.advice.strategy import Candidate, Strategy
from timm_nrpm.advice.study import Part, Study
from timm_nrpm.advice.tuning import TUNED_ALL
from timm_nrpm.cli.plot import result_in
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.corruptions import corrupt
from timm_nrpm.evaluation.trials import Advice, Bounds
from timm_nrpm.nn.pixel_model import PixelModel

NOISE = Shift("white_noise", 5)


def batches(pixels, labels, size=60):
    return list(zip(pixels.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="module")
def images():
    pixels, labels = digits("test")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    return batches(pixels[:120], labels[:120]), batches(pixels[120:240], labels[120:240])


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet8_digits", pretrained=True).eval()


def training(count=200):
    pixels, labels = (part[:count] for part in digits("train"))
    return DataLoader(TensorDataset(pixels, labels), batch_size=50, shuffle=True)


@pytest.fixture(scope="module")
def few():
    """Fewer settings, so that there is time for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lambdas, "LAMS", (0.9,))
        patch.setattr(lambdas, "LAYERS", ("first:1",))
        patch.setattr(lambdas, "ESTIMATES", {"K 1": timm_nrpm.NRPMConfig(iterations=1)})
        yield


@pytest.fixture(scope="module")
def found(few, model, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice")
    state = copy.deepcopy(model.state_dict())
    model.train()
    result = advise(model, images[0], NOISE, selection=images[1], folder=folder, seconds=1000)
    assert all(each.training for each in model.modules())
    model.eval()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    return result[0], folder


def accuracy(model, pixels, labels):
    with torch.no_grad():
        return PixelModel(model).eval()(pixels).argmax(1).eq(labels).double().mean().item()


def test_what_is_said_of_adaptation_is_what_adaptation_does(found, model, images):
    advice, _ = found
    report, selection = ([torch.cat(parts) for parts in zip(*part, strict=True)] for part in images)
    noisy = corrupt(report[0], "white_noise", 5), corrupt(selection[0], "white_noise", 5, first=120)
    for trial in advice.trials:
        if trial.strategy not in ("nothing", "adaptation"):
            continue
        ours, clean = copy.deepcopy(model), copy.deepcopy(model)
        if trial.strategy == "adaptation":
            prior = trial.setting.removeprefix("prior ")
            for each, seen in ((ours, noisy[1]), (clean, selection[0])):
                timm_nrpm.adapt_(each, seen, prior=prior if prior == "auto" else float(prior))
        assert trial.selection.accuracy == accuracy(ours, noisy[1], selection[1])
        assert trial.selection.clean_accuracy == accuracy(clean, selection[0], selection[1])
        if trial.report is not None:
            assert trial.report.accuracy == accuracy(ours, noisy[0], report[1])
    assert advice.nothing.report is not None
    assert {trial.strategy for trial in advice.trials} >= {"nothing", "adaptation", "one lambda"}
    assert advice.untried["tuning all"] == "there are no training images"


def test_the_files_hold_the_advice(found):
    advice, folder = found
    place = folder / "white_noise-of-severity-5"
    text = (place / "advice.json").read_text()
    assert Advice.from_json(text) == advice == result_in(place / "advice.json")
    assert json.loads(text)["sentence"] == advice.sentence
    assert (place / "variant").exists() == advice.helps


def test_a_stopped_run_goes_on(few, found, model, images, tmp_path, monkeypatch):
    advice, folder = found
    name = "white_noise-of-severity-5"
    lines = (folder / name / "trials.jsonl").read_text().splitlines(keepends=True)
    place = tmp_path / name
    place.mkdir()
    (place / "trials.jsonl").write_text("".join(lines[:-2]) + lines[-2][:30])  # killed in the middle of a row
    made = []
    measured = wing.Inquiry._measured

    def counted(*arguments):
        trial = measured(*arguments)
        made.extend([] if trial is None else [trial.setting])
        return trial

    monkeypatch.setattr(wing.Inquiry, "_measured", counted)
    again = advise(model, images[0], NOISE, selection=images[1], folder=tmp_path, seconds=1000)[0]
    assert len(made) <= 1
    strip = [(t.strategy, t.setting, t.selection, t.report, t.rejected) for t in advice.trials]
    assert [(t.strategy, t.setting, t.selection, t.report, t.rejected) for t in again.trials] == strip
    with pytest.raises(ValueError, match=r"holds another run \(clean_loss: 2.0 then, 3.0 now"):
        advise(model, images[0], NOISE, selection=images[1], folder=tmp_path, clean_loss=3)


class Fragile(nn.Module):
    """A linear model of the digits, which an attack breaks quickly."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def fragile():
    torch.manual_seed(0)
    net, (pixels, labels) = Fragile(), digits("train")
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        loss = nn.functional.cross_entropy(net(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.slow
def test_a_part_of_the_way_lies_between_the_old_weights_and_the_tuned_ones(model, images, tmp_path):
    selection, report = (Part.of(part) for part in images)
    plain = timm_nrpm.reprogram_(copy.deepcopy(model), timm_nrpm.NRPMConfig(lam=1.0))
    study = Study(plain, NOISE, selection, report, training(), Bounds(), "fast", 0, tmp_path, None, None)
    candidates = TUNED_ALL.candidates(study)
    offered = [next(candidates) for _ in range(5)]
    assert [each.setting.rpartition(", ")[2] for each in offered] == [
        "plain", "75 % of the way", "50 % of the way", "25 % of the way", "lambda 0.8"]  # fmt: skip
    tuned, half = offered[0].make().state_dict(), offered[2].make()
    assert not any(each.training for each in half.modules())
    moved = 0
    for name, old in plain.state_dict().items():
        if old.is_floating_point():
            torch.testing.assert_close(half.state_dict()[name], (old + tuned[name]) / 2)
            moved += not torch.equal(old, tuned[name])
    assert moved > 20
    assert torch.equal(plain.conv1.weight, model.conv1.weight)


@pytest.mark.slow
def test_attacked_like_evaluate_does(fragile, images, tmp_path, monkeypatch):
    """The advised variant and its report; a strategy that gives a better model stands for all."""
    pixels, labels = digits("train")
    lam_1 = timm_nrpm.NRPMConfig(lam=1.0)
    better = timm_nrpm.reprogram_(copy.deepcopy(fragile), lam_1)
    optimizer = torch.optim.Adam([better.fc.weight, better.fc.bias], 0.01)
    for _ in range(150):
        attacked = pixels.clone().requires_grad_()
        nn.functional.cross_entropy(better(attacked), labels).backward()
        optimizer.zero_grad()
        nn.functional.cross_entropy(better((pixels + 0.1 * attacked.grad.sign()).clamp(0, 1)), labels).backward()
        optimizer.step()

    def candidates(study):
        trial = yield Candidate("once", lambda: copy.deepcopy(better), is_trained=True)
        assert trial.selection is not None
        yield Candidate("not at all", lambda: timm_nrpm.reprogram_(copy.deepcopy(fragile), lam_1), is_trained=True)

    def none(study):
        return "it is left out of this test"

    others = [Strategy(each.name, each.candidates, none) for each in wing.STRATEGIES]
    monkeypatch.setattr(wing, "STRATEGIES", (Strategy("training", candidates), *others))
    normalisation = {"mean": (0.0,), "std": (1.0,)}
    threat = Threat("Linf", 0.1)
    report, selection = (part[:1] for part in images)  # 60 images each, on which 10 points can be told
    bounds = {"clean_loss": 20, "effect": 10}
    (advice,) = advise(fragile, report, threat, selection=selection, folder=tmp_path, **bounds, **normalisation)
    assert advice.helps
    assert advice.advised.setting == "once"
    second = advice.trials[2]
    assert second.rejected.startswith("at most ")  # no better than the best so far, by quick attacks alone
    ours = timm_nrpm.evaluate(better, report, threat, effort="fast", control=False, **normalisation)
    assert advice.advised.report.threat == "".join(str(int(each)) for each in ours.survivors)
    weights = load_file(tmp_path / "Linf-0.1" / "weights.safetensors")  # timm cannot build this model
    assert torch.equal(weights["fc.weight"], better.fc.weight)
    plain = timm_nrpm.evaluate(fragile, report, threat, effort="fast", control=False, **normalisation)
    assert advice.nothing.report.threat == "".join(str(int(each)) for each in plain.survivors)


@pytest.mark.slow
def test_a_mixture_with_the_tuned_model_is_saved_and_evaluates_to_the_same(model, images, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "EPOCHS", 4)
    monkeypatch.setattr(mixing, "SHARES", (0.9,))
    monkeypatch.setattr(wing, "STRATEGIES", (mixing.MIXING,))
    threat, bounds = Threat("Linf", 0.15), {"clean_loss": 10, "effect": 10, "seconds": 2000}
    loader = training(1000)
    (advice,) = advise(model, images[0], threat, selection=images[1], training=loader, folder=tmp_path, **bounds)
    trial = advice.trials[1]
    assert trial.setting == "tuned model's share 0.9"
    assert 1 < trial.slowdown < 10
    assert advice.helps, str(advice)
    mixture = timm_nrpm.from_pretrained(tmp_path / "Linf-0.15" / "variant")
    again = timm_nrpm.evaluate(mixture, images[0], threat, effort="fast", control=False)
    assert advice.advised.report.threat == "".join(str(int(each)) for each in again.survivors)
    wrapped = PixelModel(model)  # the same model, which brings its normalisation
    other = advise(wrapped, images[0], threat, selection=images[1], training=loader, folder=tmp_path / "b", **bounds)
    assert other[0].trials[1].selection == trial.selection
    tuned = timm_nrpm.from_pretrained(tmp_path / "Linf-0.15" / "all-layers-plain" / "variant")
    assert torch.equal(mixture.member("robust").net.model.fc.weight, tuned.fc.weight)


@pytest.mark.parametrize("slowdown", [10, 1000])
def test_a_guarantee_by_smoothing_is_that_of_certify(fragile, images, monkeypatch, slowdown):
    monkeypatch.setattr(smoothing, "VOTES", 50)
    monkeypatch.setattr(wing, "STRATEGIES", (smoothing.SMOOTHING,))
    normalisation = {"mean": (0.0,), "std": (1.0,)}
    report, selection = (part[:1] for part in images)
    bounds = {"slowdown": slowdown, "clean_loss": 100, "effect": 10}
    (advice,) = advise(fragile, report, Threat("L2", 0.8), selection=selection, **bounds, **normalisation)
    if slowdown < 50:
        why = "a prediction takes 50 forwards, and 10 times the latency is the bound"
        assert advice.untried == {"smoothing": why}
        return
    trial = advice.trials[1]
    certified = timm_nrpm.certify(fragile, selection, 0.4, n=50, **normalisation)
    right = [image.predicted == image.label for image in certified.images]
    kept = [now and image.radius >= 0.8 for now, image in zip(right, certified.images, strict=True)]
    assert trial.slowdown == 50
    assert trial.selection.clean == "".join(str(int(each)) for each in right)
    assert trial.selection.threat == "".join(str(int(each)) for each in kept)
    halves = next(each for each in advice.trials if each.setting == "noise 0.4, 50 votes, in halves")
    certified = timm_nrpm.halves.certify_halves(fragile, selection, 0.4, n=50, **normalisation)
    right = [image.predicted == image.label for image in certified.images]
    assert halves.selection.clean == "".join(str(int(each)) for each in right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effect": 4}, "120 images to judge on are too few to tell an effect of 4 points .*: it takes 150 at least"),
        ({"effect": 0}, "effect=0 is not allowed: give a number > 0"),
        ({"clean_loss": -1}, "clean_loss=-1 is not allowed"),
        ({"slowdown": 0.5}, "slowdown=0.5 is not allowed"),
        ({"seconds": 0}, "seconds=0 is not allowed"),
        ({"effort": "long"}, "effort='long' is not known"),
        ({"threats": ()}, r"threats=\(\): give a Threat, a Shift, or several"),
        ({"threats": "Linf"}, "threats='Linf': give a Threat, a Shift"),
        ({"loader": []}, "The loader gave no images"),
        (
            {"loader": [(torch.rand(8, 1, 8, 8), torch.full((8,), -1))]},
            r"without a label.* adapt_\(model, images\) and",
        ),
        ({"loader": [(torch.rand(130, 1, 8, 8), torch.full((130,), 10))]}, "the model has 10 classes"),
        ({"loader": [torch.rand(130, 1, 8, 8)]}, "The loader gives Tensor: give pairs"),
        ({"selection": "the same"}, "120 of the images to choose on are also among those to judge on"),
        ({"training": "the same"}, "120 of the images to train on are also among those to judge on"),
    ],
)
def test_bad_calls(model, images, change, message):
    given = {"loader": images[0], "selection": images[1], "threats": NOISE, **change}
    if given["selection"] == "the same":
        given["selection"] = images[0]
    if given.get("training") == "the same":
        given["training"] = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*images[0], strict=True))), 50)
    with pytest.raises(ValueError, match=message):
        advise(model, given.pop("loader"), given.pop("threats"), **given)


def test_images_are_divided_where_no_selection_is_given(model, images):
    both = [*images[0], *images[1]]
    (advice,) = advise(model, both, NOISE, seconds=0.01)
    assert len(advice.nothing.selection.threat) == len(advice.nothing.report.threat) == 120
    assert re.fullmatch(
        r"there was no time: .* took \d+ of 0.01 seconds. Give more of them, or fewer images",
        advice.untried["adaptation"],
    )
    assert "nothing can be advised: nothing was tried, and the table says why" in advice.sentence


def test_a_shift_says_what_it_is_and_refuses_what_is_unknown():
    assert [str(each) for each in (Shift(), Shift("fog", 2))] == ["the images as they are", "fog of severity 2"]
    pixels = torch.rand(3, 1, 8, 8)
    assert torch.equal(Shift().applied(pixels), pixels)
    assert torch.equal(NOISE.applied(pixels, seed=3, first=4), corrupt(pixels, "white_noise", 5, seed=3, first=4))
    for kind, severity, message in (("fogg", 5, "fogg"), ("fog", 6, "severity=6"), ("fog", 0, "severity=0")):
        with pytest.raises(ValueError, match=message):
            Shift(kind, severity)


@pytest.mark.slow
def test_one_folder_without_splits_serves_all_purposes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels, labels = digits("train")
    for number, (image, label) in enumerate(zip(pixels[:600], labels[:600], strict=True)):
        place = tmp_path / "mine" / str(int(label))
        place.mkdir(parents=True, exist_ok=True)
        save_image(image, place / f"{number}.png")
    call = ["advise", "--data", "folder", "--root", "mine", "--kinds", "none", "--seconds", "5"]
    assert main(call) == 0
    out, err = capsys.readouterr()
    assert re.search(r"of its 600 images,\s150 are judged on,\s150 are chosen on, and\s300 are trained on", err)
    assert "Against the images as they are" in out
    assert main([*call, "--train", "0", "--samples", "200", "--effect", "6", "--output", "other"]) == 0
    assert main([*call, "--samples", "200"]) == 2
    assert "100 images to judge on are too few to tell an effect of 5 points" in capsys.readouterr().err
    assert main(["advise", "--norm", "L2"]) == 2
    assert "--norm has no effect: no attack is asked for. Give --eps with it." in capsys.readouterr().err
