"""What the README has one type: its commands that name timm's resnet18 run as they stand, with a few photos."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

README = Path(__file__).resolve().parents[1] / "README.md"
SYNSETS = ("n01440764", "n01443537")  # of ImageNet, so that the labels are those of resnet18
SHORTER = {
    "tune": ("--epochs", "1"),
    "advise": ("--effect", "100", "--seconds", "1", "--train", "0"),
    "subnetwork": shlex.split(
        "--num-classes 2 --image-size 64 --epochs 1 --steps 1 --trials 1 --late-epochs 1 --attacks quick"
    ),
}
IMAGES = {"advise": {"tested": 6}, "subnetwork": {"trained": 100}}


def blocks(text):
    """The calls in each block of code that has one, without their comments, as lists of arguments."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("timm-nrpm ")]
        if lines:
            yield [shlex.split(line, comments=True)[1:] for line in lines]


def photos(folder, trained=2, tested=2):
    """Noise of 64 x 64, `trained` images of a class to train on, and `tested` more."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for synset in SYNSETS:
            (folder / "photos" / split / synset).mkdir(parents=True)
            for index in range(trained if split == "train" else tested):
                image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8))
                image.save(folder / "photos" / split / synset / f"{index}.png")


@pytest.mark.slow
def test_the_commands_for_resnet18_run(stocked_hub, tmp_path):
    """Weights drawn at random are right about few images, so the attacks have little to do; of ten epochs one is run,
    and advice has a second. A subnetwork needs images of every class: its model has the two of the photos."""
    ran = []
    for number, block in enumerate(blocks(README.read_text())):
        folder = tmp_path / str(number)
        photos(folder, **IMAGES.get(block[0][0], {}))
        if block[0][0] == "subnetwork":
            natural = timm.create_model("resnet18", num_classes=len(SYNSETS))
            save_file(natural.state_dict(), folder / "natural.safetensors")
        for call in block:
            if not {"resnet18", "my-variant"} & set(call):
                continue
            done = subprocess.run(
                [sys.executable, "-m", "timm_nrpm.cli", *call, *SHORTER.get(call[0], ())],
                cwd=folder,
                env=stocked_hub.environment(tmp_path),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (call, done.stderr)
            ran.append(call[0])
    assert ran == ["advise", "create", "calibrate", "evaluate", "push", "evaluate", "tune", "subnetwork"]
    assert "README.md" in stocked_hub.repo("me/my-variant").files()
