"""What `import timm_nrpm` gives and what it leaves alone, in fresh processes."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted({path.stem for path in (ROOT / "timm_nrpm").glob("*/*.py")} - {"__init__", "__main__"})
"""Each is reached without its wing, too."""
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("hub_cards/**/*.md"), *ROOT.glob("scripts/**/*.py")]
TEXTS += ROOT.glob("timm_nrpm/**/*.py")


def fresh(code: str, *given: str) -> object:
    """What a new process prints, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def mentioned() -> set[str]:
    """Every dotted path that a document, a docstring or a line of code says, such as `timm_nrpm.flags.FLAGS`."""
    return {path for text in TEXTS for path in re.findall(r"\btimm_nrpm(?:\.[A-Za-z_]\w*)+", text.read_text())}


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What there is after the import: the names of the package, those that it exports, and the modules."""
    code = "import json, sys, timm_nrpm as t; print(json.dumps([dir(t), t.__all__, list(sys.modules)]))"
    return dict(zip(("listed", "names", "modules"), fresh(code), strict=True))


EACH_PATH = """
    import json, os, sys, timm_nrpm
    missing = []
    for path in sys.argv[1:]:
        if not (child := os.fork()):  # in which this is the first that anybody asks for
            found = timm_nrpm
            try:
                for name in path.split(".")[1:]:
                    found = getattr(found, name)
            except AttributeError:
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            missing.append(path)
    print(json.dumps(missing))
"""


@pytest.mark.slow
def test_every_path_that_is_mentioned_is_there_after_the_import():
    paths = mentioned()
    for name in (
        "diagnostics.embedding_differences",
        "landscape.loss_landscape",
        "figures.diagnostics",
        "data",
        "flags",
    ):
        assert f"timm_nrpm.{name}" in paths
    absent = ["timm_nrpm.nosuch", "timm_nrpm.evaluation.diagnostics.nosuch"]
    assert fresh(EACH_PATH, *sorted(paths | {f"timm_nrpm.{name}" for name in MODULES}), *absent) == absent


def test_the_face_is_small_and_every_wing_is_listed(imported):
    listed, names = imported["listed"], imported["names"]
    wings = {path.parent.name for path in (ROOT / "timm_nrpm").glob("*/__init__.py")}
    assert {*wings, *names} <= set(listed)
    assert len(names) <= 30
    assert listed == sorted(set(listed))


def test_a_name_that_is_not_there_is_an_attribute_error():
    import timm_nrpm

    for name in ("nosuch", "diagnostic", "__nosuch__", "a.b", "../data", ""):
        with pytest.raises(AttributeError, match=r"module 'timm_nrpm' has no attribute"):
            getattr(timm_nrpm, name)
    assert callable(timm_nrpm.inspect)  # a function, beside modules


def test_the_import_is_light(imported):
    heavy = {
        "accelerate",
        "torchattacks",
        "scipy",
        "matplotlib",
        "sklearn",
        "optuna",
        "imagecorruptions_imaug",
        "pandas",
    }
    loaded = set(imported["modules"])
    assert not heavy & loaded
    assert not {"timm_nrpm.evaluation.diagnostics", "timm_nrpm.tuning.tune", "timm_nrpm.cli.program"} & loaded


STATE = """
    import importlib, json, sys
    for name in json.loads(sys.argv[1]):
        importlib.import_module(name)
    import atexit, copyreg, locale, logging, os, random, signal, threading, warnings
    import numpy, timm, torch
    from timm.models import _registry as registry

    def state():
        loggers = {n: x for n, x in logging.root.manager.loggerDict.items() if isinstance(x, logging.Logger)}
        cudnn = torch.backends.cudnn
        found = {
            "process": [dict(os.environ), list(sys.path), os.getcwd(), locale.setlocale(locale.LC_ALL)],
            "random": [random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()],
            "dtype": [torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()],
            "torch": [torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()],
            "cudnn": [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32],
            "printing": [vars(torch._tensor_str.PRINT_OPTS), numpy.get_printoptions(), numpy.geterr()],
            "warnings": [list(warnings.filters), warnings.showwarning],
            "root logger": [logging.root.level, list(logging.root.handlers)],
            "loggers": {n: (x.level, x.handlers) for n, x in loggers.items() if not n.startswith("timm_nrpm")},
            "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
            "hooks": [sys.excepthook, threading.excepthook, sys.stdout, sys.stderr, list(sys.meta_path)],
            "others": [atexit._ncallbacks(), dict(copyreg.dispatch_table), threading.active_count()],
        }
        models = registry._model_entrypoints
        return {key: repr(value) for key, value in found.items()}, {
            name: [id(entry), id(registry._model_pretrained_cfgs.get(name))] for name, entry in models.items()
        }

    before, models = state()
    import timm_nrpm
    after, more = state()
    print(json.dumps([
        {key: [before[key], after[key]] for key in before if before[key] != after[key]},
        [name for name in models if models[name] != more.get(name)],
        sorted(set(more) - set(models)),
    ]))
"""


def test_the_import_changes_nothing_but_timms_registry(imported):
    modules = [name for name in imported["modules"] if name.count(".") < 2 and not name.startswith("__")]
    others = [name for name in modules if name.split(".")[0] != "timm_nrpm"]
    changed, moved, added = fresh(STATE, json.dumps(others))
    assert changed == {}
    assert moved == []
    from timm_nrpm.models.backbones import BACKBONES
    from timm_nrpm.models.registry import DIGITS

    assert {name for name in added if not name.startswith("nrpm_")} == {*BACKBONES, DIGITS}


PICTURES = """
    import json, sys, matplotlib
    matplotlib.use("svg")  # the user's backend, which is not the default
    settings = {**matplotlib.rcParams}
    from pathlib import Path
    import timm_nrpm
    from timm_nrpm import Threat, TuneConfig
    from timm_nrpm.evaluation.certificates import Certificate, CertificationReport
    from timm_nrpm.evaluation.history import Evaluation, History, Step
    from timm_nrpm.evaluation.pareto import Candidate, ParetoFront

    folder = Path(sys.argv[1])
    steps = [Step(1, 0, 0.5, 0.9, 0.4, (0.1, 0.1), False, (0.5, 0.6))]
    history = History(TuneConfig(), ("a", "b"), steps, [Evaluation(0, 0.9, 0.5, 0.4, ())])
    timm_nrpm.plot(history, folder / "history.png")
    trials = [Candidate(kind, {"a": 0.5}, loss, 0.9, 0.4) for kind, loss in (("plain", 0.1), ("global", 0.2))]
    timm_nrpm.plot(ParetoFront(Threat(), 2, 0, 9, 0.1, tuple(trials)), folder / "front.png")
    one = CertificationReport("a", 0.5, 9, 90, 0.999, 0, "", {}, (Certificate(0, 0, 0.1, 0, 9, 90),))
    timm_nrpm.plot([one], folder / "certified.png")
    changed = {key: str(value) for key, value in matplotlib.rcParams.items() if settings[key] != value}
    print(json.dumps([matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules, changed]))
"""


@pytest.mark.slow
def test_a_picture_takes_nobodys_backend(tmp_path):
    assert fresh(PICTURES, str(tmp_path)) == ["svg", False, {}]
    assert [path.read_bytes()[:4] for path in sorted(tmp_path.iterdir())] == [b"\x89PNG"] * 3


def test_no_code_switches_the_backend():
    code = [path for folder in ("timm_nrpm", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert not [path.name for path in code if re.search(r"pyplot as|matplotlib\.use\(|import pyplot", path.read_text())]
