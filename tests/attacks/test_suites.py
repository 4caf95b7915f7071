import copy

import pytest
import torch
from torch import nn

from timm_nrpm import NRPMConfig, Threat, reprogram_
from timm_nrpm.attacks.efforts import EFFORTS, LEVELS, Effort, Stage
from timm_nrpm.attacks.pursuit import Pursuit
from timm_nrpm.attacks.sources import SURROGATES, sources_of
from timm_nrpm.attacks.suites import SUITES, alone, attacks_of
from timm_nrpm.nn.pixel_model import PixelModel

BOUNDS = {"Linf": 0.1, "L2": 0.6, "L1": 4.0, "L0": 3, "patch": 3}
THREATS = {norm: Threat(norm, eps) for norm, eps in BOUNDS.items()}
EVERY = ("own", "plain", "base", "bpda", *SURROGATES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)
    ).eval()
    return reprogram_(net, NRPMConfig(lam=0.5, eps=0.01, iterations=2))


def cases():
    for suite in SUITES:
        for norm in THREATS:
            if suite == "autoattack" or (suite in ("paper", "standard") and norm not in ("Linf", "L2")):
                continue
            yield pytest.param(
                suite, norm, marks=[pytest.mark.slow] * (suite == "paper" or (suite, norm) == ("standard", "L2"))
            )


@pytest.mark.parametrize(("suite", "norm"), list(cases()))
def test_whatever_an_attack_gives_is_within_the_bound_and_an_image(model, suite, norm):
    """Not only after evaluate has brought it back."""
    threat, pixels = THREATS[norm], torch.rand(5, 3, 6, 6)
    pixels[0, :, :2] = 0.0
    pixels[1, :, :2] = 1.0
    sources = sources_of(model, [torch.rand(40, 3, 6, 6)], base=model)
    with torch.no_grad():
        labels = sources["own"].net(pixels).argmax(1)
    moved = 0
    effort = Effort(3, 4, stages=(Stage(1.0, 5, 2), Stage(0.5, 4, 2)))
    for random in (False, True):
        for attack in attacks_of(suite, threat, effort, sources, 5, random=random):
            source = sources["own" if attack.source in ("scores", "best") else attack.source]
            with source.followed() as net:
                attacked = alone(attack, threat)(net, pixels, labels, list(range(5)))
            assert attacked.shape == pixels.shape
            assert not attacked.requires_grad
            assert bool(threat.allows(pixels, attacked).all()), attack.name
            moved += int((attacked != pixels).any())
    assert moved > 0


def test_what_the_suites_are():
    linf = THREATS["Linf"]
    adaptive = [a.name for a in attacks_of("adaptive", linf, EFFORTS["adaptive"], EVERY, 10)]
    assert adaptive[:5] == ["fgsm", "pgd", "pgd_plain", "pgd_base", "pgd_bpda"]
    assert set(adaptive[5:]) == {f"ascent_{s}" for s in EVERY if s != "own"} | {"search", "evolution_soft", "square"}
    assert adaptive[-1] == "square"
    assert adaptive.count("search") == 24
    for level, effort in LEVELS.items():
        tried = [a.name for a in attacks_of("adaptive", THREATS["Linf"], effort, EVERY, 10)]
        assert tried.count("search") == effort.rounds
        assert sum(name.startswith("evolution_") for name in tried) == effort.evolutions, level
    plain = [a.name for a in attacks_of("adaptive", THREATS["Linf"], EFFORTS["adaptive"], ("own",), 10)]
    assert set(plain) == {"fgsm", "pgd", "ascent_own", "search", "evolution_own", "square"}
    for suite in SUITES[:3]:
        names = [a.name for a in attacks_of(suite, THREATS["Linf"], EFFORTS[suite], EVERY, 10)]
        assert len(set(names)) == len(names)
    assert [a.name for a in attacks_of("standard", THREATS["L2"], EFFORTS["standard"], EVERY, 10)] == [
        "aa_apgd_ce", "aa_apgd_t", "aa_fab_t", "aa_square"]  # fmt: skip
    paper = [a.name for a in attacks_of("paper", THREATS["Linf"], EFFORTS["paper"], EVERY, 10)]
    assert paper == ["fgsm", "pgd", "cw", "aa_apgd_ce", "aa_apgd_t", "aa_fab_t", "aa_square"]
    assert [a.name for a in attacks_of("standard", THREATS["Linf"], EFFORTS["standard"], EVERY, 3)] == [
        "aa_apgd_ce", "aa_square"]  # fmt: skip
    sparse = [a.name for a in attacks_of("adaptive", THREATS["L0"], EFFORTS["adaptive"], EVERY, 10)]
    assert sparse[-1] == "random_pixels"
    assert {f"exchange_{source}" for source in EVERY} <= set(sparse)
    again = len(EFFORTS["adaptive"].stages)
    assert sum(name.startswith("exchange") for name in sparse) == len(EVERY) + again
    patch = [a.name for a in attacks_of("adaptive", THREATS["patch"], EFFORTS["adaptive"], EVERY, 10)]
    assert patch[-1] == "random_patch"
    assert {f"paste_{source}" for source in EVERY} <= set(patch)
    without = [a.name for a in attacks_of("adaptive", linf, Effort(3, 0, stages=(Stage(1.0, 3, 5),)), EVERY, 10)]
    assert not {"search", "evolution_soft", "square"} & set(without)


