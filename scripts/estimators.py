"""Look for an estimate that gains under attack: many candidates, the strongest attack on each, and what is left.

    OMP_NUM_THREADS=1 python scripts/estimators.py --shared SHARED --kept FOLDER    # an hour on one core

FOLDER is that of `scripts/atlas.py`, which keeps the trained LeNet. The protocol: corrections and statistics come from
training images. Candidates are compared with the plain model on selection images under PGD along the candidate's own
gradient, which is how gains are usually shown. Of those that gain and lose at most a point of clean accuracy, the best
of each estimate on each model, twelve at most, are attacked by the adaptive suite on report images, beside the plain
model. If more is left of a candidate than of the plain model, both are attacked on other images, more of them, and
then, under L0, by a second attack. Nothing is trained. The plain model has no estimate, so that calibration leaves it
as it is, and is its own control. Writes results/estimators.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from atlas_bases import BASES, Base, Images, batches
from estimators_page import BEST, CLEAN_LOSS, SEARCH, SELECTION, markdown
from lab import Lab
from pixel_search import survives
from rich.progress import track
from robust_sums import (
    HeldSum,
    median_of_means,
    reweighted,
    trimmed,
    winsorized,
    with_linear_backward,
    with_sums_,
)
from second_attack import Pixels
from torch import nn

from timm_nrpm import NRPMConfig, Threat, calibrate_, evaluate, reprogram_
from timm_nrpm.evaluation.trials import Effect
from timm_nrpm.models.reprogramming import reprogrammed_layers

ROOT = Path(__file__).parents[1]
CALIBRATION, REPORT, LAST = 300, 100, 400
"""Numbers of images for each purpose beside the selection."""

EFFORT = "fast"
THREATS = {"digits": ("Linf", "L0"), "mlp": ("Linf", "L0"), "lenet": ("Linf", "L0")}

HELD: dict[str, Callable[..., HeldSum]] = {
    "trimmed by 2 %": partial(HeldSum, estimate=trimmed(0.02)),
    "trimmed by 10 %": partial(HeldSum, estimate=trimmed(0.1)),
    "trimmed by 10 %, centred": partial(HeldSum, estimate=trimmed(0.1), centred=True),
    "Winsorized by 5 %": partial(HeldSum, estimate=winsorized(0.05)),
    "Winsorized by 5 %, centred": partial(HeldSum, estimate=winsorized(0.05), centred=True),
    "median of 5 means": partial(HeldSum, estimate=median_of_means(5)),
    "median of 9 means, centred": partial(HeldSum, estimate=median_of_means(9), centred=True),
    "L1, eps by scale": partial(HeldSum, estimate=reweighted(3, 1.0)),
    "L1, eps by scale, centred": partial(HeldSum, estimate=reweighted(3, 1.0), centred=True),
    "L1 from the median, eps by scale": partial(HeldSum, estimate=reweighted(3, 1.0, "median")),
}
PENALTIES: dict[str, NRPMConfig] = {
    "the package's L1": NRPMConfig(),
    "the package's L1, eps 0.05": NRPMConfig(eps=0.05),
    "the package's L1, K 1": NRPMConfig(iterations=1),
    "Huber": NRPMConfig(penalty="huber"),
    "MCP": NRPMConfig(penalty="mcp"),
}
STANDARD: dict[str, NRPMConfig] = {
    f"the package's L1 in standard units, eps {eps:g}": NRPMConfig(eps=eps, standardize=True)
    for eps in (0.3, 0.6, 1.0, 2.0)
}
PLACES = ("first", "all")
LAMS = (0.8, 0.4)
STANDARD_LAMS = (0.4, 0.0)


Result = tuple[dict[str, Any], dict[str, Any], Effect]
"""What attacks leave of the plain model and of a candidate, and the difference."""


@dataclass(frozen=True)
class Candidate:
    """An estimate in some layers of a base.

    Attributes:
        estimate: Name of the estimate.
        where: `"first"` layer or `"all"` of them.
        lam: Share of the linear map.
    """

    estimate: str
    where: str
    lam: float

    def __str__(self) -> str:
        return f"{self.estimate}, lambda {self.lam:g}, {self.where} layer{'s' * (self.where == 'all')}"

    def made(self, base: Base, images: torch.Tensor) -> nn.Module:
        """The candidate, corrected or calibrated on images."""
        names = list(reprogrammed_layers(reprogram_(deepcopy(base.model), NRPMConfig(lam=1.0))))
        names = names[:1] if self.where == "first" else names
        if self.estimate in HELD:
            return with_sums_(deepcopy(base.model).eval(), images, names, HELD[self.estimate], self.lam).eval()
        config = replace((PENALTIES | STANDARD)[self.estimate], lam=self.lam, layers=tuple(names))
        return calibrate_(reprogram_(deepcopy(base.model), config), [images]).eval()


def candidates(base: str) -> Iterator[Candidate]:
    """All candidates for a base. Sums that hold every product take hours in more than a first convolution."""
    for estimate in (*PENALTIES, *HELD):
        for where in PLACES:
            for lam in LAMS:
                if estimate in PENALTIES or (where == "first" and base != "mlp"):
                    yield Candidate(estimate, where, lam)
    yield from (Candidate(estimate, where, lam) for estimate in STANDARD for where in PLACES for lam in STANDARD_LAMS)


class Study:
    """The measurements, each of which is kept in a file.

    Args:
        file: File of what was measured, a line each.
        closed: Whether nothing more is measured.
    """

    def __init__(self, file: Path, closed: bool) -> None:
        self.file, self.closed = file, closed
        self.known = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return dict(map(json.loads, lines))

    def once(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this key, now or before, here or in another process."""
        if key not in self.known:
            self.known = self._read()
        if key not in self.known:
            self.known[key] = work()
            with self.file.open("a") as lines:
                lines.write(json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]


