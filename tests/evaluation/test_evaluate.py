import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_nrpm
from timm_nrpm import NRPMConfig, RobustnessReport, Threat, evaluate, reprogram_
from timm_nrpm.attacks.flags import MASKED, NON_FINITE, RANDOM, ZERO
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.nn.pixel_model import PixelModel

ROOT = Path(__file__).resolve().parents[2]
EIGHTH = Threat("Linf", 0.125)


def batches(count, size=32):
    pixels, labels = (t[:count] for t in digits("test"))
    return list(zip(pixels.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="module")
def data():
    return batches(60)


def linear(weight, bias=(0.0, 0.0)):
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weight[0]), 2))
    model[1].weight.data, model[1].bias.data = torch.tensor(weight), torch.tensor(bias)
    return model


def small(lam=None):
    """An untrained classifier of 4x4 images that its own attacks can be run on in no time."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 5)
    ).eval()
    return model if lam is None else reprogram_(model, NRPMConfig(lam=lam, eps=0.01, iterations=2))


def labelled(model, count=12, size=4):
    """Images with the labels that the model gives most of them."""
    pixels = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return list(zip(pixels.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize(
    ("norm", "unit"), [("Linf", 1.0), pytest.param("L1", 2.0, marks=pytest.mark.slow), ("L2", 2**0.5)]
)
def test_a_linear_model_falls_where_it_must(norm, unit):
    """Logits are the two pixels, 0.4 apart: both have to move by more than 0.2 for the other class."""
    model = linear([[1.0, 0.0], [0.0, 1.0]])
    pixels, labels = torch.tensor([[0.7, 0.3], [0.2, 0.6]]).view(2, 2, 1, 1), torch.tensor([0, 1])
    for eps, worst in ((0.05, 1.0), (0.19, 1.0), (0.21, 0.0), (0.4, 0.0)):
        report = evaluate(model, [(pixels, labels)], Threat(norm, eps * unit), steps=20, queries=20)
        assert report.accuracy("clean") == 1.0
        assert report.worst_case == worst


def test_under_l0_a_pixel_is_all_it_takes():
    """One of four pixels outweighs the others; the other three together weigh less than it."""
    model = linear([[0.0] * 4, [3.0, 1.0, 1.0, 0.5]], (1.4, 0.0))
    pixels = torch.tensor([[0.0, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).view(3, 1, 2, 2)
    labels = torch.tensor([0, 1, 1])
    report = evaluate(model, [(pixels, labels)], Threat("L0", 1), queries=20)
    assert report.survivors == (False, False, True)
    assert evaluate(model, [(pixels, labels)], Threat("L0", 3), queries=20).survivors == (False, False, False)


def independent_pgd(model, pixels, labels, eps, steps, seed):
    """Twenty lines that know nothing of the library: accuracy image by image under PGD, or FGSM with no seed."""
    right = (model((pixels - 0.5) / 0.5).argmax(1) == labels).nonzero().squeeze(1)
    x0, y = pixels[right], labels[right]
    x = x0.clone()
    if seed is not None:
        torch.manual_seed(seed)
        x = (x0 + torch.empty_like(x0).uniform_(-eps, eps)).clamp(0, 1)
    size = eps if seed is None else eps / 4
    for _ in range(steps):
        x = x.detach().requires_grad_()
        F.cross_entropy(model((x - 0.5) / 0.5), y).backward()
        x = (x.detach() + size * x.grad.sign()).clamp(x0 - eps, x0 + eps).clamp(0, 1)
    survived = torch.zeros(len(pixels), dtype=torch.bool)
    survived[right] = model((x - 0.5) / 0.5).argmax(1) == y
    return survived.tolist()


@pytest.mark.parametrize("eps", [0.05, 0.15])
def test_plain_numbers_agree_with_an_independent_implementation_to_the_image(eps):
    from timm_nrpm.data.ordering import seed_of

    model = timm.create_model(DIGITS, pretrained=True).eval()
    loader = batches(180, 180)
    report = evaluate(model, loader, Threat("Linf", eps), "quick", seed=7)
    first = report.correct.index(True)
    for name, steps, seed in (("fgsm", 1, None), ("pgd", 20, seed_of(7, 0, first))):
        want = independent_pgd(model, *loader[0], eps, steps, seed)
        got = next(a for a in report.attacks if a.name == name)
        assert [s is True for s in got.survived] == want
        assert 0.2 < sum(want) / 180 < 0.98


def test_normalisation_happens_inside(data):
    model = timm.create_model(DIGITS, pretrained=True).eval()
    pixels, _ = data[0]
    torch.testing.assert_close(PixelModel(model)(pixels), model((pixels - 0.5) / 0.5))
    torch.testing.assert_close(PixelModel(model, (0.0,), (1.0,))(pixels), model(pixels))


def test_the_report_is_per_image_and_adds_up(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9)
    report = evaluate(model, data, Threat("Linf", 0.1), "quick", steps=3)
    assert [a.name for a in report.attacks] == ["fgsm", "pgd", "pgd_plain"]
    assert [a.name for a in report.control.attacks] == ["fgsm", "pgd"]
    assert report.samples == report.control.samples == 60
    images = torch.tensor([report.correct, *([s is True for s in a.survived] for a in report.attacks)])
    assert report.worst_case == pytest.approx(images.all(0).double().mean().item())
    assert not (images[1:] & ~images[0]).any()  # wrong when clean is wrong under attack
    for attack in report.attacks:
        assert [s is None for s in attack.survived] == [not c for c in report.correct]
        assert attack.forwards >= attack.tried
        assert attack.backwards == attack.tried * (1 if attack.name == "fgsm" else 3)
    assert evaluate(model, data, Threat("Linf", 0.1), "quick", steps=3) == report
    assert evaluate(model, data, Threat("Linf", 0.1), "quick", steps=3, seed=1) != report
    plain = timm.create_model(DIGITS, pretrained=True)
    beside = evaluate(plain, data, Threat("Linf", 0.1), "quick", steps=3)
    assert beside.control is None
    assert [a.survived for a in beside.attacks] == [a.survived for a in report.control.attacks]


@pytest.mark.slow
def test_broken_images_are_attacked_no_more():
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9)
    report = evaluate(model, batches(16, 8), Threat("Linf", 0.12), steps=5, queries=10)
    compared = ("fgsm", "pgd", "pgd_plain", "pgd_bpda")
    left = list(report.correct)
    for attack in report.attacks:
        tried = [s is not None for s in attack.survived]
        if attack.name in compared:
            assert tried == list(report.correct)
            left = [a and s is not False for a, s in zip(left, attack.survived, strict=True)]
        else:  # which try what those have left, and break each image once
            assert all(at_all <= after for at_all, after in zip(tried, left, strict=True))
    after = [a for a in report.attacks if a.name not in compared]
    assert sum(a.broke for a in after) == sum(left) - sum(report.survivors)
    assert 0 < sum(report.survivors) < sum(left)  # else nothing was tested


def test_a_plain_model_has_no_transfer_and_equals_lambda_one(data):
    plain = timm.create_model(DIGITS, pretrained=True)
    ours = timm_nrpm.create_model(DIGITS, pretrained=True, lam=1.0)
    a, b = (evaluate(m, data, Threat("Linf", 0.1), "quick", steps=3) for m in (plain, ours))
    assert [attack.name for attack in a.attacks] == ["fgsm", "pgd"]
    for report in (b, b.control):
        assert [(r.name, r.survived) for r in report.attacks] == [(r.name, r.survived) for r in a.attacks]
    assert (a.flags, b.flags) == ((), ())


def test_gradient_masking_is_flagged(data):
    """The bundled model at lambda 0.4: the transfer attack leaves far fewer images right than its own gradient."""
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.4)
    timm_nrpm.calibrate_(model, [digits("train")[0][:300]])
    report = evaluate(model, data, Threat("Linf", 0.15), "quick", steps=5)
    assert report.accuracy("pgd_plain") < report.accuracy("pgd") - 0.1
    assert report.flags == (MASKED,)
    assert str(report).startswith("FLAGS: gradient_masking. See docs/flags.md.")
    assert evaluate(reprogram_(model, NRPMConfig(lam=1.0)), data, Threat("Linf", 0.15), "quick", steps=5).flags == ()


class Cliff(nn.Linear):
    """A correct model whose gradient is not a number."""

    def forward(self, x):
        return super().forward(x.flatten(1)) + 0 * (x - x).abs().sqrt().sum()


def test_a_gradient_that_is_not_a_number_is_flagged():
    model = Cliff(2, 2)
    model.weight.data, model.bias.data = torch.eye(2), torch.zeros(2)
    pixels = torch.tensor([[0.9, 0.1]]).view(1, 2, 1, 1)
    report = evaluate(model, [(pixels, torch.tensor([0]))], Threat("Linf", 0.1), "quick", steps=2)
    assert report.flags == (NON_FINITE, ZERO)  # where it is no number nothing moves
    assert report.worst_case == 1.0


def test_logits_that_are_no_numbers_are_wrong():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)).where(x.flatten(1)[:, :1] > 0.5, float("nan"))

    pixels = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).view(2, 2, 1, 1)
    report = evaluate(Broken(2, 2), [(pixels, torch.tensor([0, 0]))], Threat("Linf", 0.01), "quick", steps=1)
    assert not report.correct[1]  # though argmax gives 0 for NaN


@pytest.mark.parametrize("suite", ["quick", "adaptive", "standard", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["Linf", "L2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("L1", "L0"))])
def test_the_model_is_left_as_it_was(suite, norm):
    if suite in ("standard", "paper") and norm in ("L1", "L0"):
        return
    model = small(0.6).train()
    model[5].weight.requires_grad_(False)
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = torch.random.get_rng_state()
    loader = labelled(small(0.6))
    evaluate(model, loader, Threat(norm, 1 if norm == "L0" else 0.1), suite, steps=2, queries=3)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("at", [2, 9, 30, 70])
def test_an_attack_that_fails_leaves_the_model_as_it_was(at):
    """Whatever it was at."""
    from timm_nrpm.models.reprogramming import reprogrammed_layers

    class Failing(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == at:
                raise RuntimeError("out of memory")
            return super().forward(x)

    model = Failing(*small()).train()
    reprogram_(model, NRPMConfig(lam=0.6, iterations=2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(model, labelled(small(0.6)), EIGHTH, steps=2, queries=3)
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(layer.linear_backward for layer in reprogrammed_layers(model).values())


@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.bfloat16, torch.float64))]
)
def test_pixels_of_any_type(dtype):
    model = small(0.6)
    data = [(pixels.to(dtype), labels.to(torch.uint8)) for pixels, labels in labelled(model)]
    same = [(pixels.float(), labels) for pixels, labels in data]
    options = {"steps": 2, "queries": 3}
    assert evaluate(model, data, EIGHTH, **options) == evaluate(model, same, EIGHTH, **options)


def test_a_random_forward_is_random_the_same_way_each_time():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x + 0.3 * torch.randn_like(x))

    model, state = Noisy(*small()), torch.random.get_rng_state()
    data = labelled(small())
    reports = [evaluate(model, data, EIGHTH, steps=3, queries=5) for _ in range(2)]
    assert reports[0] == reports[1]
    assert RANDOM in reports[0].flags
    assert torch.equal(torch.random.get_rng_state(), state)


def test_half_precision_and_no_grad(data):
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.9).bfloat16()
    with torch.no_grad():
        report = evaluate(model, data[:1], Threat("Linf", 0.1), "quick", steps=2)
    assert report.accuracy("pgd") < report.accuracy("clean")


@pytest.mark.slow
def test_batches_of_one_and_another_base():
    model, base = small(0.5), small()
    data = labelled(model, size=1)
    report = evaluate(model, data, EIGHTH, steps=3, queries=5, base=base)
    assert report.samples == 12
    names = [a.name for a in report.attacks]
    assert "pgd_base" in names
    assert "ascent_base" in names


def test_warnings_are_in_the_report_and_still_raised(tmp_path):
    class Noisy(nn.Sequential):
        def forward(self, x):
            import warnings

            warnings.warn("careful", UserWarning, stacklevel=1)
            return super().forward(x)

    model = Noisy(nn.Flatten(), nn.Linear(16, 3))
    data, path = [(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))], tmp_path / "journal"
    with pytest.warns(UserWarning, match="careful"):
        report = evaluate(model, data, EIGHTH, "quick", steps=1, resume=path)
    assert report.warnings == ("careful",)
    assert evaluate(model, data, EIGHTH, "quick", steps=1, resume=path).warnings == ("careful",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Threat("L7", 0.1), "norm='L7' is not known"),
        (lambda: Threat("Linf", 8), "like 8 / 255"),
        (lambda: Threat("Linf", 0), "eps=0"),
        (lambda: Threat("Linf", "8/255"), "eps='8/255'"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], steps=0), "steps=0"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], queries=-1), "queries=-1"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], 0.1), "is no Threat"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], suite="best"), "choose one of quick, paper, standard"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [], Threat("L0", 1), "paper"), "no attacks under L0"),
        (lambda: evaluate(linear([[1.0], [0.0]]), []), "gave no images"),
        (lambda: evaluate(linear([[1.0], [0.0]]), iter([])), "which gives its images once"),
        (
            lambda: evaluate(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)), one(0.5)),
            "of two classes at least",
        ),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(0.5, label=2)), "the model has 2 classes"),
        (lambda: evaluate(nn.Identity(), one(0.5)), r"The model gives \[1, 1, 1, 1\] for 1 images"),
        (lambda: evaluate(nn.Flatten(0), one(0.5)), r"The model gives \[1\] for 1 images"),
        (
            lambda: evaluate(linear([[1.0], [0.0]]), [(torch.rand(0, 1, 1, 1), torch.zeros(0))]),
            "a batch that holds no images",
        ),
        (lambda: evaluate(linear([[1.0], [0.0]]), [(torch.rand(2, 1, 1, 1), torch.tensor([0]))]), "give 2 integers"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [{"image": 0}]), "give pairs of pixels"),
        (lambda: evaluate(linear([[1.0], [0.0]]), [(torch.rand(1, 1, 1, 1), torch.tensor([0]), 3)]), "give pairs"),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(0.5, label=-1)), "from -1"),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(float("nan"))), "from nan to nan"),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(200.0)), "from 200 to 200"),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(0.5), mean=(123.7,)), "normalises no pixels in"),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(0.5), std=(0.0,)), "above 0 and up to 1"),
        (
            lambda: evaluate(linear([[1.0], [0.0]]), one(0.5), mean=(0.5,) * 3, std=(0.5,) * 3),
            "have 1 channels, and the model's normalisation has 3",
        ),
        (lambda: evaluate(linear([[1.0], [0.0]]), one(-2.0)), r"from -2 to -2: give pixels in \[0, 1\]"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def one(value, label=0):
    return [(torch.full((1, 1, 1, 1), value), torch.tensor([label]))]


def test_original_auto_attack_says_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(ImportError, match=r'git\+https://github.com/fra31/auto-attack, or choose suite="standard"'):
        evaluate(linear([[1.0], [0.0]]), one(0.5), suite="autoattack")


def test_original_auto_attack_gets_its_authors_numbers(monkeypatch):
    """A stand-in with the attributes that theirs has, since it is in no package index."""
    made = []

    class AutoAttack:
        def __init__(self, net, **given):
            part = {"n_restarts": 1, "n_iter": 100}
            self.apgd, self.apgd_targeted, self.fab = (SimpleNamespace(**part, n_target_classes=9) for _ in range(3))
            self.square, self.given = SimpleNamespace(n_queries=1), given
            made.append(self)

        def run_standard_evaluation(self, pixels, labels, bs):
            assert bs == len(pixels)
            return pixels

    monkeypatch.setitem(sys.modules, "autoattack", SimpleNamespace(AutoAttack=AutoAttack))
    model = small()
    evaluate(model, labelled(model), Threat("L1", 1.0), "autoattack", seed=3)
    names = [attack.attacks_to_run[0] for attack in made]
    assert list(dict.fromkeys(names)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    for attack in made:
        assert (attack.given["version"], attack.given["norm"], attack.given["eps"]) == ("standard", "L1", 1.0)
        assert isinstance(attack.given["seed"], int)
        assert (attack.apgd.n_iter, attack.square.n_queries, attack.fab.n_target_classes) == (100, 5000, 4)


SCRIPT = """
import sys, time
import torch
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
from test_evaluate import EIGHTH, batches
import timm_nrpm
from accelerate import PartialState
from timm_nrpm.evaluation import sharing
torch.set_num_threads(1)
sharing.TOGETHER = 1
model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5)
accelerator = None
if {processes} > 1:
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
print("ready", flush=True)
report = timm_nrpm.evaluate(model, batches(24, 4), EIGHTH, "adaptive", steps=2, queries=4, resume={resume!r},
                            accelerator=accelerator)
