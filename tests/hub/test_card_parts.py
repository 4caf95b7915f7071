"""The parts of a card that a stranger needs: the verdict, how to install, the images, what a forward costs, and the
numbers that the Hub's own tables take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from test_cards import report, variant
from torch import nn

import timm_nrpm
from timm_nrpm import Threat
from timm_nrpm.attacks.flags import COMPARISON, MEANINGS, PLAIN_CHANGED
from timm_nrpm.data.loaders import pixel_loader
from timm_nrpm.ensembles.adaptive_smoothing import AdaptiveSmoothing
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import write_card
from timm_nrpm.hub.ensemble_cards import write_ensemble_card
from timm_nrpm.hub.latency import estimated, parse_cost, read_cost, write_cost
from timm_nrpm.hub.publishing import push_to_hub
from timm_nrpm.hub.templates import BEGIN, END, is_edited
from timm_nrpm.hub.verdict import verdict
from timm_nrpm.models.loading import find_variant
from timm_nrpm.nn.pixel_model import PixelModel
from timm_nrpm.version import INSTALL, PYTHON

ROOT = Path(__file__).parents[2]


def card(folder, reports=(), **more):
    return write_card(folder, "me/v", reports, **more).read_text()


def adaptive(model, **more):
    return replace(report(model, **more), suite="adaptive")


def first_words(text):
    """The first paragraph of the generated part."""
    return text.partition(BEGIN)[2].lstrip("\n").partition("\n\n")[0]


def test_the_verdict_is_what_a_reader_meets_first(tmp_path):
    model, folder = variant(tmp_path)
    assert first_words(card(folder)) == "**Not evaluated: neither its robustness nor its accuracy is known.**"
    found = report(model)
    text = card(folder, [found])
    assert first_words(text) == f"**{found.verdict}**"
    assert text.count(found.verdict) == 1
    flagged = report(model, flags=("gradient_masking", "zero_gradient"))
    words = first_words(card(folder, [flagged]))
    assert words == f"**{flagged.verdict} Flagged, see below: `gradient_masking`, `zero_gradient`.**"


def with_outcomes(ours, theirs, **more):
    """A report on images that survive in this model and in the plain one as given."""
    attack = lambda survived: timm_nrpm.report.AttackResult("pgd", "own", tuple(map(bool, survived)), 1, 1, 0.1)  # noqa: E731
    about = {"steps": 1, "queries": 1, "seed": 0, "correct": (True,) * len(ours), "suite": "adaptive", **more}
    control = None if theirs is None else RobustnessReport(Threat("Linf", 0.1), attacks=(attack(theirs),), **about)
    return RobustnessReport(Threat("Linf", 0.1), attacks=(attack(ours),), control=control, **about)


@pytest.mark.parametrize(
    ("ours", "theirs", "word", "says"),
    [
        ([1] * 10, [0] * 10, "better", "better than the plain model"),
        ([0] * 10, [1] * 10, "worse", "worse than the plain model"),
        ([1] * 10, [1] * 9 + [0], "", "no difference from the plain model can be told"),
        ([1] * 10, None, None, "nothing stands beside it"),
    ],
)
def test_several_reports_come_to_one_sentence(ours, theirs, word, says):
    found = with_outcomes(ours, theirs)
    assert found.comparison == word
    other = replace(found, threat=Threat("L2", 0.5), suite="quick")
    share = f"{10.0 * sum(ours):.1f} % of 10 images"
    assert verdict([found, other]) == (
        f"This model keeps {share} in the worst case at Linf 0.1 ({says}); and {share} under the suite quick, which is "
        f"no worst case at L2 0.5 ({says})."
    )
    assert verdict([found]) == found.verdict


def test_how_it_is_installed_is_true(tmp_path):
    """The card, the README and the package say the same."""
    text = card(variant(tmp_path)[1])
    assert f"`{INSTALL}` in a clone of its repository" in text
    assert "pip install timm" not in text
    assert f'\nrequires-python = ">={PYTHON}"\n' in (ROOT / "pyproject.toml").read_text()
    readme = (ROOT / "README.md").read_text()
    assert f"With Python {PYTHON} or newer and make, in a clone of this repository" in readme
    assert re.search(r"`pip install (-e )?'?\.", readme)
    assert "pip install timm_nrpm" not in readme


def code_of(text, heading):
    """The code under a heading of a card."""
    return text.partition(f"## {heading}\n")[2].partition("```python\n")[2].partition("```")[0]


def test_the_code_on_images_runs_and_is_right(tmp_path, monkeypatch):
    """It gives the logits of this package's own loader, which gives pixels that are normalised inside."""
    _, folder = variant(tmp_path)
    model = timm_nrpm.from_pretrained(folder)
    code = code_of(card(folder), "Images")
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0).integers(0, 256, (13, 11), np.uint8)
    (tmp_path / "images" / "0").mkdir(parents=True)
    for path in ("photo.png", "images/0/photo.png"):
        Image.fromarray(numbers).save(path)
    names = {"model": model}
    with torch.no_grad():
        exec(code, names)
        classes = {"0": 0}
        (pixels, _), *_ = pixel_loader("folder", "images", model=model, batch_size=1, class_map=classes)
        expected = PixelModel(model)(pixels)
    assert names["logits"].shape == (1, 10)
    assert torch.allclose(names["logits"], expected, atol=1e-5)