def quick_row(model: nn.Module, images: Images, threat: Threat) -> dict[str, Any]:
    """Clean accuracy, and that under PGD along the model's own gradient."""
    report = evaluate(model, batches(images, 100), threat, "quick", control=False)
    return {"clean": 100 * report.clean, "own": 100 * report.accuracy("pgd")}


def full_row(model: nn.Module, images: Images, threat: Threat, bases: dict[str, nn.Module | None]) -> dict[str, Any]:
    """Everything that the adaptive suite leaves, once for each model whose gradient is followed beside the own, and how
    many images each attack took that stood until then."""
    reports = {
        name: evaluate(model, batches(images, 100), threat, effort=EFFORT, base=base, control=False)
        for name, base in bases.items()
    }
    first, *_ = reports.values()
    broke: dict[str, int] = {}
    standing = list(first.correct)
    for name, report in reports.items():
        for attack in report.attacks:
            fallen = [now and survived is False for now, survived in zip(standing, attack.survived, strict=True)]
            words = attack.name.replace("base", name)
            broke[words] = broke.get(words, 0) + sum(fallen)
            standing = [now and not fell for now, fell in zip(standing, fallen, strict=True)]
    return {
        "clean": 100 * first.clean, "worst": 100 * sum(standing) / len(standing), "own": 100 * first.accuracy("pgd"),
        "survivors": "".join(str(int(each)) for each in standing), "broke": broke,
    }  # fmt: skip


def closing(row: dict[str, Any]) -> str:
    """The attack that took most images which stood until then, beside PGD along the own gradient."""
    others = {name: count for name, count in row["broke"].items() if name not in ("pgd", "fgsm")}
    name = max(others, key=lambda each: others[each])
    return f"{name} ({others[name]} more images)"


def survey(study: Study, lab: Lab) -> list[dict[str, Any]]:
    """The first part: every candidate under its own gradient on the selection images."""
    rows = []
    for name, norms in THREATS.items():
        base = BASES[name](lab)
        threats = [threat for threat in base.threats if threat.norm in norms]
        images, training = _part(base.held, 0, SELECTION), _images(base)
        plain = {t: study.once(f"quick {name} {t} plain", partial(quick_row, base.model, images, t)) for t in threats}
        for candidate in track(list(candidates(name)), name):
            made = cache(partial(candidate.made, base, training))
            for threat in threats:
                key = f"quick {name} {threat} {candidate}"
                if study.closed and key not in study.known:
                    continue
                row = study.once(key, lambda made=made, threat=threat: quick_row(made(), images, threat))  # type: ignore[misc]  # noqa: B023
                rows.append({
                    "base": name, "title": base.title, "threat": threat, "candidate": candidate, **row,
                    "lost": plain[threat]["clean"] - row["clean"], "apparent": row["own"] - plain[threat]["own"],
                })  # fmt: skip
    return rows


