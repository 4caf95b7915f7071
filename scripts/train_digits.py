"""Train the bundled model on scikit-learn's handwritten digits and write its weights into the package.

    python scripts/train_digits.py      # two minutes on two cores

The images are real scans, 8x8 pixels in grey, that come with scikit-learn. The last fifth, by other writers than the
rest, is kept for testing.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file

import timm_nrpm
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.registry import ASSETS, DIGITS
from timm_nrpm.nn.pixel_model import PixelModel


def shifted(pixels: torch.Tensor) -> torch.Tensor:
    """Return every image shifted at random by up to one pixel, `[B, C, 8, 8]`."""
    padded = F.pad(pixels, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(pixels))).tolist()
    return torch.stack([x[:, r : r + 8, c : c + 8] for x, r, c in zip(padded, rows, columns, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="number of epochs (default: 60)")
    parser.add_argument("--eps", type=float, default=0.1, help="FGSM step in pixel units (default: 0.1)")
    args = parser.parse_args()
    torch.manual_seed(0)
    pixels, labels = digits("train")
    model = timm.create_model(DIGITS)
    net = PixelModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, epochs=args.epochs, steps_per_epoch=-(-len(pixels) // 64)
    )
    for _ in track(range(args.epochs), "Training"):
        model.train()
        for batch in torch.randperm(len(pixels)).split(64):
            x, y = shifted(pixels[batch]), labels[batch]
            if args.eps:
                x.requires_grad_(True)
                (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
                x = (x + args.eps * gradient.sign()).clamp(0, 1).detach()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    loader = list(zip(*(t.split(256) for t in digits("test")), strict=True))
    print(
        {
            eps: timm_nrpm.evaluate(model, loader, timm_nrpm.Threat("Linf", eps)).worst_case
            for eps in (0.05, 0.1, 0.15, 0.2)
        }
    )
    save_file(model.state_dict(), str(ASSETS / f"{DIGITS}.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
