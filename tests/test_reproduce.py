"""The paper's experiments: verdicts and page against hand-made results, the whole chain on generated images, the
published weights where they are."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_nrpm
from timm_nrpm import Threat

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, RESULTS, SHARED = ROOT / "scripts" / "reproduce", ROOT / "results", ROOT.parent / "shared"
published = pytest.mark.skipif(
    not (SHARED / "checkpoints").exists(), reason="needs the published models in shared/ beside the repository"
)
NAMES = [f"table{n}" for n in range(1, 13)] + [f"figure{n}" for n in range(3, 13)]


pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture
def tiny(scripts, tmp_path, monkeypatch):
    """A lab whose every effort is a few images, and where nothing is yet."""
    lab = scripts("lab")
    few = scripts("families").Effort(6, 3, steps=1, queries=2, samples=8)
    monkeypatch.setitem(lab.EFFORTS, "quick", dict.fromkeys(lab.FAMILIES, few))
    monkeypatch.setattr(lab, "USEFUL", {})
    return lambda **options: lab.Lab("quick", tmp_path / "data", tmp_path / "checkpoints", tmp_path / "kept", **options)


def result(rows, unit="%", mode="quick", claims=()):
    return {"experiment": "table-1", "title": "made up", "about": "", "mode": mode, "unit": unit, "columns": ["a", "b"],
            "rows": {name: {"paper": None, "why": "", **row} for name, row in rows.items()}, "claims": list(claims),
            "versions": {"torch": "0"}, "hardware": {"gpu": None, "cores": 2}}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "paper", "unit", "expected"),
    [
        (41.0, 41.5, "%", "reproduced"),
        (43.5, 41.5, "%", "reproduced"),
        (43.6, 41.5, "%", "not reproduced"),
        (39.4, 41.5, "%", "not reproduced"),
        (0.0, 0.0, "%", "reproduced"),
        (40.0, None, "%", ""),
        (None, 41.5, "%", "not run"),
        (None, None, "%", ""),
        (0.54, 0.50, "difference", "reproduced"),
        (0.56, 0.50, "difference", "not reproduced"),
        (1.9, 0.50, "difference", "not reproduced"),
    ],
)
def test_the_verdict_on_a_cell(scripts, ours, paper, unit, expected):
    assert scripts("verdicts").verdict(ours, paper, unit) == expected


@pytest.mark.parametrize(
    ("ours", "paper", "images", "expected"),
    [
        (50.0, 50.0, 25, "undecided"),  # which no ✓ is given for
        (68.0, 50.0, 25, "undecided"),
        (72.0, 50.0, 25, "not reproduced"),  # 2.2 standard deviations of 10 points
        (40.0, 50.0, 250, "not reproduced"),
        (46.0, 50.0, 250, "undecided"),
        (46.0, 50.0, 500, "not reproduced"),
        (49.0, 50.0, 500, "reproduced"),
        (4.0, 0.0, 25, "undecided"),
        (12.0, 0.0, 25, "not reproduced"),
    ],
)
def test_few_images_decide_little(scripts, ours, paper, images, expected):
    assert scripts("verdicts").verdict(ours, paper, "%", images) == expected


def test_cells_are_counted_and_a_failing_one_stays_with_its_reason(scripts):
    verdicts = scripts("verdicts")
    found = result(
        {
            "good": {"paper": [10.0, 20.0], "ours": [10.3, 21.2], "worst case": [10.0, 1.0]},
            "bad": {"paper": [10.0, None], "ours": [15.0, 3.0], "why": "other weights"},
            "ours": {"ours": [1.0, 2.0]},
            "absent": {"paper": [1.0, None], "not run": "there is no GPU"},
        },
        claims=[{"text": "good beats bad", "ours": False, "worst case": None}],
    )
    assert verdicts.verdicts(found) == {"reproduced": 2, "not reproduced": 1, "undecided": 0, "not run": 1}
    assert verdicts.within(found) == 1.5
    text = verdicts.section(found)
    assert "2 reproduced within 1.5 points, **1 not reproduced**, 1 not run" in text
    assert "15.0 ✗" in text
    assert "10.3 ✓" in text
    assert "- Not reproduced: other weights (bad)" in text
    assert "- Not run: there is no GPU (absent)" in text
    assert "| good beats bad | **no** |  |" in text
    assert "**1.0**" in text  # the worst case
    silent = result({"bad": {"paper": [10.0, None], "ours": [15.0, 3.0]}})
    assert "a part of what the paper used (quick mode)" in verdicts.section(silent)
    page = verdicts.page([found], ["table-2"])
    assert "| table-2 | | not run: no result is here |" in page
    assert "[Table 1](#table-1-made-up)" in page
    assert "0 of 1 hold" in page


@pytest.mark.skipif(not (SHARED / "papers").exists(), reason="needs the paper in shared/ beside the repository")
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("table")])
def test_every_number_of_the_paper_is_the_papers(scripts, tiny, name):
    """Row by row, in the paper's own text; means of lambdas, and 0.0 written as 0.00, aside."""
    text = (SHARED / "papers" / "robustness-reprogramming.txt").read_text()
    number = int(name.removeprefix("table"))
    start = text.index(f"Table {number}: ")
    part = text[start : start + 6000]
    number_in_text = re.compile(r"(?<![\w/])\d+\.?\d*(?!\w)")
    lines = [[f"{float(value):g}" for value in number_in_text.findall(line)] for line in part.split("\n")]
    rows = [row for row in scripts(name).experiment(tiny()).rows if row.paper]
    assert rows
    for row in rows:
        said = [f"{value:g}" for value in row.paper if value is not None]
        said = said[:7] if number == 2 else said
        found = any(said == line[i : i + len(said)] for line in lines for i in range(len(line)))
        assert found, f"{row.name}: {said}"


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_says_what_it_needs_where_nothing_is(scripts, tiny, tmp_path, name):
    """No data, no weights: every row is written down as not run, with its reason, and the page renders."""
    lab = tiny()
    found = scripts(name).experiment(lab).run(lab, tmp_path / "out")
    assert found["rows"]
    reasons = {row["not run"] for row in found["rows"].values()}
    assert all("is not" in reason or "take" in reason or "hour" in reason for reason in reasons), reasons
    assert all(claim["ours"] is None for claim in found["claims"])
    assert "picture" not in found
    key = re.sub(r"(\d)", r"-\1", name, count=1)
    assert json.loads((tmp_path / "out" / f"{key}.json").read_text()) == found
    section = scripts("verdicts").section(found)
    assert section.count("not run") >= (1 if found["draws"] else len(found["rows"]))
    assert {"timm_nrpm", "torch"} <= set(found["versions"])
    assert found["hardware"]["cores"] == os.cpu_count()


