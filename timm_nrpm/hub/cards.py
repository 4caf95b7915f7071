"""Model cards that cannot claim more than was measured: they are rendered from the reports and the variant itself.

The part of a card between two marks is generated anew each time; the text that its owner wrote around it stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import timm
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.lambdas import draw_lambdas
from timm_nrpm.hub.latency import read_cost, timed, write_cost
from timm_nrpm.hub.model_index import evaluated
from timm_nrpm.hub.preprocessing import prepared
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
from timm_nrpm.models.downloads import REPO_ID
from timm_nrpm.models.format import CONFIG, TENSORS, Variant
from timm_nrpm.models.loading import find_variant

PICTURE = "lambdas.png"
TAGS = ("timm_nrpm", "timm", "adversarial-robustness")
LICENSE = ("license", "license_name", "license_link")
HUB_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-amlr", "apple-ascl", "gemma")
"""Licences of timm's models that the Hub knows; it wants any other one as `other`, with a name."""


def render(
    variant: Variant,
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport] = (),
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    cost: CostReport | None = None,
    existing: str | None = None,
) -> ModelCard:
    """The card of a variant.

    Args:
        variant: The variant to publish.
        folder: The folder that holds its files, and its picture if there is one.
        name: Name of the repository on the Hub, `owner/name`.
        reports: Reports on this very model, one for each threat; without any, the card says that it is not evaluated.
        license: Identifier of a licence that the Hub knows. The default is the licence in the existing card, or the
            base's if there is no such card or it names another base.
        datasets: Names on the Hub of the datasets that the model was trained on. The default is those in the existing
            card, unless it names another base.
        tags: Further tags, beside those in the existing card and those of this package.
        cost: What a forward of the model costs; without it, the card says that this is not known.
        existing: Text of the existing card, whose handwritten parts and other metadata stay.

    Raises:
        ValueError: A report is on another model, no licence is known, or the existing card cannot be read.

    Example:
        >>> folder = save_pretrained(model, "my-variant")
        >>> render(find_variant(folder).variant, folder, "me/resnet18-nrpm", [report]).save("README.md")
    """
    validate_repo_id(name)
    check_reports(reports, variant.model)
    kept = kept_of(existing, name)
    data = _metadata(variant, folder, name, reports, kept, license, datasets)
    data["tags"] = tagged(TAGS, tags, kept)
    content = _content(variant, folder, name) | measured(reports, *BESIDE[variant.base.tuned])
    content |= prepared(folder / TIMM_FILES[0]) | timed(cost, "the plain model")
    return written("template.md", data, kept, content)


BESIDE = {
    True: (
        "these weights at lambda 1",
        "The weights were tuned together with the estimates, so these weights at lambda 1 are no fair comparison. A "
        "fair one would be a\nplain model tuned in the same way, which this report does not have; without it, "
        "reprogramming has not been shown to help.",
    ),
    False: (
        "the plain model",
        "If the interval contains the plain model's number, reprogramming has not been shown to help; if the interval "
        "lies below that number,\nreprogramming has been shown to harm.",
    ),
}
"""What the model is compared with, by whether weights were tuned, and what follows from it."""


def _content(variant: Variant, folder: Path, name: str) -> Metadata:
    """The values of the template's variables."""
    lams = [(layer, f"{lam:.4g}") for layer, lam in variant.lams.items()]
    values = list(variant.lams.values())
    base = variant.base
    return {
        "name": name,
        "full": variant.is_full,
        "base": described(variant),
        "architecture": base.architecture,
        "settings": variant.config.estimator._asdict(),
        "public": base.is_public,
        "tuned": base.tuned,
        "in_timm": _is_timms(base.architecture),
        "through_timm": not variant.is_full and TIMM_FILES[0] in variant.files,
        "source": repository_of(variant) or base.name,
        "revision": base.revision,
        "calibrated": bool(variant.tensors),
        "standardized": variant.config.standardize,
        "statistics": ", then ".join(map(str, variant.statistics)),
        "size": sum((folder / file).stat().st_size for file in (CONFIG, TENSORS)),
        "lams": lams,
        "low": f"{min(values):.4g}",
        "high": f"{max(values):.4g}",
        "mean": f"{sum(values) / len(values):.4g}",
        "picture": PICTURE if (folder / PICTURE).exists() else None,
    }


