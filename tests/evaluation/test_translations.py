"""Moving crops: against crops cut one by one, by hand, and where the selection has to stay."""

import json
from itertools import product

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.crops import NOTHING, RULES, Scene
from timm_nrpm.evaluation.shift_report import Frames, ShiftReport
from timm_nrpm.evaluation.translations import NEIGHBOURS, _selected, evaluate_shifts
from timm_nrpm.nn.pixel_model import PixelModel


class Corner(nn.Module):
    """Class 1 if the first pixel of the crop is bright, class 2 if it is neither, else class 0."""

    def forward(self, x):
        first = x[:, 0, 0, 0]
        return torch.stack([0.5 - first, first - 0.5, 0.1 - (first - 0.5).abs()], 1)


@pytest.fixture
def scenes():
    """Images of 9 x 10 for crops of 4 x 4, so that a crop may be 2 pixels from the middle."""
    return torch.rand(7, 2, 9, 10, generator=torch.Generator().manual_seed(0))


def by_hand(model, pixels, labels, scores, size, budget, search):
    """Digits of both ways of inference, from crops that are cut and classified one by one."""
    top, left = ((side - size) // 2 for side in pixels.shape[2:])

    def predict(image, row, column):
        rows, columns = (slice(start, start + size) for start in (top + row, left + column))
        return int(model(pixels[image : image + 1, :, rows, columns]).argmax())

    around = range(-search, search + 1)
    digits_of = {"middle": ["", "", ""], "selected": ["", "", ""]}
    for image, label in enumerate(labels.tolist()):
        for way, found in digits_of.items():
            guesses = {}
            for down, across in product(range(-budget, budget + 1), repeat=2):
                where = (down, across)
                if way == "selected":
                    inside = [(down + a, across + b) for a, b in product(around, repeat=2)]
                    where = max(inside, key=lambda place: scores(image, *place))
                guesses[down, across] = predict(image, *where)
            found[0] += str(int(guesses[0, 0] == label))
            found[1] += str(sum(guesses[move] == guesses[0, 0] for move in ((-1, 0), (1, 0), (0, -1), (0, 1))))
            found[2] += str(int(all(guess == label for guess in guesses.values())))
    return Frames(*digits_of["middle"]), Frames(*digits_of["selected"])


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("batch", [3, 7])
def test_every_answer_is_that_of_crops_cut_one_by_one(scenes, rule, batch):
    model = Corner()
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 2])

    def scores(image, row, column):
        crop = scenes[image, :, 2 + row : 6 + row, 3 + column : 7 + column].double()
        if rule == "confidence":
            return float(model(crop[None].float()).softmax(1).max())
        return response(crop)

    def response(crop):
        """The pixel before the middle of the crop less the mean of the square of two that begins with it."""
        return float((crop[:, 1, 1].mean() - crop[:, 1:3, 1:3].mean()).abs())

    loader = list(zip(scenes.split(batch), labels.split(batch), strict=True))
    report = evaluate_shifts(model, loader, budget=1, search=1, rule=rule, size=4)
    assert (report.middle, report.selected) == by_hand(model, scenes, labels, scores, 4, 1, 1)
    assert (report.size, report.budget, report.search, report.samples) == ((4, 4), 1, 1, 7)


def test_the_shares_by_hand():
    report = ShiftReport(Frames("1101", "4310", "1000"), Frames("1111", "4444", "1110"), (8, 8), 1, 3, "response")
    assert (report.middle.accuracy, report.middle.consistency, report.middle.worst_case) == (0.75, 0.5, 0.25)
    assert report.middle.unmoved == "1000"
    assert (report.accuracy_effect.points, report.worst_effect.points, report.unmoved_effect.points) == (25, 50, 75)
    apart = np.array([0.0, 0.25, 0.75, 1.0])
    half = 1.96 * apart.std(ddof=1) / 2
    assert report.consistency_effect == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    lines = str(report).splitlines()
    assert lines[0] == "4 images, crops of 8 x 8, moves of up to 1 pixel"
    assert lines[2].startswith("middle crop      75.0 (19.4 to 99.4)")
    assert lines[4].startswith(f"difference       {report.accuracy_effect}")
    assert ShiftReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["shares"]["selected"]["worst_case"] == 0.75