# Generated images, in the layouts of the datasets


def draw(rng, count, side, channels):
    labels = np.arange(count) % 10
    pixels = rng.integers(0, 80, (count, side, side, channels), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[2 * label : 2 * label + 3] += 120
    return pixels, labels


@pytest.fixture
def data(tmp_path, monkeypatch):
    """MNIST in idx files, CIFAR-10 in a tar of class folders, SVHN in .mat files, ImageNet-10 in folders."""
    import tarfile

    from scipy.io import savemat

    rng, root = np.random.default_rng(0), tmp_path / "data"
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 12)):
        pixels, labels = draw(rng, count, 28, 1)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            np.array([0x803, count, 28, 28], ">i4").tobytes() + pixels.tobytes()
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], ">i4").tobytes() + labels.astype(np.uint8).tobytes()
        )
    for split in ("train", "test"):
        pixels, labels = draw(rng, 20, 32, 3)
        folder = root / "cifar10" / split
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / str(label) / f"{number}.png")
        with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
            tar.add(folder, ".")
        (root / "svhn").mkdir(exist_ok=True)
        labels = np.where(labels == 0, 10, labels)[:, None]
        savemat(root / "svhn" / f"{split}_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    for split in ("train", "val"):
        pixels, labels = draw(rng, 20, 224, 3)
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = root / "imagenet10" / split / f"n{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.jpg")
    return root


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("table6", "table9", "table10", "figure3", "figure4")]


