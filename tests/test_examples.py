"""Every example in a docstring runs and prints what it says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from hub_server import Hub
from safetensors.torch import save_file

import timm_nrpm

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_example0123456789"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with what the examples name: a variant, and timm's resnet18, its weights drawn at random."""
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder / "server") as server:
        server.user("me", TOKEN)
        model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.8)
        variant = timm_nrpm.save_pretrained(model, folder / "variant")
        files = {path.name: path.read_bytes() for path in variant.iterdir()}
        server.create("me/resnet18-nrpm").commit({**files, "README.md": b"---\ntags: [timm_nrpm]\n---\n"})
        save_file(timm.create_model("resnet18").state_dict(), folder / "model.safetensors")
        config = json.dumps({"architecture": "resnet18", "num_classes": 1000}).encode()
        weights = (folder / "model.safetensors").read_bytes()
        server.create("timm/resnet18.a1_in1k").commit({"config.json": config, "model.safetensors": weights})
        yield server


def test_the_examples_in_docstrings_run(hub, tmp_path):
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    ours |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "COLUMNS": "120"}
    flags = "NUMBER NORMALIZE_WHITESPACE ELLIPSIS"
    command = [sys.executable, "-m", "pytest", "timm_nrpm", "--doctest-modules", "-p", "docstring_examples", "-q"]
    command += ["--doctest-ignore-import-errors", "--doctest-continue-on-failure", "-p", "no:cacheprovider"]
    command += ["-o", f"doctest_optionflags={flags}", "-o", "addopts=", "-p", "no:xdist", "-W", "ignore"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20000:]
    written = sum(
        bool(re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)) for path in ROOT.glob("timm_nrpm/**/*.py")
    )
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= written
