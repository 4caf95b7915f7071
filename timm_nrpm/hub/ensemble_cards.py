"""Cards of ensembles, which say what they are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from timm_nrpm.ensembles.folders import FoundEnsemble, find_ensemble
from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.report import MEMBER, NAMES, RobustnessReport
from timm_nrpm.hub.cards import TAGS, described, forget_what_is_of_another_base, license_of, repository_of
from timm_nrpm.hub.latency import read_cost, timed, write_cost
from timm_nrpm.hub.model_index import evaluated
from timm_nrpm.hub.preprocessing import images_of, in_words, numbers
from timm_nrpm.hub.templates import (
    CARD,
    Kept,
    Metadata,
    check_reports,
    kept_of,
    measured,
    tagged,
    write_evaluation,
    written,
)
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.format import Variant

WHAT = {
    "adaptive-smoothing": "the probabilities of an accurate and of a robust model, mixed "
    "([Bai et al., arXiv 2301.12554](https://arxiv.org/abs/2301.12554))",
    "crossmax": "one model at several resolutions and depths, whose predictions are joined robustly "
    "([Fort and Lakshminarayanan, arXiv 2408.05446](https://arxiv.org/abs/2408.05446))",
}
"""What each kind of ensemble is, in Markdown."""

CAVEAT = (
    "If the interval contains that member's number, joining has not been shown to help; if the interval lies below "
    "that number,\njoining has been shown to harm."
)


def write_ensemble_card(
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport] = (),
    existing: str | None = None,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    cost: CostReport | None = None,
) -> Path:
    """Write the card of the ensemble in a folder, and the reports and the cost behind it.

    Args:
        folder: Folder that holds an ensemble.
        name, reports, existing, license, datasets, tags, cost: The same as in
            :func:`timm_nrpm.hub.cards.write_card`.

    Returns:
        Path of the card.

    Raises:
        ValueError: A report is on another model, no licence is known, or the existing card cannot be read.
    """
    validate_repo_id(name)
    found = find_ensemble(folder)
    if found is None:
        raise ValueError(f"{folder} holds no ensemble: give a folder that save_pretrained wrote of one.")
    model = str(found.content["model"])
    check_reports(reports, model)
    write_evaluation(reports, folder)
    cost = cost or read_cost(folder, model)
    write_cost(cost, model, folder)
    variants = {member: each.variant for member, each in found.members().items()}
    kept = kept_of(existing, name)
    data = _metadata(variants, folder, name, reports, kept, license, datasets)
    data["tags"] = tagged((*TAGS, "ensemble"), tags, kept)
    content = _content(found, variants, name) | measured(reports, NAMES[MEMBER], CAVEAT)
    content |= _images(variants, folder) | timed(cost, "the same ensemble of plain members")
    (folder / CARD).write_text(str(written("ensemble.md", data, kept, content)), encoding="utf-8")
    return folder / CARD


def _content(found: FoundEnsemble, variants: dict[str, Variant], name: str) -> Metadata:
    """The values of the template's variables, but for those on robustness."""
    kind, described_members = found.content["kind"], found.content["members"]
    members = [
        {
            "name": member,
            "model": described(variant),
            "layers": "none" if described_members[member]["plain"] else str(len(variant.lams)),
            "size": " x ".join(map(str, described_members[member]["size"] or ())),
            "mean": numbers(described_members[member]["mean"]),
            "std": numbers(described_members[member]["std"]),
        }
        for member, variant in variants.items()
    ]
    settings = [(key, json.dumps(value)) for key, value in found.content["settings"].items() if value is not None]
    channels = max(len(each["mean"]) for each in described_members.values())
    return {"name": name, "kind": kind, "what": WHAT[kind], "members": members, "settings": settings,
            "channels": channels}  # fmt: skip


def _images(variants: dict[str, Variant], folder: Path) -> Metadata:
    """The values of the variables in the part on preprocessing: the images of the largest member."""
    known = [images for member in variants if (images := images_of(folder / f"{member}.{TIMM_FILES[0]}"))]
    largest = max(known, key=lambda images: images["input_size"][1], default=None)
    return {"images_of": None if largest is None else in_words(largest), "normalises": True}


def _metadata(
    variants: dict[str, Variant],
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport],
    kept: Kept,
    license: str | None,
    datasets: Sequence[str],
) -> Metadata:
    """The metadata of a new card: the earlier card's, except for what follows from the ensemble and its reports."""
    data: Metadata = {**kept.metadata, "library_name": "timm_nrpm", "pipeline_tag": "image-classification"}
    bases = [repository for variant in variants.values() if (repository := repository_of(variant))]
    if bases:
        data["base_model"] = list(dict.fromkeys(bases))
    data |= evaluated(name, reports)
    forget_what_is_of_another_base(data, kept, license)
    if "license" not in data:
        data |= _license(license, variants, folder)
    if datasets:
        data["datasets"] = list(datasets)
    return data


def _license(given: str | None, variants: dict[str, Variant], folder: Path) -> dict[str, Any]:
    """Metadata of the licence that was given, or else of the one that all members' weights have.

    Raises:
        ValueError: None was given, and the members' differ or are not known.
    """
    found = [license_of(given, variant, folder / f"{member}.{TIMM_FILES[0]}") for member, variant in variants.items()]
    if any(each != found[0] for each in found):
        names = ", ".join(f"{each.get('license_name', each['license'])} of {name}"
                          for name, each in zip(variants, found, strict=True))  # fmt: skip
        raise ValueError(f"The members' weights have different licences, {names}: give the ensemble's as license=.")
    return found[0]