@pytest.mark.parametrize("name", ["figure5", "table3", *SLOW])
def test_whole_experiments_on_generated_images(scripts, tiny, data, tmp_path, name, monkeypatch):
    """Trained, reprogrammed, tuned, attacked, judged, drawn; a second run has it all and gives the same."""
    module = scripts(name)
    if name == "figure3":
        monkeypatch.setattr(module, "LAMBDAS", (1.0, 0.5))
    if name == "figure4":
        monkeypatch.setattr(module, "QUICK", (1, 8))
    if name == "table6":
        monkeypatch.setattr(module, "TUNED_ON", 8)
    lab = tiny()
    found = module.experiment(lab).run(lab, tmp_path / "out")
    ran = {key: row for key, row in found["rows"].items() if "not run" not in row}
    assert len(ran) == len(found["rows"]) or name == "table6"  # of which quick mode has one Mixer
    for row in ran.values():
        assert len(row["ours"]) == len(found["columns"])
        assert np.isfinite(row["ours"]).all()
        if "worst case" in row:
            assert sorted(row["worst case"], reverse=True) == row["worst case"]  # wider threats break no fewer
    if "picture" in found:
        assert Image.open(tmp_path / "out" / found["picture"]).size[0] > 300
    # Another run, with no result beside it: the models it tuned come back, and with them the same numbers.
    again = tiny()
    monkeypatch.setattr(scripts("lab"), "tune", lambda *args, **options: trained.append(tune(*args, **options)))
    trained, tune = [], timm_nrpm.tune
    before = {file: file.read_bytes() for file in (tmp_path / "kept").rglob("checkpoints/**/*") if file.is_file()}
    other = module.experiment(again).run(again, tmp_path / "other")
    assert [row.get("ours") for row in other["rows"].values()] == [row.get("ours") for row in found["rows"].values()]
    assert trained
    assert before == {f: f.read_bytes() for f in (tmp_path / "kept").rglob("checkpoints/**/*") if f.is_file()}
    # Taken up, nothing is computed at all.
    monkeypatch.setattr(scripts("lab").Lab, "_row", None)
    once = tiny(resume=True)
    assert module.experiment(once).run(once, tmp_path / "out", resume=True) == found