def test_the_code_on_images_of_an_ensemble_runs(tmp_path, monkeypatch):
    model, _ = variant(tmp_path)
    plain = timm.create_model("resnet8_digits", pretrained=True).eval()
    mixture = AdaptiveSmoothing(plain, model, share=0.5).eval()
    folder = timm_nrpm.save_pretrained(mixture, tmp_path / "e")
    text = write_ensemble_card(folder, "me/e", cost=estimated(mixture), tags=["mine"]).read_text()
    assert "It normalises them itself, each member by its own mean and standard deviation." in text
    assert "| `robust` | timm_nrpm's `resnet8_digits` | 8 | as given | 0.5 | 0.5 |" in text
    assert re.search(r"\*\*about [\d.]+ times\*\* as long as the same ensemble of plain members", text)
    assert {"ensemble", "mine"} <= set(ModelCard(text).data.tags)
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(numbers).save("photo.png")
    names = {"model": timm_nrpm.from_pretrained(folder)}
    with torch.no_grad():
        exec(code_of(text, "Images"), names)
        expected = mixture(torch.from_numpy(numbers / np.float32(255)).view(1, 1, 8, 8))
    assert torch.allclose(names["logits"], expected, atol=1e-5)


def test_images_as_timms_config_has_them(tmp_path):
    _, folder = variant(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 224, 160], "crop_pct": 0.875, "interpolation": "bilinear",
                                 "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    text = rendered(folder)
    assert (
        "Images of 224 x 160 pixels, RGB; others are resized by bilinear interpolation, by their shorter side and"
        in text
    )
    assert "of which the middle 87.5 % of the side are kept" in text
    assert "by mean 0.485, 0.456, 0.406 and standard deviation 0.229, 0.224, 0.225" in text
    assert '.convert("RGB")' in text
    (folder / "config.json").unlink()
    assert "It is no model of timm's, so its files say neither what size images have" in rendered(folder)


def rendered(folder):
    """The card of a folder whose config is not compared with its hash."""
    from timm_nrpm.hub.cards import render

    found = find_variant(variant(folder.parent, "whole")[1]).variant
    return str(render(found, folder, "me/v", license="mit"))


def test_what_a_forward_costs_is_named_for_what_it_is(tmp_path):
    model, folder = variant(tmp_path)
    assert "Neither measured nor estimated." in card(folder)
    guess = estimated(find_variant(folder).variant)
    assert {layer.name for layer in guess.layers if layer.estimated} == set(timm_nrpm.lambdas(model))
    text = card(folder, cost=guess)
    ours, plain = f"{1e3 * guess.seconds:.3g} ms", f"{1e3 * guess.plain_seconds:.3g} ms"
    assert (
        f"takes **about {guess.slowdown:.1f} times** as long as the plain model: {ours} where that takes {plain}"
        in text
    )
    assert f"({guess.machine.name})" in text or not guess.machine.name
    assert "Both are estimated from how fast that machine computes small layers, and not measured" in text
    assert card(folder) == text  # it lies in the folder
    run = timm_nrpm.cost(model, measured=True)
    text = card(folder, cost=run)
    assert f"takes **{run.measured.seconds / run.measured.plain_seconds:.1f} times** as long" in text
    assert "Both were measured." in text
    assert "estimated from" not in text


def test_a_cost_of_another_model_is_not_taken(tmp_path):
    model, folder = variant(tmp_path)
    guess = estimated(model)
    write_cost(guess, "0" * 64, folder)
    assert "Neither measured nor estimated." in card(folder)
    assert not (folder / "cost.json").exists()
    write_cost(guess, "a", folder)
    assert read_cost(folder, "a") == guess
    for text in (None, "", "[]", "{}", '{"model": "a"}', '{"model": "a", "cost": {}}', "[" * 10**5):
        assert parse_cost(text, "a") is None


