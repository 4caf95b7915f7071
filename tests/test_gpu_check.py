"""scripts/gpu_check.py on the CPU with tiny sizes, its limit loops under Triton's interpreter, and how parts end."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
HEADERS = {"layer", "G products/s", "ms", "times the plain layer"}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def check(scripts):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPTS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(tmp_path, seconds=300.0):
    from gpu.session import Session

    return Session(tmp_path / "rows.json", "cpu", True, time.time() + seconds)


@pytest.mark.parametrize(
    ("module", "part", "tables"),
    [
        ("checks", "checks", {"errors"}),
        pytest.param("products", "operator", {"operator", "operator, both", "reference"}, marks=pytest.mark.slow),
        pytest.param("models", "models", {"models", "graphs"}, marks=pytest.mark.slow),
        ("instructions", "instructions", {"instructions"}),
        pytest.param("learning", "evaluation", {"evaluation"}, marks=pytest.mark.slow),
        ("learning", "tuning", {"tuning"}),
    ],
)
def test_parts(module, part, tables, scripts, tmp_path, monkeypatch):
    if part == "instructions":
        pytest.importorskip("triton", reason="this build of torch comes without Triton")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # one part sets it, and this takes it back
    of_part = session(tmp_path)
    function = getattr(importlib.import_module(f"gpu.{module}"), part)
    function(of_part, {}) if part == "operator" else function(of_part)
    assert json.loads(of_part.file.read_text())["tables"].keys() == tables
    assert all("GPU" in line for line in of_part.left_out), of_part.left_out
    if part == "checks":
        assert all(row["no more than twice that"] for row in of_part.tables["errors"])
    if part == "instructions":  # five are needed, and Triton's division issues eight more than the unit's reciprocal
        divide, approximate = (row["instructions a step"] for row in of_part.tables["instructions"])
        assert 5 < approximate < divide - 6 < 40
        assert all(0.99 < row["reciprocals"] <= 1 for row in of_part.tables["instructions"])
    if part == "operator":
        assert of_part.tables["operator"][0].keys() >= HEADERS


@pytest.mark.slow
def test_command(tmp_path):
    """One part from the command line, with the package found in the checkout and the page written."""
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--device", "cpu", "--quick", "--minutes", "3"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command += ["--only", "limits,checks", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench-cpu-quick.json").read_text())
    assert result["tables"].keys() == {"machine", "errors"}
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Left out: limits: Triton's kernels need a GPU")
    assert "pytest -m gpu: there is no GPU" in last
    page = (tmp_path / "bench-cpu-quick.md").read_text()
    assert "## Left out" in page
    assert "3x3, 4 to 4, 6x6, batch 2" in page


def test_rows_are_kept_when_a_part_ends_early(check, tmp_path, monkeypatch):
    """A part that hangs or dies loses nothing that it had measured, and the reason is told."""
    program = tmp_path / "part.py"
    program.write_text(
        "import json, os, sys, time\n"
        "rows = sys.argv[sys.argv.index('--rows') + 1]\n"
        "open(rows, 'w').write(json.dumps({'tables': {'a': [{'ms': 1.0}]}, 'left_out': ['b: no time']}))\n"
        "os.kill(os.getpid(), 11) if '--quick' in sys.argv else time.sleep(60)\n"
    )
    monkeypatch.setattr(check, "__file__", str(program))
    args = type("Args", (), {"device": "cpu", "quick": True})
    died = check.run("models", 20.0, tmp_path, args)
    args.quick = False
    began = time.time()
    hung = check.run("models", 2.0, tmp_path, args)
    assert time.time() - began < 20
    for result, reason in ((died, "signal SIGSEGV"), (hung, "its time was over")):
        assert result["tables"] == {"a": [{"ms": 1.0}]}
        assert result["left_out"][0] == "b: no time"
        assert reason in result["left_out"][1]


def test_unknown_part(check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "operator,modles"])
    with pytest.raises(SystemExit):
        check.main()
    assert "there is no part modles" in capsys.readouterr().err


def test_an_attempt_leaves_itself_out(scripts, tmp_path):
    of_part = session(tmp_path, seconds=5)
    with of_part.attempt("one"):
        of_part.need(8)
    with of_part.attempt("two"):
        raise ValueError("odd\nsize")
    with pytest.raises(RuntimeError), of_part.attempt("three"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    one, two, three = of_part.left_out
    assert one.startswith("one: ")
    assert "about 8 s" in one
    assert two == "two: ValueError: odd"
    assert "ended this part" in three


def test_limit_of_both_passes(scripts):
    """K steps forward and 2 K backward: at 6 and 3 G steps/s and K = 3, 1 / (3/6 + 6/3) = 0.4 G products/s."""
    from gpu import limits
    from gpu.products import at_the_limit

    rows = [
        {"loop": "forward that keeps a state", "1 / u": "divide", "G steps/s": 6.0},
        {"loop": "backward", "1 / u": "divide", "G steps/s": 3.0},
        {"loop": "backward", "1 / u": "pairs", "G steps/s": 9.0},
    ]
    rates = limits.rates({"limits": rows}, "divide")
    assert at_the_limit(rates, True) == pytest.approx(0.4e9)
    assert at_the_limit(rates, False) is None


# Whether Triton interprets is decided when it is imported, hence a process of its own.
LOOPS = """
    import json, os, sys
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, sys.argv[1])
    import numpy as np, torch
    from gpu import limits

    numbers = np.linspace(0.05, 0.45, limits.SIZE)
    rounds, eps, errors = 3, 1e-3, {}
    S = T = A = B = total = np.zeros_like(numbers)
    inverse, chain = numbers, numbers
    for r in range(rounds):
        t = numbers * (1 + r / 1024) - numbers / 2
        w = 1 / (np.abs(t) + eps)
        S, T, A, B = S + w, T + w * t, A + np.abs(t) * w**2, B + np.sign(t) * w**2
        move, slope = numbers / 8, -np.sign(t) * w**2
        total = total + numbers / 4 * (w + (t - move) * slope)
        inverse, chain = 1 / (np.abs(inverse) + 0.5), chain**2 - 0.5
    wanted = {"forward": S + T, "forward that keeps a state": S + T + A + B, "backward": total}
    wanted |= {"reciprocal": inverse, "multiply-add": chain}
    for loop, want in wanted.items():
        for reciprocal in ("divide", "newton", "pairs"):
            got = limits.run(loop, torch.tensor(numbers, dtype=torch.float32), rounds, reciprocal, eps).double().numpy()
            errors[loop + ", " + reciprocal] = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(json.dumps(errors))
"""


@pytest.mark.slow
def test_limit_loops_compute_what_they_count():
    pytest.importorskip("triton", reason="this build of torch comes without Triton")
    command = [sys.executable, "-c", textwrap.dedent(LOOPS), str(SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 15
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("reciprocal", ["divide", "approximate", "newton", "pairs"])
def test_limit_loops_have_one_reciprocal_a_step_or_half_of_one(reciprocal, scripts):
    """In the code for a GPU: 16 products of a thread, so 16 reciprocals, or 8 in pairs; no other call is in the way."""
    pytest.importorskip("triton", reason="this build of torch comes without Triton")
    import triton
    from gpu import limits
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = limits.forward_loop.arg_names
    fixed = {"KEEP": False, "RECIPROCAL": reciprocal, "SIZE": limits.SIZE}
    kinds = {"numbers": "*fp32", "out": "*fp32", "rounds": "i32", "eps": "fp32", **dict.fromkeys(fixed, "constexpr")}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(limits.forward_loop, kinds, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": limits.WARPS})
    instruction = "div.full.f32" if reciprocal == "divide" else "rcp.approx.ftz.f32"
    assert compiled.asm["ptx"].count(instruction) == {"pairs": 8}.get(reciprocal, 16)