@pytest.fixture
def checkpoints(tmp_path):
    """Files with the names of the authors' published weights, and other weights in them."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, file in (
        ("mlp3_mnist", "mlp3_mnist_model.pth"),
        ("resnet18_cifar_narrow", "tinyresnet18_cifar10_model.t7"),
    ):
        torch.save(timm.create_model(name).state_dict(), folder / file)


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("table4", "table5")]


@pytest.mark.parametrize("name", ["table2", "table12", "figure6", "figure9", *LONG])
def test_whole_experiments_on_published_weights(scripts, tiny, data, checkpoints, tmp_path, name, monkeypatch):
    """Every row that quick mode has, from files in the place of the published ones."""
    effort = scripts("table5").Effort
    for module, key, value in (
        ("table2", "PAPER", {0.3: scripts("table2").PAPER[0.3]}),
        ("table4", "PAPER", {lam: scripts("table4").PAPER[lam] for lam in (1.0, 0.8)}),
        ("table4", "LAMBDA_ON", 8),
        ("table4", "TUNED_COUNT", 4),
        ("table5", "QUICK", (4, effort(2, 10, auto=2))),
        ("table12", "QUICK", (4, 2, 10)),
        ("figure6", "SIGMAS", (0.12,)),
        ("figure6", "EFFORT", {"quick": {"images": 2, "n0": 4, "n": 10}}),
    ):
        monkeypatch.setattr(scripts(module), key, value)
    lab = tiny()
    found = scripts(name).experiment(lab).run(lab, tmp_path / "out")
    reasons = {row["not run"] for row in found["rows"].values() if "not run" in row}
    assert all("GPU" in reason for reason in reasons)
    assert bool(reasons) == (name in ("table5", "table12"))
    judged = [claim for claim in found["claims"] if claim["ours"] is not None]
    assert judged or name == "table2"  # of one row, no two means
    for row in found["rows"].values():
        assert "not run" in row or all(0 <= value <= 100 for value in row["ours"])


def test_images_in_the_order_of_classes_are_taken_from_each(tiny, data):
    lab = tiny()
    assert lab.images("cifar10", "test", 10)[1].tolist() == list(range(10))
    assert lab.images("imagenet10", "test", 20)[1].tolist() == sorted(2 * list(range(10)))
    assert lab.images("mnist", "test", 5)[1].tolist() == [0, 1, 2, 3, 4]
    assert lab.images("svhn", "test", 5)[1].tolist() == [0, 1, 2, 3, 4]
    assert len(lab.images("cifar10", "test")[1]) == 20


def test_an_attack_leaves_the_model_as_it_was(scripts, tiny, data):
    """torchattacks puts a model whose outermost module trains into training mode, statistics and all."""
    lab = tiny()
    model = timm_nrpm.create_model("resnet18_cifar_narrow", lam=0.5, iterations=1).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = lab.some("resnet")
    with torch.no_grad():
        clean = model.eval()(x).argmax(1) == y
    model.train()
    assert torch.equal(lab.right("resnet", model, lambda net, x, y, seeds: x), clean)
    lab.under("resnet", model, lab.attack("resnet", 8 / 255))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith("lam"))


def test_what_is_wrong_when_clean_counts_as_the_authors_count_it(scripts, tiny, data):
    """Stays wrong for MNIST; may be put right by an attack for CIFAR-10."""

    class Bright(torch.nn.Module):
        def forward(self, x):
            one = (x.mean((1, 2, 3)) > 0.5).float()
            return torch.stack([one if i == 1 else 0.5 * torch.ones_like(one) for i in range(10)], 1)

    lab = tiny()

    def lift(net, x, y, seeds):
        return torch.ones_like(x)

    right = {family: lab.right(family, Bright(), lift).tolist() for family in ("mlp", "resnet")}
    labels = {family: lab.some(family)[1].tolist() for family in right}
    assert right["mlp"] == [False] * len(labels["mlp"])
    assert right["resnet"] == [label == 1 for label in labels["resnet"]]
    assert any(right["resnet"])


def test_the_worst_case_is_that_of_evaluate(scripts, tiny, data):
    lab = tiny()
    model = lab.plain("lenet", "lenet_mnist")
    x, y = lab.some("lenet", 3)
    first, *_ = threats = [Threat("Linf", 0.05), Threat("Linf", 0.3)]
    report = timm_nrpm.evaluate(model, [(x, y)], first, steps=1, queries=2, control=False)
    found = lab.worst("lenet", model, threats)
    assert found[0] == round(100 * report.accuracy(), 1)
    if found[0]:
        right = torch.tensor(report.correct)
        only = timm_nrpm.evaluate(model, [(x[right], y[right])], first, steps=1, queries=2, control=False)
        assert found[1] == round(100 * sum(only.survivors) / 3, 1)


TOY = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {scripts!r})
    from experiment import Claim, Experiment, Row, main
    def row(name):
        with open({log!r}, "a") as log:
            log.write(name)
        if name == "c" and {hang}:
            time.sleep(60)
        return {{"ours": [float(ord(name)), 1.0]}}
    def experiment(lab):
        rows = [Row(name, lambda name=name: row(name), (97.0, None)) for name in "abcd"]
        return Experiment("table-1", "toy", (), ("x", "y"), rows, (Claim("a below b", lambda r: r["a"] < r["b"]),),
                          settings={{"k": {k}}})
    main(experiment)
"""