@pytest.mark.parametrize("from_folder", [False, True])
def test_the_forward_that_is_timed_is_of_the_images_that_the_card_names(tmp_path, from_folder):
    """A variant says the size of its images, as one that was trained on small ones does; timm's model has its own."""
    model = timm_nrpm.create_model("resnet18", num_classes=3, lam=0.9, layers="layer1.*")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    source = timm_nrpm.save_pretrained(model, tmp_path / "variant", full=True) if from_folder else model
    options = {"dry_run": True, "folder": tmp_path / "out", "license": "mit"}
    timm_nrpm.push_to_hub(source, "me/small", full=True, **options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Images of 32 x 32 pixels" in card
    assert "1 image of 3x32x32" in card


def test_an_estimate_leaves_random_numbers_and_threads_alone(tmp_path):
    _, folder = variant(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert estimated(find_variant(folder).variant) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_model_that_is_not_timms_has_no_estimate(tmp_path):
    model = timm_nrpm.reprogram_(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), timm_nrpm.NRPMConfig(0.5)).eval()
    done = push_to_hub(model, "me/v", license="mit", dry_run=True, folder=tmp_path / "v")
    assert "cost.json" not in done.files
    assert "Neither measured nor estimated." in (tmp_path / "v" / "README.md").read_text()


def test_a_model_that_cannot_be_estimated_is_published(tmp_path, monkeypatch):
    def fail(model):
        raise NotImplementedError("not for half precision on this machine")

    monkeypatch.setattr(timm_nrpm.hub.latency, "cost", fail)
    done = push_to_hub(variant(tmp_path)[0], "me/v", dry_run=True, folder=tmp_path / "pushed")
    assert "cost.json" not in done.files


def numbers_of(text, tmp_path):
    """The numbers of a card, as the Hub's own client reads them from the file, by name."""
    (tmp_path / "card.md").write_text(text)
    results = ModelCard.load(tmp_path / "card.md").data.eval_results
    assert all(result.task_type == "image-classification" and result.metric_type == "accuracy" for result in results)
    return {result.metric_name: result.metric_value for result in results}


def percent(share):
    return float(f"{100 * share:.1f}")


def test_the_worst_case_is_the_headline_of_the_model_index(tmp_path):
    model, folder = variant(tmp_path)
    found = adaptive(model)
    assert list(numbers_of(card(folder, [found]), tmp_path).items()) == [
        ("worst-case accuracy, Linf 0.15, 37 images, %", percent(found.worst_case)),
        ("clean accuracy, 37 images, %", percent(found.clean)),
        (
            "accuracy under PGD along the model's own gradient alone, no worst case, Linf 0.15, 37 images, %",
            percent(found.accuracy("pgd")),
        ),
    ]


@pytest.mark.parametrize("flag", MEANINGS)
def test_no_number_goes_without_its_flag(tmp_path, flag):
    model, folder = variant(tmp_path)
    found = adaptive(model, flags=(flag,))
    names = list(numbers_of(card(folder, [found]), tmp_path))
    about_numbers = flag not in COMPARISON
    assert (f", flagged {flag}, %" in names[0]) == about_numbers
    assert any("own gradient" in name for name in names) != about_numbers
    assert len(names) == (2 if about_numbers else 3)
    assert (flag == PLAIN_CHANGED) != about_numbers


@pytest.mark.parametrize("suite", ["quick", "paper", "standard", "autoattack"])
def test_what_no_adaptive_suite_left_is_nowhere_called_the_worst_case(tmp_path, suite):
    model, folder = variant(tmp_path)
    text = card(folder, [replace(report(model), suite=suite)])
    names = list(numbers_of(text, tmp_path))
    assert names[0].startswith(
        f"accuracy under all attacks of the suite {suite}, which is no worst case, Linf 0.15, 37"
    )
    without = re.sub(r"(no|is no) worst[\s-]+case", "", text)
    assert "worst" not in without
    assert "| share that all attacks of the suite leave |" in text


def test_two_reports_say_the_clean_accuracy_once(tmp_path):
    model, folder = variant(tmp_path)
    text = card(folder, [adaptive(model), adaptive(model, eps=0.3)])
    assert text.count("name: clean accuracy") == 1
    assert len(numbers_of(text, tmp_path)) == 5


def test_changes_inside_the_generated_part_are_noticed(tmp_path):
    _, folder = variant(tmp_path)
    text = card(folder)
    assert not is_edited(text)
    assert not is_edited(f"before\n{text}after\n".replace("\n", "\r\n"))
    assert not is_edited("# A card of somebody else\n")
    assert not is_edited(text.replace(END, ""))  # all of it is kept then, as text behind the mark
    assert is_edited(text.replace("## Limits", "## No limits"))
    assert is_edited(re.sub("<!-- timm_nrpm: sha256 .* -->\n", "", text))
