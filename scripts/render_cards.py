"""Make variants of the bundled model, one for each paradigm, evaluate them and write what would be published.

    python scripts/render_cards.py              # ten minutes on two cores
    python scripts/render_cards.py --evaluate   # after a change to an attack: evaluates the existing variants again
    python scripts/render_cards.py --cards      # after a change to the template: renders the cards only

What a forward costs is measured where the folder does not say it.

Writes hub_cards/resnet8_digits-{nrpm,lambda,tuned}/, folders that `from_pretrained` loads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm import Threat, TuneConfig
from timm_nrpm.data.loaders import digits
from timm_nrpm.hub.cards import write_card
from timm_nrpm.hub.latency import read_cost
from timm_nrpm.hub.templates import read_reports
from timm_nrpm.models.loading import find_variant
from timm_nrpm.models.registry import DIGITS
from timm_nrpm.models.saving import needs_weights

CARDS = Path(__file__).parents[1] / "hub_cards"
THREAT = Threat("Linf", 0.15)
IMAGES, CALIBRATION, LAM = 180, 1000, 0.5
CONFIGS = {
    "nrpm": None,
    "lambda": TuneConfig(paradigm="lambda", eps=THREAT.eps, epochs=5, calibrate=CALIBRATION),
    "tuned": TuneConfig(paradigm="all", eps=THREAT.eps, epochs=5, gradient="mixture"),
}
"""Settings of the tuning by name of the variant; None where lambda is fixed."""


def make(config: TuneConfig | None) -> nn.Module:
    """Return a calibrated variant of the bundled model, tuned by `config` if there is one."""
    torch.manual_seed(0)
    pixels, labels = digits("train")
    model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=LAM).eval()
    timm_nrpm.calibrate_(model, [pixels[:CALIBRATION]])
    if config is not None:
        loader = DataLoader(TensorDataset(pixels, labels), batch_size=64, shuffle=True, drop_last=True)
        timm_nrpm.tune(model, loader, config, progress=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", action="store_true", help="only render the cards, from the existing reports")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the existing variants again, then render")
    args = parser.parse_args()
    pixels, labels = (t[:IMAGES] for t in digits("test"))
    loader = list(zip(pixels.split(90), labels.split(90), strict=True))
    for name, config in CONFIGS.items():
        folder = CARDS / f"{DIGITS}-{name}"
        if args.cards:
            reports = read_reports(folder)
            model = timm_nrpm.from_pretrained(folder)
        else:
            model = timm_nrpm.from_pretrained(folder) if args.evaluate else make(config)
            if not args.evaluate:
                timm_nrpm.save_pretrained(model, folder, full=needs_weights(model))
            dataset = "scikit-learn's digits, test"
            reports = [timm_nrpm.evaluate(model, loader, THREAT, data=dataset, progress=True)]
            print(reports[0])
        known = read_cost(folder, find_variant(folder).variant.model)
        cost = known or timm_nrpm.cost(model, measured=True)
        print(write_card(folder, f"me/{folder.name}", reports, cost=cost))


if __name__ == "__main__":
    main()