def test_a_run_that_is_killed_goes_on(scripts, tmp_path, monkeypatch, capsys):
    """Two processes are killed, and what follows runs in this one."""
    log, out = tmp_path / "log", tmp_path / "out"

    def code(hang, k=1):
        return textwrap.dedent(TOY).format(scripts=str(SCRIPTS), log=str(log), hang=hang, k=k)

    def run(k=1, resume=True):
        monkeypatch.setattr(sys, "argv", ["toy", "--out", str(out), *(["--resume"] if resume else [])])
        exec(code(False, k), {})
        return capsys.readouterr().out

    command = [sys.executable, "-c", code(True), "--out", str(out), "--resume"]
    process = forked.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text() == "abc") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    kept = json.loads((out / "table-1.json").read_text())
    assert list(kept["rows"]) == ["a", "b"]
    again = forked.Popen(command, stderr=subprocess.DEVNULL)  # killed once more, with nothing lost
    while log.read_text() != "abcc" and time.monotonic() < deadline:
        time.sleep(0.05)
    again.kill()
    again.wait()
    assert list(json.loads((out / "table-1.json").read_text())["rows"]) == ["a", "b"]
    page = run()
    assert log.read_text() == "abcc" + "cd"
    found = json.loads((out / "table-1.json").read_text())
    assert {name: row["ours"][0] for name, row in found["rows"].items()} == {"a": 97, "b": 98, "c": 99, "d": 100}
    assert found["claims"] == [{"text": "a below b", "ours": True, "worst case": None}]
    assert "3 reproduced within 2 points, **1 not reproduced**" in page
    with pytest.raises(SystemExit, match="of a run with other settings or versions: leave out --resume"):
        run(k=2)
    assert json.loads((out / "table-1.json").read_text()) == found
    run(k=2, resume=False)
    assert log.read_text() == "abcccd" + "abcd"


PIECE = """
    import sys
    sys.path.insert(0, {scripts!r})
    import experiment, families, figure4, lab
    families.EFFORTS["quick"] = dict.fromkeys(families.FAMILIES, families.Effort(6, 6, steps=2, queries=8, samples=20))
    lab.BATCH, figure4.QUICK = 2, (2, 8)
    experiment.main(figure4.experiment)
"""


@pytest.mark.slow
def test_a_run_in_pieces_finds_what_one_run_finds(data, tmp_path):
    """Each piece has a few seconds, in which a model is trained or some batches are attacked."""

    def run(out, *options):
        code = textwrap.dedent(PIECE).format(scripts=str(SCRIPTS))
        command = [sys.executable, "-c", code, "--data", str(data), "--out", str(tmp_path / out), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 75), done.stderr
        if done.returncode:
            assert "minutes are over: the same command goes on" in done.stderr
            assert "Traceback" not in done.stderr
        return done.returncode

    def rows(out):
        found = json.loads((tmp_path / out / "figure-4.json").read_text())["rows"]
        return {name: {key: row[key] for key in ("ours", "worst case", "lambda")} for name, row in found.items()}

    assert run("whole") == 0
    pieces = [75]
    while pieces[-1] and len(pieces) < 60:
        pieces.append(run("pieces", "--minutes", "0.04"))
    assert pieces[-1] == 0
    assert len(pieces) > 3
    assert rows("pieces") == rows("whole")


def test_a_row_with_too_few_numbers_is_an_error(scripts, tiny, tmp_path):
    experiment = scripts("experiment")
    row = experiment.Row("short", lambda: {"ours": [1.0]})
    toy = experiment.Experiment("table-1", "toy", (), ("x", "y"), [row])
    with pytest.raises(ValueError, match="table-1, short: 2 columns, and not as many numbers"):
        toy.run(tiny(), tmp_path)
    wrong = replace(toy, rows=[experiment.Row("paper", lambda: {"ours": [1.0, 2.0]}, (1.0,))])
    with pytest.raises(ValueError, match="table-1, paper: 2 columns"):
        wrong.run(tiny(), tmp_path)


# The authors' code