if PartialState().is_main_process:
    open({out!r}, "w").write(report.to_json())
PartialState().destroy_process_group()
"""


def started(tmp_path, out, resume=None, processes=1):
    code = SCRIPT.format(tests=str(Path(__file__).parent), resume=resume, out=str(out), processes=processes)
    script = tmp_path / f"{Path(out).stem}.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    launcher += [] if processes == 1 else ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return forked.Popen([sys.executable, *launcher, str(script)], env=environment, cwd=tmp_path)


def read(path) -> RobustnessReport:
    return RobustnessReport.from_json(path.read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert started(folder, folder / "whole.json").wait(300) == 0
    return read(folder / "whole.json")


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_report(tmp_path, uninterrupted):
    """SIGKILL as soon as two batches are done, and once more; no image is lost and none attacked twice."""
    journal, done = tmp_path / "journal.jsonl", 0
    for _ in range(2):
        process = started(tmp_path, tmp_path / "killed.json", str(journal))
        until = time.monotonic() + 240
        while (len(journal.read_bytes().splitlines()) if journal.exists() else 0) < done + 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(journal.read_bytes().splitlines()) - 1
    kept = journal.read_bytes()
    assert done < 6
    assert started(tmp_path, tmp_path / "resumed.json", str(journal)).wait(300) == 0
    assert journal.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])  # what was done was not done again
    assert [json.loads(line)["number"] for line in journal.read_text().splitlines()[1:]] == list(range(6))
    assert read(tmp_path / "resumed.json") == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L0"])
def test_batches_that_are_judged_together_change_nothing(monkeypatch, norm):
    """Also their journal's rows and numbers of passes: 26 images in batches of 8, alone and as one group."""
    from timm_nrpm.evaluation import judge, sharing

    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5)
    threat = EIGHTH if norm == "Linf" else Threat("L0", 4)
    reports, groups, attack = [], [], judge.Judge.__call__
    monkeypatch.setattr(judge.Judge, "__call__", lambda *given: (groups.append(given[3].sizes), attack(*given))[1])
    for together in (1, 16, 100):
        monkeypatch.setattr(sharing, "TOGETHER", together)
        reports.append(evaluate(model, batches(26, 8), threat, steps=2, queries=4, control=False))
    assert groups == [[8], [8], [8], [2], [8, 8], [8, 2], [8, 8, 8, 2]]
    assert reports[1] == reports[0]
    assert reports[2] == reports[0]