def test_auto_attack_has_its_authors_numbers(monkeypatch):
    """A hundred steps, five thousand queries, nine targets at most, and always the seed."""
    import torchattacks

    made = {}

    def spy(name):
        original = getattr(torchattacks, name)

        def make(net, **given):
            made.setdefault(name, []).append(given)
            return original(net, **{**given, **({"steps": 1} if "steps" in given else {"n_queries": 2})})

        return make

    for name in ("APGD", "APGDT", "FAB", "Square"):
        monkeypatch.setattr(torchattacks, name, spy(name))
    for classes in (7, 1000):
        net = PixelModel(nn.Sequential(nn.Flatten(), nn.Linear(36, classes))).eval()
        for attack in attacks_of("standard", THREATS["Linf"], EFFORTS["standard"], ("own",), classes):
            alone(attack, THREATS["Linf"])(net, torch.rand(2, 1, 6, 6), torch.tensor([0, 1]), [11, 12])
        assert made["APGDT"][-1]["n_classes"] == made["FAB"][-1]["n_classes"] == min(classes, 10)
    for name, calls in made.items():
        assert len(calls) == 2
        for given in calls:
            assert given["seed"] == 11
            assert given["n_restarts"] == 1
            assert given.get("steps", 100) == 100
            assert name != "Square" or (given["n_queries"], given["resc_schedule"]) == (5000, False)


def test_passes_are_about_what_an_attack_says(model):
    """The bar reckons with them. Nothing falls within so small a bound, so all of it is done for every image."""
    sources, threat = sources_of(model, [torch.rand(40, 3, 6, 6)]), Threat("Linf", 1e-6)
    pixels = torch.rand(4, 3, 6, 6)
    with torch.no_grad():
        labels = sources["own"].net(pixels).argmax(1)
    nets = {id(source.net): source.net for source in sources.values()}.values()
    effort = Effort(6, 10, pgd=8, stages=(Stage(1.0, 3), Stage(0.5, 6, 10)))
    for attack in attacks_of("adaptive", threat, effort, sources, 5):
        before = sum(net.forwards + net.backwards for net in nets)
        with sources["own" if attack.source in ("scores", "best") else attack.source].followed() as net:
            attack.pursue(Pursuit(sources["own"].net, pixels, labels, threat), torch.arange(4), net, [0, 1, 2, 3])
        passes = (sum(net.forwards + net.backwards for net in nets) - before) / 4
        assert 0.4 * attack.passes <= passes <= 2 * attack.passes + 10, attack.name  # ten of them find the targets


def test_surrogates_are_what_they_say(model):
    from timm_nrpm import lambdas
    from timm_nrpm.models.reprogramming import record_of, reprogrammed_layers

    sources = sources_of(model, [torch.rand(40, 3, 6, 6)])
    assert set(sources) == set(EVERY) - {"base"}
    assert {name for name, s in sources.items() if s.predicts} == {"own", "bpda"}
    assert not reprogrammed_layers(sources["plain"].net)
    nets = {name: sources[name].net.model for name in SURROGATES}
    assert {name: round(record_of(net).config.eps, 6) for name, net in nets.items()} == {
        "soft": 0.1, "soft_short": 0.1, "halfway": 0.1}  # fmt: skip
    assert {name: record_of(net).config.iterations for name, net in nets.items()} == {
        "soft": 2, "soft_short": 1, "halfway": 2}  # fmt: skip
    assert {name: set(lambdas(net).values()) for name, net in nets.items()} == {
        "soft": {0.5}, "soft_short": {0.5}, "halfway": {0.75}}  # fmt: skip
    for net in nets.values():  # each calibrated on its own, the model itself not at all
        assert not torch.equal(net[1].running_mean, model[1].running_mean)
    means = [net[1].running_mean for net in nets.values()]
    assert not torch.equal(means[0], means[1])
    assert set(sources_of(model)) == {"own", "bpda", "plain"}
    assert set(sources_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))) == {"own"}


def test_a_model_whose_every_lambda_is_one_is_its_own_plain_model(model):
    plain = reprogram_(copy.deepcopy(model), NRPMConfig(lam=1.0))
    assert set(sources_of(plain, [torch.rand(40, 3, 6, 6)])) == {"own"}