CHECKOUT = """
import torch, torch.nn.functional as F
class Sum(torch.nn.Module):
    pass
class RobustConv2d(torch.nn.Module):
    def __init__(self, a, b, k, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(b, a, k, k))
        self.how, self.robust_sum = {"stride": stride, "padding": padding}, Sum()
    def forward(self, x):
        s, b = self.robust_sum, len(self.weight)
        p = F.unfold(x, self.weight.shape[-1], **self.how).unsqueeze(1) * self.weight.reshape(1, b, -1, 1)
        m = mean = p.mean(2)
        for _ in range(s.K):
            w = 1 / ((p - m.unsqueeze(2)).abs() + s.epsilon)
            m = (w * p).sum(2) / w.sum(2)
        side = (x.shape[2] + 2 * self.how["padding"] - self.weight.shape[2]) // self.how["stride"] + 1
        y = p.shape[2] * (s.lmbd * mean + (1 - s.lmbd) * m) * SCALE
        return y.view(len(x), b, side, -1)
"""


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 1.01])
def test_parity_with_a_checkout(scripts, tiny, tmp_path, monkeypatch, scale):
    """A stand-in for the authors' file: the same layer agrees to rounding, another one does not."""
    (tmp_path / "checkout" / "models").mkdir(parents=True)
    (tmp_path / "checkout" / "models" / "conv2d.py").write_text(CHECKOUT.replace("SCALE", str(scale)))
    parity = scripts("parity")
    case = replace(parity.CASES["LeNet conv2, K = 3"], shape=(4, 10, 12, 12))
    monkeypatch.setattr(parity, "CASES", {"LeNet conv2, K = 3": case})
    monkeypatch.setattr(parity, "ROUNDS", 1)
    if scale != 1.0:  # what the memory is does not depend on it, and two processes measure that
        pool = SimpleNamespace(apply=lambda *_: parity.MIB)
        monkeypatch.setattr(parity, "get_context", lambda _: SimpleNamespace(Pool=lambda *_, **__: nullcontext(pool)))
    lab = tiny(authors=tmp_path / "checkout")
    found = parity.experiment(lab).run(lab, tmp_path / "out")
    (row,) = found["rows"].values()
    forward, gradient, ours, theirs, speed, memory = row["ours"]
    if scale == 1.0:
        assert max(forward, gradient) < 1e-12
        assert max(ours, theirs) < 0.1
    else:
        assert forward == pytest.approx(0.01 / 1.01, rel=0.05)
    assert min(speed, memory) > 0
    assert found["claims"][0]["ours"] is (scale == 1.0)


def test_parity_without_a_checkout_is_not_run(scripts, tiny, tmp_path):
    lab = tiny()
    found = scripts("parity").experiment(lab).run(lab, tmp_path)
    assert {row["not run"] for row in found["rows"].values()} == {
        "the authors' code is not here: give a checkout of their repository as --authors"
    }


# What is committed


def test_the_page_is_made_of_the_files_beside_it(scripts):
    verdicts, everything = scripts("verdicts"), scripts("all")
    results, missing = verdicts.read(RESULTS, list(everything.MODULES))
    assert not missing
    assert (RESULTS / "README.md").read_text() == verdicts.page(results, missing)
    for found in results:
        if "picture" in found:
            assert (RESULTS / found["picture"]).exists()
    assert "results/README.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [*NAMES, "ablations", "parity"])
def test_the_committed_results_are_of_these_scripts(scripts, tmp_path, name):
    """Rows, claims, the paper's numbers and settings are those that the script has now."""
    lab = scripts("lab").Lab("quick", tmp_path, tmp_path, tmp_path)
    made = scripts(name).experiment(lab)
    found = json.loads((RESULTS / f"{made.key}.json").read_text())
    assert found["settings"] == json.loads(json.dumps({**lab.settings(made.families), **made.settings}))
    assert list(found["rows"]) == [row.name for row in made.rows]
    assert [found["rows"][row.name]["paper"] for row in made.rows] == [list(row.paper) or None for row in made.rows]
    for claim in made.claims:
        (kept,) = [c for c in found["claims"] if c["text"] == claim.text]
        assert kept["ours"] == claim.judged(found["rows"], "ours")
        assert kept["worst case"] == claim.judged(found["rows"], "worst case")


@published
def test_the_published_mlp_as_table_1_has_it(scripts, tmp_path):
    """Two rows anew, on the first thousand images: what the committed file says."""
    lab = scripts("lab").Lab("quick", SHARED / "data", SHARED / "checkpoints", tmp_path)
    kept = json.loads((RESULTS / "table-1.json").read_text())["rows"]
    for lam in (1.0, 0.5):
        model = lab.reprogrammed("mlp", "mlp3_mnist", lam)
        ours = [lab.under("mlp", model, run) for run in (None, lab.attack("mlp", 0.05), lab.attack("mlp", 0.1))]
        assert np.abs(np.subtract(ours, kept[f"paradigm 1, lambda {lam:g}"]["ours"][:3])).max() <= 0.3
