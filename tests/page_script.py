"""Run the blocks of Python of a page, one after another: `python page_script.py PAGE`, in a folder that holds photos.

What blocks take for granted is given to them: a model, loaders of pixels and labels, and single tensors. They are of
the digits, or where a page creates a resnet18, noise of 64 x 64.
"""

import sys
from functools import partial
from pathlib import Path

import timm
import torch
from pages import blocks
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm.data.loaders import digits

Parts = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Pixels and labels to test on, to train on, and more."""


def of_noise() -> Parts:
    """Noise of 64 x 64 with the labels of two classes, to test on and to train on."""
    return tuple((torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])) for _ in range(2))


def of_digits() -> Parts:
    """The first digits to test on, to train on, and others."""
    (pixels, labels), training = digits("test"), digits("train")
    return (pixels[:16], labels[:16]), (training[0][:64], training[1][:64]), (pixels[16:32], labels[16:32])


def names_for(page: Path) -> dict[str, object]:
    """What the blocks of a page may name."""
    torch.manual_seed(0)
    parts = of_noise() if '"resnet18"' in "".join(blocks(page, "python")) else of_digits()
    loaders = [DataLoader(TensorDataset(*part), batch_size=32) for part in parts]
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    names = dict(zip(("loader", "training_loader", "other_loader"), loaders, strict=False))
    pixels, labels = parts[0]
    net = timm.create_model("resnet8_digits", pretrained=True).eval()
    samples = {"x": torch.randn(400, 2), "y": torch.randn(400, 2), "classes": torch.arange(400) % 2}
    ready = {"timm": timm, "timm_nrpm": timm_nrpm, "model": model, "net": net, "pixels": pixels, "labels": labels}
    return {**names, **samples, **ready}


def main() -> None:
    page = Path(sys.argv[1])
    names = names_for(page)
    # Attacks and advice take as little time as they can.
    timm_nrpm.evaluate = partial(timm_nrpm.evaluate, steps=2, queries=2)
    timm_nrpm.advise = partial(timm_nrpm.advise, effect=100, seconds=1)
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        print(f"ran block {number}")


if __name__ == "__main__":
    main()
