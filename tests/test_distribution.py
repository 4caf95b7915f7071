"""Wheel and sdist: what is in them, and the wheel at work outside the repository, against a Hub on loopback."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import timm_nrpm

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("build") is None, reason="nothing builds packages here: pip install build"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of the tracked files, and the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_nothing_else(built):
    _, wheel = built
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"timm_nrpm-{timm_nrpm.__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"timm_nrpm", f"timm_nrpm-{timm_nrpm.__version__}.dist-info"}
    inside = {name.removeprefix("timm_nrpm/") for name in names if name.startswith("timm_nrpm/")}
    package = ROOT / "timm_nrpm"
    wanted = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    cards = {f"hub_cards/{path.name}" for path in (ROOT / "hub_cards").iterdir() if path.suffix in (".md", ".py")}
    assert inside == wanted | cards


def test_the_sdist_holds_what_tests_and_documents_need(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    wanted = {n for n in tracked.split("\0") if n.partition("/")[0] in ("timm_nrpm", "hub_cards", "tests", "scripts")}
    assert {name for name in wanted if (ROOT / name).exists()} <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "mkdocs.yml", "docs/format.md"} <= names


def test_the_metadata_says_what_pypi_shows(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        folder = f"timm_nrpm-{timm_nrpm.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        assert archive.read(f"{folder}/entry_points.txt").decode().count("timm-nrpm = ") == 1
    head, _, description = metadata.partition("\n\n")
    for line in (
        "Name: timm_nrpm",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.10",
    ):
        assert line in head.splitlines()
    assert description.startswith("# timm_nrpm")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The programs of an environment with the wheel, and with the dependencies of this one, but without the clone."""
    folder = tmp_path_factory.mktemp("clean") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    with open(Path(site) / "dependencies.pth", "w") as file:  # whose own .pth files, like the clone's, are not read
        file.write(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", "--ignore-installed", str(built[1])], check=True)
    return programs


def test_the_wheel_works_outside_the_repository(installed, stocked_hub, tmp_path):
    """demo, evaluate, tune, push, pull and export, from another folder."""
    environment = {key: value for key, value in stocked_hub.environment(tmp_path).items() if key != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr[-3000:])
        return done.stdout

    python, program = str(installed / "python"), str(installed / "timm-nrpm")
    where = run(python, "-c", "import timm_nrpm; print(timm_nrpm.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent)
    assert json.loads(run(program, "--version", "--json"))["timm_nrpm"] == timm_nrpm.__version__
    assert "worst case" in run(program, "demo")
    run(program, "create", "--model", "resnet8_digits", "--lam", "0.8", "--output", "variant")
    few = ("--data", "digits", "--eps", "0.1")
    said = run(program, "evaluate", "--variant", "variant", *few, "--samples", "20", "--effort", "fast")
    assert "worst case" in said
    tune = ("--epochs", "1", "--steps", "1", "--evaluate-steps", "1", "--output", "tuned")
    run(program, "tune", "--variant", "variant", *few, *tune)
    assert "sent" in run(program, "push", "--variant", "tuned/variant", "me/from-a-wheel")
    run(program, "pull", "--variant", "me/from-a-wheel", "--output", "copy")
    assert "resnet8_digits" in run(program, "inspect", "--variant", "copy")
    run(program, "export", "--variant", "copy", "--output", "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 100_000