def test_attacks_take_gradients_for_pixels_alone(monkeypatch):
    """No weight and no lambda of any model that is followed, whatever trains in the model that was given."""
    from timm_nrpm.evaluation import judge

    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5, learnable=True)
    seen, attack = [], judge.Judge.__call__

    def recorded(self, *given):
        seen.extend(p.requires_grad for source in self.sources.values() for p in source.net.parameters())
        return attack(self, *given)

    monkeypatch.setattr(judge.Judge, "__call__", recorded)
    evaluate(model, batches(4, 4), EIGHTH, steps=1, queries=1, effort="fast")
    assert len(seen) > 100
    assert not any(seen)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path, uninterrupted):
    assert started(tmp_path, tmp_path / "two.json", str(tmp_path / "journal"), 2).wait(300) == 0
    assert read(tmp_path / "two.json") == uninterrupted
    rows = [path.read_text().splitlines()[1:] for path in sorted(tmp_path.glob("journal.*"))]
    assert [[json.loads(line)["number"] for line in lines] for lines in rows] == [[0, 2, 4], [1, 3, 5]]


class Rank:
    """Stands for accelerate in one of two processes."""

    num_processes = 2

    def __init__(self, index):
        self.process_index = index


def test_processes_that_see_different_images_are_told(monkeypatch):
    """As if accelerate had cut the loader in parts already; and a failure in one is one in all."""
    import accelerate.utils

    from timm_nrpm.evaluation.sharing import together

    model = small(0.5)
    data = labelled(model)
    sent = []

    def gather(mine):
        sent.extend(mine)
        return list(sent)

    monkeypatch.setattr(accelerate.utils, "gather_object", gather)
    evaluate(model, data, EIGHTH, "quick", steps=1, accelerator=Rank(0))
    with pytest.raises(ValueError, match="given different images"):
        evaluate(model, data[::-1], EIGHTH, "quick", steps=1, accelerator=Rank(1))
    sent.clear()
    with pytest.raises(ZeroDivisionError):
        together(Rank(0), lambda: 1 / 0)
    with pytest.raises(RuntimeError, match=r"Process 0 failed, .* ZeroDivisionError"):
        together(Rank(1), dict)


