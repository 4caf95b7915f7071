"""The whole way in two minutes, on real images: reprogram, calibrate, attack, save, load (`timm-nrpm demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from timm_nrpm.attacks.flags import MASKED
from timm_nrpm.attacks.threats import Threat
from timm_nrpm.cli.terminal import Terminal
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data.loaders import digits
from timm_nrpm.evaluation.evaluate import evaluate
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.robustness import draw_lambda
from timm_nrpm.jobs.progress import progress_bar
from timm_nrpm.models.calibration import calibrate_
from timm_nrpm.models.loading import load_variant
from timm_nrpm.models.registry import DIGITS, create_model
from timm_nrpm.models.reprogramming import reprogram_
from timm_nrpm.models.saving import save_variant
from timm_nrpm.nn.pixel_model import PixelModel

THREAT = Threat("Linf", 0.15)
LAMBDAS = (1.0, 0.9, 0.8, 0.6, 0.4)
IMAGES, CALIBRATION, STEPS = 180, 1000, 10

COLUMNS = {
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD own",
    "pgd_plain": "PGD plain",
    "worst": "worst\ncase",
}


def accuracies(report: RobustnessReport) -> dict[str, float]:
    """The numbers of a report under the keys of COLUMNS."""
    # At lambda 1 the own gradient is the plain model's.
    names = {name: name for name in ("clean", "fgsm", "pgd", "pgd_plain")}
    if "pgd_plain" not in {attack.name for attack in report.attacks}:
        names["pgd_plain"] = "pgd"
    return {**{key: report.accuracy(name) for key, name in names.items()}, "worst": report.worst_case}


def run(folder: Path, terminal: Terminal, lams: Sequence[float] = LAMBDAS, images: int = IMAGES) -> None:
    """Run the demo, and write its picture and its variant into `folder`.

    Raises:
        RuntimeError: The variant, loaded back, gives other logits.
    """
    folder.mkdir(parents=True, exist_ok=True)  # now, not after two minutes of work
    pixels, labels = (t[:images] for t in digits("test"))
    loader = list(zip(pixels.split(256), labels.split(256), strict=True))
    model = create_model(DIGITS, pretrained=True).eval()
    calibration = [digits("train")[0][:CALIBRATION]]
    reports: dict[str, dict[float, RobustnessReport]] = {"before calibration": {}, "after calibration": {}}
    with progress_bar(terminal.progress) as bar:
        task = bar.add_task("Reprogramming and attacking", total=2 * len(lams))
        for lam in lams:
            reprogram_(model, NRPMConfig(lam=lam))
            for by_lam in reports.values():
                by_lam[lam] = evaluate(model, loader, THREAT, effort="fast", steps=STEPS, control=False)
                calibrate_(model, calibration)
                bar.advance(task)
    title = f"{DIGITS}, {images} test images, Linf {THREAT.eps}, PGD-{STEPS}"
    terminal.show(_table(reports, lams, f"{title}, accuracy in %"))
    terminal.show(
        Text(
            "PGD own follows the model's own gradient, PGD plain that of the plain model (lambda = 1). The worst case "
            "is what the adaptive suite leaves, image by image, with the least effort. Where the flag gradient_masking "
            "stands the own gradient overstates robustness."
        )
    )
    calibrated = reports["after calibration"]
    last = replace(calibrated[lams[-1]], control=calibrated[lams[0]]) if lams[0] == 1.0 else calibrated[lams[-1]]
    terminal.show(Text(f"Lambda {lams[-1]:g}, calibrated. {last.verdict}"))
    picture = draw_lambda(reports, folder / "demo.png", title)
    terminal.show(Text(f"Picture: {picture}"))
    variant = save_variant(model, folder / "variant")
    size = sum(file.stat().st_size for file in variant.iterdir())
    with torch.no_grad():
        inputs = PixelModel(model).normalise(calibration[0])
        if not torch.equal(load_variant(variant)(inputs), model(inputs)):
            raise RuntimeError(
                f"The variant in {variant}, loaded back, gives other logits than the model that was saved."
            )
    verdict = f"{size / 1024:.1f} KiB; loaded back it gives the same logits."
    terminal.show(Text(f"Variant (lambda {lams[-1]:g}, calibrated): {variant}, {verdict}"))
    rows = [
        {"lambda": lam, "calibrated": name.startswith("after"), **accuracies(report), "flags": report.flags}
        for name, by_lam in reports.items()
        for lam, report in by_lam.items()
    ]
    terminal.give({"rows": rows, "verdict": last.verdict, "picture": str(picture), "variant": str(variant)})


def _table(reports: dict[str, dict[float, RobustnessReport]], lams: Sequence[float], title: str) -> Table:
    """Accuracies by lambda, before and after calibration."""
    table = Table(title=title)
    table.add_column("lam", justify="right")
    table.add_column("cal.")
    for label in COLUMNS.values():
        table.add_column(label, justify="right")
    table.add_column("flags")
    for lam in lams:
        for heading, by_lam in reports.items():
            report = by_lam[lam]
            numbers = [f"{100 * value:.1f}" for value in accuracies(report).values()]
            done = "yes" if heading.startswith("after") else "no"
            masked = MASKED if MASKED in report.flags else ""
            table.add_row(f"{lam:g}", done, *numbers, masked, end_section=done == "yes")
    return table
