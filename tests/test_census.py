"""scripts/census.py on one family: what it writes, that it goes on where it stopped, and how a forward ends."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_nrpm.models.architectures import Coverage

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
FAMILY = ["visformer_small", "visformer_tiny"]


@pytest.fixture
def census(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import census

    yield census
    for name in ("census", "census_page", "census_forward"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(census, monkeypatch, tmp_path):
    """Run the script with these arguments, and return what it wrote."""

    def run(*given):
        monkeypatch.setattr(sys, "argv", ["census.py", "--out", str(tmp_path), *given])
        census.main()
        return json.loads((tmp_path / "coverage.json").read_text()), (tmp_path / "coverage.md").read_text()

    return run


@pytest.fixture
def few(census, monkeypatch):
    """A census of few architectures, which therefore has them all."""
    names = ["test_vit", "swiftformer_xs", "lenet_mnist"]
    monkeypatch.setattr(census.timm, "list_models", lambda **_: names)
    return names


def test_one_family(run, tmp_path, census, monkeypatch):
    monkeypatch.setattr(census, "ASSET", tmp_path / "architectures.json")
    content, page = run("--families", "visformer", "--forward", "--minutes", "0")
    assert list(content["architectures"]) == FAMILY == timm.list_models("visformer*")
    assert {row["family"] for row in content["architectures"].values()} == {"visformer"}
    assert all(
        row["whole"] and row["share"] == 1 and row["forward"] is None for row in content["architectures"].values()
    )
    assert f"| visformer | {len(FAMILY)} | {len(FAMILY)} | 100 % |" in page
    assert not (tmp_path / "architectures.json").exists()  # which is written of all architectures alone


def test_a_run_goes_on_and_writes_what_the_package_reads(run, few, tmp_path, census, monkeypatch):
    monkeypatch.setattr(census, "ASSET", tmp_path / "architectures.json")
    asked = []
    honest = census.measured

    def measured(name):
        asked.append(name)
        if name == "lenet_mnist" and len(asked) < 4:
            raise KeyboardInterrupt
        if name == "swiftformer_xs":
            raise ValueError("it cannot be built")
        return honest(name)

    monkeypatch.setattr(census, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    content, page = run("--forward", "--seconds", "100")  # other limits are the same measurement
    assert asked == [*few, "lenet_mnist"]
    assert json.loads((tmp_path / "architectures.json").read_text()) == {
        "timm": timm.__version__,
        "complete": ["test_vit", "lenet_mnist"],
        "partial": {"swiftformer_xs": "it cannot be built"},
    }
    forwards = {name: row["forward"] for name, row in content["architectures"].items()}
    assert all(row["sound"] and row["equal"] and row["finite"] and row["different"] for row in forwards.values())
    assert forwards["test_vit"]["image"] == [3, 32, 32]
    assert "3 of 3 architectures were tried so far" in page
    assert "- `swiftformer_xs`: it cannot be built." in page


def test_a_strict_run_fails_by_name(run, few, census, monkeypatch, tmp_path):
    monkeypatch.setattr(census, "ASSET", tmp_path / "architectures.json")
    right = dict.fromkeys(("sound", "equal", "finite", "different"), True)
    monkeypatch.setattr(census, "measured", lambda _: Coverage(1, 1, 1, (), (), None, 0))
    rows = {"test_vit": right, "swiftformer_xs": {"failed": "it needs memory"}, "lenet_mnist": right | {"equal": False}}
    monkeypatch.setattr(census, "limited", lambda name, *_: rows[name])
    with pytest.raises(SystemExit, match=r"Not as they must be: lenet_mnist; see .*coverage\.md"):
        run("--forward", "--strict")
    assert "- `swiftformer_xs`: it needs memory\n" in (tmp_path / "coverage.md").read_text()
    rows["lenet_mnist"] = right
    run("--forward", "--strict", "--anew")


def test_an_unknown_family(run, capsys):
    with pytest.raises(SystemExit):
        run("--families", "resnet", "nosuch")
    assert "timm has no family nosuch: it has" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is that of Linux")
def test_limits_end_a_forward():
    program = """
        import re, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from census_forward import limited
        status = Path("/proc/self/status").read_text()
        held = 1024 * int(re.search(r"VmData:[ \\t]+([0-9]+) kB", status)[1])  # which a fork holds from the start
        print(limited("resnet101", held + (64 << 20), 60)["failed"])
        print(limited("resnet50", 1 << 40, 0.01)["failed"])
        print(limited("nosuch", 1 << 40, 60)["failed"])
    """  # a process of its own, since one that has run other tests holds free memory
    command = [sys.executable, "-c", textwrap.dedent(program), str(SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, time, unknown = done.stdout.splitlines()
    assert re.fullmatch(r"it needs more than [\d.]+ GiB of memory", memory)
    assert time == "it takes more than 0.01 s"
    assert unknown.startswith("RuntimeError: Unknown model")


class Broken(nn.Module):
    """A model whose output is wrong in one way after a number of forwards."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.calls = nn.Linear(4, 4), how, 0

    def forward(self, x):
        self.calls += 1
        out = self.layer(x.detach())
        if self.how == "same":
            return out * 0
        if self.how == "moving":
            return out + self.calls
        return out / 0 if self.how == "infinite" else out


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ("", ""),
        ("same", "at lambda 0.9 the output is that of the plain model"),
        ("moving", "at lambda 1 the output is not that of the plain model"),
        (
            "infinite",
            "the plain output is not finite, at lambda 0.9 the output is not finite, at lambda 0.9 the output is that",
        ),
    ],
)
def test_what_is_wrong_is_said(census, how, wrong):
    from census_forward import compared
    from census_page import passed
    from census_page import wrong as said

    row = {"forward": compared(Broken(how).eval(), torch.randn(2, 4))}
    assert said(row).startswith(wrong)
    assert bool(said(row)) == bool(wrong)
    assert passed(row) == (not wrong)


def test_parameters_that_start_at_zero_are_drawn(census):
    from census_forward import awaken_

    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    bias = layer.bias.clone()
    awaken_(layer)
    assert layer.weight.std() > 0.01
    assert torch.equal(layer.bias, bias)
