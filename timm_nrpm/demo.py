"""The whole way in two minutes, on real images: reprogram, calibrate, attack, save, load (`timm-nrpm demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from timm_nrpm.calibration import calibrate_
from timm_nrpm.config import NRPMConfig
from timm_nrpm.data import digits
from timm_nrpm.evaluation import RobustnessReport, Threat, evaluate
from timm_nrpm.hub import from_pretrained, save_pretrained
from timm_nrpm.registry import DIGITS, create_model
from timm_nrpm.reprogramming import reprogram_

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THREAT = Threat("Linf", 0.15)
LAMBDAS = (1.0, 0.9, 0.8, 0.6, 0.4)
IMAGES, CALIBRATION, STEPS = 180, 1000, 10

COLUMNS = {
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD own",
    "pgd_plain": "PGD plain",
    "worst": "worst",
}
COLOURS = {"clean": "#000000", "fgsm": "#E69F00", "pgd": "#56B4E9", "pgd_plain": "#009E73", "worst": "#D55E00"}


def accuracies(report: RobustnessReport) -> dict[str, float]:
    """The numbers of a report under the keys of COLUMNS."""
    return {**{name: report.accuracy(name) for name in report.correct}, "worst": report.worst_case}


def draw(reports: dict[str, dict[float, RobustnessReport]], title: str) -> Figure:
    """Accuracy over lambda: one panel for each key of `reports`, one line for each attack, the worst case in bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(reports), figsize=(5 * len(reports), 4.2), sharey=True, layout="constrained")
    for panel, (heading, by_lam) in zip(panels, reports.items(), strict=True):
        lams = sorted(by_lam)
        for name, label in COLUMNS.items():
            worst = name == "worst"
            values = [100 * accuracies(by_lam[lam])[name] for lam in lams]
            style = {"linewidth": 3.5, "zorder": 1} if worst else {"linewidth": 1.5, "marker": "o", "markersize": 4}
            panel.plot(lams, values, label=label, color=COLOURS[name], **style)
        panel.set(title=heading, xlabel="lambda (1 = the plain model)", ylim=(0, 101))
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(loc="lower left", fontsize=8, framealpha=0.9)
    figure.suptitle(title)
    return figure


def run(folder: Path, console: Console, lams: Sequence[float] = LAMBDAS, images: int = IMAGES) -> bool:
    """Run the demo, write its picture and its variant into `folder`, and say whether the variant came back the same."""
    folder.mkdir(parents=True, exist_ok=True)  # now, not after two minutes of work
    pixels, labels = (t[:images] for t in digits("test"))
    loader = list(zip(pixels.split(256), labels.split(256), strict=True))
    model = create_model(DIGITS, pretrained=True).eval()
    calibration = [(digits("train")[0][:CALIBRATION] - 0.5) / 0.5]
    reports: dict[str, dict[float, RobustnessReport]] = {"before calibration": {}, "after calibration": {}}
    with Progress(console=console) as bar:
        task = bar.add_task("Reprogramming and attacking", total=2 * len(lams))
        for lam in lams:
            reprogram_(model, NRPMConfig(lam=lam))
            for by_lam in reports.values():
                by_lam[lam] = evaluate(model, loader, THREAT, steps=STEPS)
                calibrate_(model, calibration)
                bar.advance(task)
    title = f"{DIGITS}, {images} test images, Linf {THREAT.eps}, PGD-{STEPS}, accuracy in %"
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
            table.add_row(f"{lam:g}", done, *numbers, ", ".join(report.flags), end_section=done == "yes")
    console.print(table)
    console.print(
        "PGD own follows the model's own gradient, PGD plain that of the plain model (lambda = 1). Where the flag "
        "gradient_masking stands, the former overstates robustness: believe the worst case, image by image, alone."
    )
    picture = folder / "demo.png"
    draw(reports, title.replace(", accuracy in %", "")).savefig(picture, dpi=120)
    console.print(f"Picture: {picture}")
    variant = save_pretrained(model, folder / "variant")
    size = sum(file.stat().st_size for file in variant.iterdir())
    with torch.no_grad():
        same = torch.equal(from_pretrained(variant)(calibration[0]), model(calibration[0]))
    verdict = "gives the same logits" if same else "[bold red]gives other logits[/]"
    console.print(
        f"Variant (lambda {lams[-1]:g}, calibrated): {variant}, {size / 1024:.1f} KiB; loaded back it {verdict}."
    )
    return same