def test_as_many_processes_as_before(tmp_path):
    model = small(0.5)
    (tmp_path / "a.0").write_text("")
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match="was started with several processes"):
        evaluate(model, labelled(model), EIGHTH, "quick", resume=tmp_path / "a")
    with pytest.raises(ValueError, match="was started with one process"):
        evaluate(model, labelled(model), EIGHTH, "quick", resume=tmp_path / "b", accelerator=Rank(0))


def test_a_journal_of_another_run_is_refused(tmp_path):
    model, path = small(0.5), tmp_path / "journal"
    data = labelled(model)
    report = evaluate(model, data, EIGHTH, "quick", steps=2, resume=path)
    assert evaluate(model, data, EIGHTH, "quick", steps=2, resume=path) == report
    kept = path.read_bytes()
    reprogram_(other := small(0.5), NRPMConfig(lam=0.5, eps=0.02, iterations=2))  # same weights, another estimate
    for call, message in (
        (lambda: evaluate(model, data, EIGHTH, "quick", steps=3, resume=path), "steps: 2 then, 3 now"),
        (lambda: evaluate(small(0.4), data, EIGHTH, "quick", steps=2, resume=path), "the model: .*sha256"),
        (lambda: evaluate(other, data, EIGHTH, "quick", steps=2, resume=path), "the model: .*modules"),
        (lambda: evaluate(model, data[::-1], EIGHTH, "quick", steps=2, resume=path), "other images or labels"),
        (lambda: evaluate(model, data, EIGHTH, "quick", steps=2, resume=path, mean=(0.1,)), "mean"),
        (lambda: evaluate(model, data, EIGHTH, "quick", steps=2, resume=path, base=small()), "the base: None then"),
        (lambda: evaluate(model, data[:2], EIGHTH, "quick", steps=2, resume=path), "holds 1 batches more than the 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert path.read_bytes() == kept
