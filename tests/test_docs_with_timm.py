"""What docs/with-timm.md has one type runs as it stands, on the local Hub of the tests and with a few photos."""

import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest
from pages import photos

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "with-timm.md").read_text(encoding="utf-8")
LIBRARIES = ("transformers", "peft")
SHORTER = shlex.split("--img-size 64 --device cpu --workers 0 --batch-size 2")
ONLY = {"train.py": "--epochs 2 --no-prefetcher --warmup-epochs 0", "validate.py": "--no-prefetcher"}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def needs(block):
    """The library that a block imports and that the tests do not bring; empty if there is none."""
    return next((name for name in LIBRARIES if f"from {name} import" in block), "")


def run(command, folder, environment):
    done = forked.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (command, done.stderr[-3000:])
    return done


@pytest.mark.slow
def test_the_examples_run(stocked_hub, tmp_path):
    """One after the other in one process, as they share names and files."""
    chosen = [block for block in blocks("python") if not needs(block) or find_spec(needs(block))]
    run(
        [sys.executable, "-c", "\n".join(chosen)],
        tmp_path,
        {**stocked_hub.environment(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert (tmp_path / "three-classes" / "nrpm_config.json").is_file()
    missing = {needs(block) for block in blocks("python")} - {""} - {name for name in LIBRARIES if find_spec(name)}
    if missing:
        pytest.skip(f"all but the examples of {', '.join(sorted(missing))}: pip install transformers 'timm_nrpm[lora]'")


@pytest.mark.slow
def test_the_commands_run(stocked_hub, tmp_path):
    place = os.environ.get("TIMM_SCRIPTS")
    if not place or not find_spec("pandas"):
        pytest.skip("needs TIMM_SCRIPTS, a clone of timm's repository, and pandas, which its inference.py imports")
    photos(tmp_path)
    shutil.move(tmp_path / "photos" / "test", tmp_path / "photos" / "validation")
    (tmp_path / "scripts").symlink_to(Path(place).resolve())
    ran = []
    for line in blocks("sh")[0].splitlines():
        if not line.startswith("python "):
            continue
        words = shlex.split(line)[1:]
        name = Path(words[2]).name
        command = [sys.executable, *words, *SHORTER, *shlex.split(ONLY.get(name, "--no-console-results"))]
        run(
            command,
            tmp_path,
            {**stocked_hub.environment(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
        ran.append(name)
    assert ran == ["train.py", "train.py", "validate.py", "inference.py"]
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 5


def test_the_page_names_what_it_needs():
    assert [needs(block) for block in blocks("python")][-2:] == list(LIBRARIES)
    assert len(blocks("python")) == 8
    assert "pip install 'timm_nrpm[lora]'" in PAGE