def judged(study: Study, lab: Lab, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The second part: the best candidates of each estimate under the adaptive suite, beside the plain model."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["apparent"]):
        if row["lost"] <= CLEAN_LOSS and row["apparent"] > 0 and len(best) < BEST:
            best.setdefault((row["base"], row["candidate"].estimate), row)
    bases = {name: BASES[name](lab) for name in {row["base"] for row in best.values()}}
    results: dict[tuple[str, str], tuple[Result, Result | None]] = {}
    for last in (False, True):
        for name, row in track(list(best.items()), "judged again" if last else "judged"):
            if not last or (name in results and results[name][0][2].points > 0):  # what is closed needs no more
                found = attacked(study, bases[row["base"]], row, last)
                if found is not None:
                    results[name] = (results[name][0], found) if last else (found, None)
    return [verdict(bases[best[name]["base"]], best[name], *found) for name, found in results.items()]


def attacked(study: Study, base: Base, row: dict[str, Any], last: bool) -> Result | None:
    """What attacks leave of the plain model and of a candidate; None if that is not known and nothing is measured.

    Args:
        study: The measurements.
        base: The plain model and its images.
        row: The candidate and the threat.
        last: Whether to attack the last images, with the second attack as well.
    """
    candidate, threat = row["candidate"], row["threat"]
    images = _part(base.held, SELECTION + REPORT, LAST) if last else _part(base.held, SELECTION, REPORT)

    def measured(made: Callable[[], nn.Module], bases: dict[str, nn.Module | None]) -> dict[str, Any]:
        model = made()
        if bases and candidate.estimate in HELD:
            bases["linear"] = with_linear_backward(model)
        found = full_row(model, images, threat, bases or {"": None})
        if not last or threat.norm != "L0":
            return found
        target = Pixels(model)
        return second_row(found, target, Pixels(base.model) if candidate.estimate in HELD else target, images, threat)

    key = f"{'last' if last else 'judged'} {row['base']} {threat}"
    if study.closed and f"{key} {candidate}" not in study.known:
        return None
    plain = study.once(f"{key} plain", lambda: measured(lambda: base.model, {}))
    ours = study.once(
        f"{key} {candidate}", lambda: measured(lambda: candidate.made(base, _images(base)), {"plain": base.model})
    )
    return plain, ours, Effect.of(ours["survivors"], plain["survivors"])


def second_row(row: dict[str, Any], target: Pixels, cheap: Pixels, images: Images, threat: Threat) -> dict[str, Any]:
    """The row of a model after the second attack on what stood until then; a cheap model ranks for it."""
    standing = [
        kept == "1" and survives(target, cheap, pixels, int(label), int(threat.eps))
        for kept, pixels, label in zip(track(row["survivors"], "second attack"), *images, strict=True)
    ]
    broke = {**row["broke"], SEARCH: row["survivors"].count("1") - sum(standing)}
    survivors = "".join(str(int(each)) for each in standing)
    return {**row, "worst": 100 * sum(standing) / len(standing), "survivors": survivors, "broke": broke}


def verdict(base: Base, row: dict[str, Any], result: Result, last: Result | None) -> dict[str, Any]:
    """The row of a candidate in the table."""
    plain, ours, effect = result
    return {
        "last": None if last is None else {
            "images": len(last[0]["survivors"]), "lost": last[0]["clean"] - last[1]["clean"],
            "worst": last[1]["worst"], "plain": last[0]["worst"],
            "effect": asdict(last[2]), "broke": last[1]["broke"], "plain broke": last[0]["broke"],
        },
        "base": base.title, "threat": str(row["threat"]), "candidate": str(row["candidate"]), "images": REPORT,
        "apparent": row["apparent"], "lost": plain["clean"] - ours["clean"], "own": ours["own"],
        "worst": ours["worst"], "plain": plain["worst"], "effect": asdict(effect), "closed by": closing(ours),
    }  # fmt: skip


def _part(images: Images, first: int, count: int) -> Images:
    return images[0][first : first + count], images[1][first : first + count]


def _images(base: Base) -> torch.Tensor:
    assert base.training is not None
    return base.training[0][:CALIBRATION]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder with checkpoints/ and data/")
    parser.add_argument("--kept", type=Path, required=True, help="folder of trained models and of what was measured")
    parser.add_argument("--page", action="store_true", help="measure nothing more, and write what is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    lab = Lab("quick", args.shared / "data", args.shared / "checkpoints", args.kept / "models")
    study = Study(args.kept / "estimators.jsonl", args.page)
    rows = survey(study, lab)
    best = judged(study, lab, rows)
    text = markdown(rows, best)
    plain = [{**row, "threat": str(row["threat"]), "candidate": str(row["candidate"])} for row in rows]
    (args.out / "estimators.json").write_text(json.dumps({"all": plain, "best": best}, indent=1) + "\n")
    (args.out / "estimators.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
