"""A script runs as a program of its own that knows the `nrpm_*` models, timm's own scripts above all.

These are not in timm's wheel. They are looked for in the folder that TIMM_SCRIPTS names, and beside an editable timm.
"""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config

import timm_nrpm
from timm_nrpm.cli import script

ROOT = Path(__file__).resolve().parents[2]
MODEL, CLASSES, SIZE = "resnet10t", 2, 32
PLACES = (os.environ.get("TIMM_SCRIPTS", ""), Path(timm.__file__).resolve().parents[1])
HOW = (
    f"timm's train.py, validate.py and inference.py are not here: git clone --depth 1 --branch v{timm.__version__} "
    "https://github.com/huggingface/pytorch-image-models, and set TIMM_SCRIPTS to that folder"
)
RUN = [sys.executable, "-m", "timm_nrpm.cli.script"]


@pytest.mark.slow
def test_a_script_is_run_with_its_arguments_and_knows_the_models(tmp_path):
    """In a new process, where nothing but the command can have imported the package."""
    (tmp_path / "beside.py").write_text("NAME = 'nrpm_resnet18'\n")
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
            import json, sys, timm
            from beside import NAME
            if __name__ == "__main__":
                print(json.dumps([timm.is_model(NAME), sys.argv]))
                sys.exit(3)
        """)
    )
    done = subprocess.run(
        [*RUN, str(tmp_path / "main.py"), "--model", "x"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout) == [True, [str(tmp_path / "main.py"), "--model", "x"]]


def test_a_script_is_a_program_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("VALUE = 2\n")
    path = tmp_path / "main.py"
    path.write_text(
        "import sys, beside_it\nif __name__ == '__main__':\n    sys.exit(f'{sys.argv[1]} {beside_it.VALUE}')\n"
    )
    with pytest.raises(SystemExit, match="given 2"):
        script.main([str(path), "given"])
    assert sys.argv == [str(path), "given"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage: python -m timm_nrpm.cli.script SCRIPT.py"), (["nowhere.py"], "nowhere.py is no file: give the path")],
)
def test_no_script(arguments, message):
    with pytest.raises(SystemExit, match=message):
        script.main(arguments)


@pytest.fixture(scope="module")
def scripts():
    """The folder of timm's scripts."""
    for place in filter(None, PLACES):
        if all((Path(place) / name).is_file() for name in ("train.py", "validate.py", "inference.py")):
            return Path(place)
    pytest.skip(HOW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with noise as images, `data/train` and `data/validation` of two classes."""
    place, generator = tmp_path_factory.mktemp("scripts"), np.random.default_rng(0)
    for split, number in (("train", 4), ("validation", 3)):
        for label in ("a", "b"):
            (place / "data" / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
                Image.fromarray(pixels).save(place / "data" / split / label / f"{label}{index}.png")
    return place


def call(scripts, folder, name, *arguments, model=f"nrpm_{MODEL}", lam="0.8"):
    """What one of timm's scripts prints, run on the model with these arguments."""
    settings = ["--model-kwargs", f"lam={lam}", "learnable=True", "iterations=2"] if model.startswith("nrpm_") else []
    command = [*RUN, str(scripts / name), *arguments, "--model", model, *settings, "--num-classes", str(CLASSES)]
    command += ["--img-size", str(SIZE), "--batch-size", "4", "--device", "cpu", "--workers", "0"]
    done = forked.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(scripts, folder, experiment, *arguments):
    """The checkpoint that timm's train.py writes."""
    common = ["--data-dir", "data", "--no-prefetcher", "--model-ema", "--output", "out", "--warmup-epochs", "0"]
    call(scripts, folder, "train.py", *common, "--experiment", experiment, *arguments)
    return folder / "out" / experiment / "last.pth.tar"


@pytest.fixture(scope="module")
def trained(scripts, folder):
    """A checkpoint of one epoch, its average of weights included, trained with its blocks checkpointed."""
    return train(
        scripts, folder, "one", "--epochs", "1", "--lr", "0.1", "--model-ema-decay", "0.5", "--grad-checkpointing"
    )


def lams(state):
    return {key: float(value) for key, value in state.items() if key.endswith(".lam")}


def loaded(checkpoint, **given):
    """The reprogrammed model of a checkpoint, without the average of its weights."""
    settings = {"lam": 0.8, "iterations": 2, "num_classes": CLASSES}
    model = timm.create_model(f"nrpm_{MODEL}", **settings, **given).eval()
    timm.models.load_checkpoint(model, str(checkpoint), use_ema=False)
    return model


def batch(folder, model):
    """The images of `data/validation` as timm feeds them, and their labels."""
    config = resolve_data_config({"img_size": SIZE}, model=model)
    dataset = create_dataset("", folder / "data" / "validation", transform=create_transform(**config))
    images, labels = zip(*dataset, strict=True)
    return torch.stack(images), torch.tensor(labels), dataset.filenames(basename=True)


@pytest.mark.slow
def test_train_learns_lambdas_and_averages_them(trained):
    content = torch.load(trained, weights_only=False)
    assert content["arch"] == f"nrpm_{MODEL}"
    now, average = lams(content["state_dict"]), lams(content["state_dict_ema"])
    expected = {f"{name}.lam" for name in timm_nrpm.lambdas(loaded(trained))}
    assert now.keys() == average.keys() == expected
    assert any(value != pytest.approx(0.8, abs=1e-6) for value in now.values())
    for key, value in now.items():
        assert min(value, 0.8) - 1e-6 <= average[key] <= max(value, 0.8) + 1e-6


@pytest.mark.slow
def test_train_resumes_with_the_lambdas_it_had(scripts, folder, trained):
    """At a learning rate of next to nothing, so that what it ends with is what it began with."""
    again = train(scripts, folder, "two", "--epochs", "2", "--lr", "1e-20", "--resume", str(trained), "--no-resume-opt")
    first, second = (torch.load(path, weights_only=False) for path in (trained, again))
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert lams(second["state_dict"]) == lams(first["state_dict"])
    assert torch.equal(second["state_dict"]["fc.weight"], first["state_dict"]["fc.weight"])
    rows = list(csv.DictReader((again.parent / "summary.csv").open()))
    assert [row["epoch"] for row in rows] == ["1"]


@pytest.mark.slow
@torch.no_grad()
def test_validate_counts_as_the_model_does(scripts, folder, trained):
    printed = call(scripts, folder, "validate.py", "data", "--no-prefetcher", "--checkpoint", str(trained))
    result = json.loads(printed.partition("--result")[2])
    model = loaded(trained)
    images, labels, _ = batch(folder, model)
    right = (model(images).argmax(1) == labels).double().mean()
    assert result["model"] == f"nrpm_{MODEL}"
    assert result["top1"] == pytest.approx(100 * float(right), abs=1e-2)


def infer(scripts, folder, checkpoint, results, **given):
    """Probabilities by file that timm's inference.py writes; of the average of weights, if a checkpoint has one."""
    pytest.importorskip("pandas", reason="timm's inference.py imports pandas: pip install pandas")
    arguments = ["data/validation", "--checkpoint", str(checkpoint), "--results-dir", str(folder), "--results-file"]
    arguments += [results, "--topk", "0", "--results-separate-col", "--no-console-results"]
    call(scripts, folder, "inference.py", *arguments, **given)
    rows = csv.DictReader((folder / results).open())
    return {row["filename"]: [float(row[f"prob_{c}"]) for c in range(CLASSES)] for row in rows}


@pytest.mark.slow
@torch.no_grad()
def test_inference_writes_the_models_probabilities(scripts, folder, trained):
    rows = infer(scripts, folder, trained, "robust.csv")
    settings = {"lam": 0.8, "iterations": 2, "num_classes": CLASSES}
    model = timm.create_model(f"nrpm_{MODEL}", checkpoint_path=trained, **settings).eval()
    images, _, names = batch(folder, model)
    want = model(images).softmax(1)
    torch.testing.assert_close(torch.tensor([rows[name] for name in names]), want, atol=1e-5, rtol=1e-4)
    plain = timm_nrpm.plain_copy(model)(images).softmax(1)
    assert not torch.allclose(want, plain, atol=1e-4)


@pytest.mark.slow
def test_inference_at_lambda_one_is_plain_timms(scripts, folder, trained):
    plain = timm_nrpm.restore_(loaded(trained))
    torch.save(plain.state_dict(), folder / "plain.pth")
    written = [
        infer(scripts, folder, folder / "plain.pth", f"{model}.csv", model=model, lam="1")
        for model in (MODEL, f"nrpm_{MODEL}")
    ]
    assert written[0] == written[1]