def write_card(
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport] = (),
    existing: str | None = None,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    cost: CostReport | None = None,
    picture: bytes | None = None,
) -> Path:
    """Write the card of the variant in a folder, its picture (if Matplotlib is installed), and what is behind it: the
    reports and the cost.

    Args:
        folder: Folder that holds a variant.
        name, reports, existing, license, datasets, tags: The same as in :func:`render`.
        cost: What a forward of the model costs; the default is what the folder has of this very model, if anything.
        picture: A PNG of these very lambdas, which is used if Matplotlib is not installed.

    Returns:
        Path of the card.

    Example:
        >>> write_card(save_pretrained(model, "my-variant"), "me/resnet18-nrpm", [report])
        PosixPath('my-variant/README.md')
    """
    variant = find_variant(folder, weights=False).variant
    try:
        draw_lambdas(variant.lams, folder / PICTURE)
    except ImportError:
        if picture is None:
            (folder / PICTURE).unlink(missing_ok=True)  # the card has the same numbers in a table
        else:
            (folder / PICTURE).write_bytes(picture)
    write_evaluation(reports, folder)
    cost = cost or read_cost(folder, variant.model)
    write_cost(cost, variant.model, folder)
    card = render(
        variant, folder, name, reports, license=license, datasets=datasets, tags=tags, cost=cost, existing=existing
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")
    return folder / CARD


def repository_of(variant: Variant) -> str | None:
    """The repository of the base on the Hub, if it has one."""
    name = variant.base.name or ""
    repository = name.rpartition(":")[2].partition("@")[0] if ":" in name else variant.base.hub_id
    return repository if repository and REPO_ID.fullmatch(repository) else None


def described(variant: Variant) -> str:
    """The base of a variant in words, as Markdown."""
    base = variant.base
    if repository := repository_of(variant):
        return f"[{repository}](https://huggingface.co/{repository})"
    if base.name:
        return f"{'timm' if _is_timms(base.architecture) else 'timm_nrpm'}'s `{base.name}`"
    return f"a `{base.architecture}` whose weights have no public name"


def _is_timms(architecture: str) -> bool:
    """Whether timm itself has the architecture, without this package."""
    known = timm.is_model(architecture)
    return known and timm.models.model_entrypoint(architecture).__module__.startswith("timm.")


def _metadata(
    variant: Variant,
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport],
    kept: Kept,
    license: str | None,
    datasets: Sequence[str],
) -> Metadata:
    """The metadata of a new card: the earlier card's, except for what follows from the variant and its reports."""
    data = {**kept.metadata, "library_name": "timm_nrpm", "pipeline_tag": "image-classification"}
    if repository := repository_of(variant):
        data |= {"base_model": repository, "base_model_relation": "finetune" if variant.base.tuned else "adapter"}
    data |= evaluated(name, reports)
    forget_what_is_of_another_base(data, kept, license)
    if "license" not in data:
        data |= license_of(license, variant, folder / TIMM_FILES[0])
    if datasets:
        data["datasets"] = list(datasets)
    return data


def forget_what_is_of_another_base(data: Metadata, kept: Kept, license: str | None) -> None:
    """Remove the licence of an earlier card where another is given or the base is another, and then its datasets too.

    Args:
        data: Metadata of the new card, which names its base.
        kept: The earlier card.
        license: The licence that is given, if any.
    """
    of_same_base = kept.existed and kept.base in (None, data.get("base_model"))
    for key in () if of_same_base and license is None and kept.metadata.get("license") else LICENSE:
        data.pop(key, None)
    if not of_same_base:
        data.pop("datasets", None)  # another base was trained on them


def license_of(given: str | None, variant: Variant, config: Path) -> Metadata:
    """Metadata of the licence that was given, or else of the one that the base's weights have; `config` is timm's."""
    if given is not None:
        return {"license": given}
    inherited = variant.base.license_in(json.loads(config.read_text())["pretrained_cfg"] if config.exists() else {})
    if not inherited:
        why = "did not come through a public name" if variant.base.name is None else "have a base that states none"
        raise ValueError(
            f"These weights {why}, so no licence is known: give one as license=, an identifier that the Hub knows, "
            "such as 'mit'."
        )
    return {"license": inherited} if inherited in HUB_LICENSES else {"license": "other", "license_name": inherited}