@pytest.mark.parametrize("rule", list(RULES))
def test_the_selection_stays_where_the_preferred_crop_is_inside_every_frame(rule):
    """A bright spot, on a dark ground, that every frame can have in the middle of a crop: then nothing depends on the
    frame, though the middle crop loses the spot from its corner."""
    pixels = torch.zeros(1, 1, 12, 12)
    pixels[0, 0, 6, 6] = 1.0
    if rule == "confidence":
        pixels[0, 0, 4, 4] = 0.4  # seen by the corner of a crop that is also confident, but less so
    report = evaluate_shifts(Corner(), [(pixels, torch.tensor([0]))], budget=1, search=2, rule=rule, size=4)
    assert report.selected.stays == "4"


def test_crops_that_are_known_are_not_classified_again(scenes):
    net = PixelModel(Corner())
    scene = Scene(net, scenes, (4, 4), 2)
    wanted = torch.tensor([[0, 1, 1], [0, 1, 1], [3, 4, 0]])
    scene.look(wanted)
    assert net.forwards == 2
    scene.look(wanted)
    scene.look(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert net.forwards == 3
    assert int(scene.known.sum()) == 3
    assert len(scene.all_crops()) == 7 * 25


def test_answers_that_are_not_finite_are_wrong():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0, 0, 0] * torch.nan, x[:, 0, 0, 0]], 1)

    scene = Scene(PixelModel(Broken()), torch.rand(2, 1, 8, 8), (4, 4), 1)
    scene.look(scene.all_crops())
    assert (scene.predictions == NOTHING).all()
    report = evaluate_shifts(Broken(), [(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))], budget=1, search=1, size=4)
    assert report.middle.correct == report.selected.survived == "00"


def test_the_size_is_the_models_and_the_search_goes_as_far_as_the_images_allow():
    model = timm.create_model("resnet8_digits", pretrained=True).train()
    pixels, labels = (part[:12] for part in digits("test"))
    larger = nn.functional.pad(pixels, (5, 5, 4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = evaluate_shifts(model, [(larger, labels)], budget=2)
    assert (report.size, report.search) == ((8, 8), 2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        right = PixelModel(model).eval()(pixels).argmax(1) == labels
    assert report.middle.correct == "".join(str(int(each)) for each in right)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, r"9 x 10 pixels and the model takes 8 x 8: moves by 1 and a search by 1 need images of 12 x 12 at least"),
        ({"size": 9}, r"takes 9 x 9: .* Give larger images, not yet cropped to the model's input"),
        ({"size": 4, "search": 3}, "moves by 1 and a search by 3 need images of 12 x 12"),
        ({"budget": 0}, "budget=0 is not allowed"),
        ({"search": 0}, "search=0 is not allowed"),
        ({"rule": "luck"}, "rule='luck' is not known: choose one of response, confidence"),
    ],
)
def test_what_is_refused(scenes, given, said):
    model = timm.create_model("resnet8_digits", in_chans=2)
    with pytest.raises(ValueError, match=said):
        evaluate_shifts(model, [(scenes, torch.zeros(7, dtype=torch.long))], mean=(0.0,), std=(1.0,), **given)


def test_a_model_without_a_config_needs_a_size_and_a_loader_needs_images(scenes):
    with pytest.raises(ValueError, match=r"This Corner has no config of timm.*give size="):
        evaluate_shifts(Corner(), [(scenes, torch.zeros(7, dtype=torch.long))])
    with pytest.raises(ValueError, match="no images"):
        evaluate_shifts(Corner(), [], size=4)
    with pytest.raises(ValueError, match="from 3 to 3, and the model has 3 classes"):
        evaluate_shifts(Corner(), [(scenes, torch.full((7,), 3))], size=4)


@pytest.mark.parametrize("search", [1, 3])
def test_of_crops_that_are_equally_likely_the_choice_changes_once_in_the_search_and_one_more(search):
    pixels = torch.rand(1500, 1, 4 + 2 * (search + 1), 4 + 2 * (search + 1), generator=torch.Generator().manual_seed(0))
    scores = torch.rand(1500, 2 * search + 3, 2 * search + 3, generator=torch.Generator().manual_seed(1))
    places = _selected(Scene(PixelModel(Corner()), pixels, (4, 4), search + 1), scores, 1)
    for move in NEIGHBOURS:
        changed = (places[move] != places[0, 0]).any(1).double().mean()
        assert changed == pytest.approx(1 / (search + 1), abs=0.04)
