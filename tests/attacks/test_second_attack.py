"""scripts/second_attack.py: it shares nothing with the suite, what it counts is real, and its table is its JSON."""

import ast
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_nrpm import NRPMConfig, Threat, create_model, evaluate, lambdas, plain_copy
from timm_nrpm.data.loaders import digits

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, RESULTS = ROOT / "scripts" / "second_attack.py", ROOT / "results"

MODEL_TOOLS = {"NRPMConfig", "calibrate_", "create_model", "from_pretrained", "lambdas", "plain_copy", "reprogram_"}
FOR_THE_SURVIVORS = {"RobustnessReport", "Threat", "evaluate"}
SHARED = {
    "timm_nrpm": MODEL_TOOLS | FOR_THE_SURVIVORS,
    "timm_nrpm.models.backbones": {"load_published_"},
    "timm_nrpm.data.loaders": {"digits", "pixel_loader"},
}
OUTSIDE = {"timm", "torch", "rich"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("second_attack")
    del sys.modules["second_attack"]


@pytest.fixture(scope="module")
def images():
    """The first images of the digits, all of which the plain model gets right."""
    pixels, labels = digits("test")
    return pixels[:20], labels[:20]


def attack_of(script, images, lam, rounds, seed=0, eps=0.15, small=slice(None)):
    """What so many rounds find."""
    config = NRPMConfig(lam=lam, iterations=3, eps=1e-3)
    model = create_model("resnet8_digits", pretrained=True, lam=1.0).eval()
    calibration = [digits("train")[0][:200]]
    script.calibrate_(script.reprogram_(model, config), calibration)
    pixels, labels = (part[small] for part in images)
    attack = script.SecondAttack(script.Bank(model, config, calibration), pixels, labels, eps, seed)
    attack.run(lambda: attack.bandit.rounds >= rounds)
    return attack


# --- what it shares -------------------------------------------------------------------------------------------------


def test_it_imports_nothing_of_the_suite():
    tree = ast.parse(SCRIPT.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                assert root in OUTSIDE | sys.stdlib_module_names or alias.name == "timm_nrpm", alias.name
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            names = {alias.name for alias in node.names}
            if node.module.split(".")[0] == "timm_nrpm":
                assert names <= SHARED[node.module], f"from {node.module} import {names - SHARED[node.module]}"
            else:
                assert node.module.split(".")[0] in OUTSIDE | sys.stdlib_module_names, node.module
        if isinstance(node, ast.Name):
            assert node.id not in ("__import__", "importlib", "exec", "eval", "getattr_static"), node.id
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "timm_nrpm":
            assert node.attr == "__version__", f"timm_nrpm.{node.attr}"


def test_it_asks_the_library_for_the_survivors_alone():
    tree = ast.parse(SCRIPT.read_text())
    for function in [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]:
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if function.name != "suite_of":
            assert not names & FOR_THE_SURVIVORS, function.name
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & {"project", "allows", "around"}, "a Threat's own projection"


# --- its parts against NumPy ----------------------------------------------------------------------------------------


def test_losses_are_those_of_numpy(script):
    torch.manual_seed(0)
    logits, labels, targets = torch.randn(50, 10), torch.randint(10, (50,)), torch.randint(10, (50,))
    rows, z = np.arange(50), logits.double().numpy()
    chances = np.exp(z) / np.exp(z).sum(1, keepdims=True)

    def gap(values):
        rest = values.copy()
        rest[rows, labels] = -np.inf
        return rest.max(1) - values[rows, labels]

    ordered = np.sort(z, 1)
    expected = {
        "margin": gap(z),
        "cross-entropy": -np.log(chances[rows, labels]),
        "targeted margin": z[rows, targets] - z[rows, labels],
        "ratio": gap(z) / (ordered[:, -1] - ordered[:, -3]),
        "probabilities": gap(chances),
    }
    assert expected.keys() == script.LOSSES.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(script.LOSSES[name](logits, labels, targets), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.15, 0.5])
def test_the_projection_never_oversteps_by_more_than_a_millionth(script, eps):
    torch.manual_seed(0)
    pixels = torch.rand(4, 3, 64, 64).round(decimals=1)  # 0 and 1 among them
    moved = script.within(pixels, pixels + 3 * eps * torch.randn_like(pixels), eps)
    change = (moved.double() - pixels.double()).abs().max().item()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert eps - 1e-6 < change <= eps * (1 + 1e-6)


def test_only_a_valid_image_that_the_target_gets_wrong_counts(script):
    class Brightness(torch.nn.Module):
        """Class 1 for images above a half."""

        def forward(self, x):
            mean = x.mean((1, 2, 3))
            return torch.stack([torch.full_like(mean, 0.5), mean], 1)

    pixels = torch.full((1, 4, 4), 0.45)
    attacked = pixels + 0.1
    assert script.broken(Brightness(), pixels, attacked, 0, 0.1001)
    refused = {
        "too far": (pixels, attacked, 0, 0.0999),
        "right": (pixels, pixels + 0.01, 0, 0.1001),
        "not float32": (pixels, attacked.double(), 0, 0.1001),
        "above 1": (pixels + 0.5, pixels + 0.6, 0, 0.1001),
        "not a number": (pixels, torch.full_like(pixels, math.nan), 0, 0.1001),
    }
    for why, arguments in refused.items():
        assert not script.broken(Brightness(), *arguments), why


# --- the bank -------------------------------------------------------------------------------------------------------


def test_the_bank_has_every_combination_once(script):
    config = NRPMConfig(lam=0.4, iterations=3, eps=1e-3)
    found = script.surrogates_of({"conv": 0.4}, config)
    settings = {(c.lam["conv"], round(c.eps, 9), c.iterations) for c in found.values() if c is not None}
    assert settings == {(lam, eps, k) for lam in (0.4, 0.7, 0.9) for eps in (0.01, 0.1, 1.0) for k in (1, 3)}
    assert len(found) == 19  # with the plain model
    assert len(script.surrogates_of({"conv": 0.9}, NRPMConfig(lam=0.9, iterations=1))) == 7  # 0.9 as it is and halfway
    assert list(script.surrogates_of({"conv": 1.0}, NRPMConfig(lam=1.0))) == ["plain"]


def test_surrogates_are_calibrated_as_the_target_was_and_leave_it_alone(script, images):
    attack = attack_of(script, images, 0.4, 0)
    bank, pixels = attack.bank, images[0]
    with torch.no_grad():
        before = bank.logits("own", pixels)
        name = "lam same, eps x1000, K=1"
        theirs = bank.logits(name, pixels)
        fresh = create_model("resnet8_digits", pretrained=True, lam=0.4, eps=1.0, iterations=1).eval()
        expected = script.Pixels(script.calibrate_(fresh, bank.calibration))(pixels)
        torch.testing.assert_close(theirs, expected)
        plain = script.Pixels(plain_copy(bank.target.model))(pixels)
        assert torch.equal(bank.logits("plain", pixels), plain)
        assert torch.equal(bank.logits("linear", pixels), before)  # other gradients alone
        assert torch.equal(bank.logits("own", pixels), before)
    assert set(lambdas(bank.target.model).values()) == {0.4}
    gradients = {}
    for name in ("own", "linear"):
        x = pixels.clone().requires_grad_()
        (gradients[name],) = torch.autograd.grad(bank.logits(name, x).sum(), x)
    assert not torch.allclose(gradients["own"], gradients["linear"])


def test_passes_are_the_images_that_went_through(script, images):
    attack = attack_of(script, images, 0.4, 0)
    seen = {"forwards": 0, "backwards": 0}

    def look(_, inputs):
        seen["forwards"] += len(inputs[0])
        seen["backwards"] += len(inputs[0]) if inputs[0].requires_grad else 0

    before, net = attack.bank.passes(), attack.bank["plain"]
    net.model.register_forward_pre_hook(look)
    x = images[0].clone().requires_grad_()
    attack.bank.logits("plain", x).sum().backward()
    attack.bank.logits("plain", x.detach())
    after = attack.bank.passes()
    assert seen == {"forwards": 40, "backwards": 20}
    assert (after[0] - before[0], after[1] - before[1]) == (40, 20)


# --- the attack -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [1.0, pytest.param(0.4, marks=pytest.mark.slow)])
def test_it_breaks_images_and_every_hit_is_real(script, images, lam):
    attack = attack_of(script, images, lam, 5)
    pixels, labels = images
    assert len(attack.hits) >= 8
    for row, hit in attack.hits.items():
        change = hit.attacked.double().numpy() - pixels[row].double().numpy()
        assert np.abs(change).max() <= 0.15 * (1 + 1e-6)
        assert hit.attacked.min() >= 0
        assert hit.attacked.max() <= 1
        with torch.no_grad():
            logits = attack.bank.target.model((hit.attacked.unsqueeze(0) - 0.5) / 0.5)
        assert logits.argmax().item() != labels[row].item()
    assert attack.bank.target.model.training is False


def test_what_is_not_verified_does_not_count(script, images, monkeypatch):
    monkeypatch.setattr(script, "broken", lambda *_: False)
    attack = attack_of(script, images, 1.0, 3)
    assert (attack.margins > 0).any()
    assert not attack.hits


def test_a_bound_of_almost_nothing_breaks_nothing(script, images):
    assert not attack_of(script, images, 1.0, 3, eps=1e-4).hits


@pytest.mark.slow
def test_each_way_breaks_images(script, images):
    settings = script.Settings
    ways = [
        settings("ascent", "ball", 20, ("plain", "linear"), "margin", 0.25, "linear", 0.5),
        settings("ascent", "corners", 20, ("lam 0.9, eps x100, K=1",), "cross-entropy", 0.25, "cosine", 1.0),
        settings("squares", "best", 50),
        settings("pixels", "best", 50),
        settings("stripes", "best", 50),
    ]
    for way in ways:
        attack = attack_of(script, images, 0.4, 0)
        attack.bandit.settings = lambda way=way: way
        attack.run(lambda attack=attack: attack.bandit.rounds >= 1)
        assert attack.hits, way
        assert all(hit.settings == way for hit in attack.hits.values())


@pytest.mark.slow
def test_best_is_the_worst_point_that_was_seen(script, images):
    attack = attack_of(script, images, 1.0, 4, eps=0.05)
    with torch.no_grad():
        now = script.margin(attack.bank.logits("own", attack.best), images[1], images[1])
        clean = script.margin(attack.bank.logits("own", images[0]), images[1], images[1])
    torch.testing.assert_close(now, attack.margins, atol=1e-4, rtol=1e-4)
    assert (now > clean).all()


@pytest.mark.slow
def test_the_longer_run_begins_like_the_shorter(script, images):
    few = slice(0, 8)
    short, long = (attack_of(script, images, 0.4, rounds, seed=3, small=few) for rounds in (2, 4))
    early = {row: hit.settings for row, hit in long.hits.items() if hit.round < 2}
    assert {row: hit.settings for row, hit in short.hits.items()} == early
    assert all(torch.equal(short.hits[row].attacked, long.hits[row].attacked) for row in early)


def test_what_worked_is_drawn_more_often(script):
    bandit = script.Bandit(["own"], 0)
    good, bad = script.Settings("squares", "best", 10), script.Settings("stripes", "ball", 100)
    for _ in range(10):
        bandit.learn(good, 5, 100)
        bandit.learn(bad, 0, 100)
    drawn = [bandit.draw("way")[0] for _ in range(300)]
    assert drawn.count("squares") > 200
    assert drawn.count("stripes") < 20
    assert len(set(bandit.draw("steps", 5))) == 5


# --- the command ----------------------------------------------------------------------------------------------------


def run(script, monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["second_attack.py", "--out", str(folder), *options])
    script.main()


@pytest.fixture
def tiny(script, monkeypatch):
    """The plain model on a few images, judged by the suite `quick`."""
    case = script.Case("digits", NRPMConfig(lam=1.0), 0.15, 12)
    monkeypatch.setattr(script, "CASES", (case,))
    monkeypatch.setattr(script, "evaluate", lambda *args, **options: evaluate(*args, "quick", control=False))
    return case


def check(script, rows, text):
    """The sums of a results file, and its table."""
    assert script.markdown(rows) == text
    for row in rows.values():
        suite, second = row["suite"], row["second"]
        assert len({hit["image"] for hit in row["hits"]}) == len(row["hits"]) == second["broken"]
        assert round(suite["worst_case"] * row["images"]) == suite["survivors"]
        assert round(second["worst_case"] * row["images"]) == suite["survivors"] - second["broken"]
        assert math.isclose(row["points"], 100 * (second["worst_case"] - suite["worst_case"]), abs_tol=1e-9)
        assert all(hit["round"] <= second["rounds"] for hit in row["hits"])


@pytest.mark.slow
def test_the_command_writes_a_table_that_is_its_json(script, tiny, monkeypatch, tmp_path):
    run(script, monkeypatch, tmp_path, "--only", "digits-1", "--seconds", "8")
    rows, text = json.loads((tmp_path / "second-attack.json").read_text()), (tmp_path / "second-attack.md").read_text()
    check(script, rows, text)
    (row,) = rows.values()
    assert row["hits"]
    pixels, labels = digits("test")
    model = create_model("resnet8_digits", pretrained=True, lam=1.0).eval()
    report = evaluate(model, [(pixels[:12], labels[:12])], Threat("Linf", 0.15), "quick")
    assert {hit["image"] for hit in row["hits"]} <= {i for i, stands in enumerate(report.survivors) if stands}


def test_a_report_is_taken_if_it_is_of_these_images(script, tiny, monkeypatch, tmp_path):
    pixels, labels = digits("test")
    model = create_model("resnet8_digits", pretrained=True, lam=1.0).eval()
    file, options = tmp_path / "report.json", ("--only", "digits-1", "--seconds", "0.3", "--report")

    def write(images, threat):
        file.write_text(evaluate(model, [images], threat, "quick", control=False).to_json())

    write((pixels[:12], labels[:12]), Threat("Linf", 0.15))
    run(script, monkeypatch, tmp_path, *options, str(file))
    assert (tmp_path / "second-attack.json").exists()
    write((pixels[:12], labels[:12]), Threat("Linf", 0.1))
    with pytest.raises(SystemExit, match=r"12 images under Linf 0\.1, and digits-1 has 12 under Linf 0\.15"):
        run(script, monkeypatch, tmp_path, *options, str(file))
    write((pixels[:12], labels[:12]), Threat("Linf", 0.15))
    monkeypatch.setattr(script, "digits", lambda split: (digits(split)[0].flip(0), labels))
    with pytest.raises(SystemExit, match="it is of other images"):
        run(script, monkeypatch, tmp_path, *options, str(file))


@pytest.mark.parametrize(
    "options",
    [
        ("--only", "nosuch"),
        ("--only", "resnet18-0.5"),
        ("--report", "r.json"),
        ("--seconds", "0"),
        ("--seconds", "nan"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_any_work(script, monkeypatch, tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, tmp_path, *options)
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_committed_table_is_its_json(script):
    rows = json.loads((RESULTS / "second-attack.json").read_text())
    check(script, rows, (RESULTS / "second-attack.md").read_text())
    assert set(rows) <= set(map(str, script.CASES))
