"""Model cards that cannot claim more than was measured: they are rendered from the reports and the variant itself.

The part of a card between two marks is generated anew each time; the text that its owner wrote around it stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from timm_nrpm.attacks.flags import MEANINGS
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.figures.lambdas import draw_lambdas
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.downloads import REPO_ID
from timm_nrpm.models.format import CONFIG, TENSORS, Variant
from timm_nrpm.models.loading import find_variant

CARD, EVALUATION, PICTURE = "README.md", "evaluation.json", "lambdas.png"
TAGS = ("timm_nrpm", "timm", "adversarial-robustness")
BEGIN = "<!-- timm_nrpm: from here to the next mark this card is generated; write before or after it -->"
END = "<!-- timm_nrpm: end of what is generated -->"
BEFORE, AFTER = "<!-- before -->", "<!-- after -->"
"""Placeholders in the rendered template for the text around the generated part, which is then put there unchanged."""

LICENSE = ("license", "license_name", "license_link")
OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "model-index")
"""Keys of the metadata that are generated; the others of an existing card stay."""

HUB_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-amlr", "apple-ascl", "gemma")
"""Licences of timm's models that the Hub knows; it wants any other one as `other`, with a name."""


Metadata: TypeAlias = "dict[str, Any]"
"""Metadata of a card: the YAML between its first two lines of dashes."""


def render(
    variant: Variant,
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport] = (),
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
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
        existing: Text of the existing card, whose handwritten parts and other metadata stay.

    Raises:
        ValueError: A report is on another model, no licence is known, or the existing card cannot be read.

    Example:
        >>> folder = save_pretrained(model, "my-variant")
        >>> render(find_variant(folder).variant, folder, "me/resnet18-nrpm", [report]).save("README.md")
    """
    validate_repo_id(name)
    for report in reports:
        if report.sha256 != variant.model:
            raise ValueError(
                f"The report under {report.threat} is of another model ({report.sha256[:12]}... was attacked, and "
                f"{variant.model[:12]}... is published): evaluate the model as it is now."
            )
    kept = _kept(existing, name)
    data = _metadata(variant, folder, name, reports, kept, license, datasets)
    template = (files("timm_nrpm.hub_cards") / "template.md").read_text(encoding="utf-8")
    content = _content(variant, folder, name, reports)
    text = str(ModelCard.from_template(ModelCardData(**data), template_str=template, **content))
    text = re.sub(r"\n{3,}", "\n\n", text)  # gaps of the template; the text of others comes later
    text = text.replace(f"{BEFORE}\n", kept.before, 1).replace(AFTER, kept.after, 1)
    return ModelCard(text.rstrip() + "\n")


def _content(variant: Variant, folder: Path, name: str, reports: Sequence[RobustnessReport]) -> dict[str, Any]:
    """The values of the template's variables."""
    lams = [(layer, f"{lam:.4g}") for layer, lam in variant.lams.items()]
    values = list(variant.lams.values())
    flags = dict.fromkeys(flag for report in reports for flag in report.flags)
    base = variant.base
    return {
        "name": name,
        "before": f"{BEFORE}\n",
        "after": f"{AFTER}\n",
        "begin": BEGIN,
        "end": END,
        "full": variant.is_full,
        "base": _described(variant),
        "architecture": base.architecture,
        "settings": variant.config.estimator._asdict(),
        "public": base.is_public,
        "tuned": base.tuned,
        "quick": any(report.suite == "quick" for report in reports),
        "in_timm": _is_timms(base.architecture),
        "through_timm": not variant.is_full and TIMM_FILES[0] in variant.files,
        "source": _repository(variant) or base.name,
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
        "reports": reports,
        "percent": percent,
        "one_line": one_line,
        "own_accuracy": own_accuracy,
        "flags": [(f, MEANINGS.get(f, "")) for f in flags],
        "flagged": {f: ", ".join(str(r.threat) for r in reports if f in r.flags) for f in flags},
    }


def write_card(
    folder: Path,
    name: str,
    reports: Sequence[RobustnessReport] = (),
    existing: str | None = None,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    picture: bytes | None = None,
) -> Path:
    """Write the card of the variant in a folder, its picture (if Matplotlib is installed), and the reports behind it.

    Args:
        folder: Folder that holds a variant.
        name, reports, existing, license, datasets: The same as in :func:`render`.
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
    if reports:
        (folder / EVALUATION).write_text(evaluation_json(reports))
    else:
        (folder / EVALUATION).unlink(missing_ok=True)
    card = render(variant, folder, name, reports, license=license, datasets=datasets, existing=existing)
    (folder / CARD).write_text(str(card), encoding="utf-8")
    return folder / CARD


def read_reports(folder: Path) -> list[RobustnessReport]:
    """The reports in a variant's folder; empty if it has none."""
    path = folder / EVALUATION
    return parse_evaluation(path.read_text(encoding="utf-8")) if path.is_file() else []


def evaluation_json(reports: Sequence[RobustnessReport]) -> str:
    """The text of `evaluation.json`, which holds the reports behind a card."""
    return json.dumps({"reports": [json.loads(report.to_json()) for report in reports]}) + "\n"


def parse_evaluation(text: str) -> list[RobustnessReport]:
    """The reports in a text that :func:`evaluation_json` wrote.

    Raises:
        ValueError: The text is anything else.
    """
    try:
        return [RobustnessReport.from_dict(report) for report in json.loads(text)["reports"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{EVALUATION} holds no reports: {error!r}.") from error


def _repository(variant: Variant) -> str | None:
    """The repository of the base on the Hub, if it has one."""
    name = variant.base.name or ""
    repository = name.rpartition(":")[2].partition("@")[0] if ":" in name else variant.base.hub_id
    return repository if repository and REPO_ID.fullmatch(repository) else None


def _described(variant: Variant) -> str:
    """The base of a variant in words, as Markdown."""
    base = variant.base
    if repository := _repository(variant):
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
    if repository := _repository(variant):
        data |= {"base_model": repository, "base_model_relation": "finetune" if variant.base.tuned else "adapter"}
    if reports:
        data["model_name"] = name.rpartition("/")[2]
        data["eval_results"] = [result for report in reports for result in _results(report)]
    of_same_base = kept.existed and kept.base in (None, data.get("base_model"))
    for key in () if of_same_base and license is None and kept.metadata.get("license") else LICENSE:
        data.pop(key, None)
    if not of_same_base:
        data.pop("datasets", None)  # another base was trained on them
    if "license" not in data:
        data |= _license(license, variant, folder)
    data["tags"] = list(dict.fromkeys([*TAGS, *(kept.metadata.get("tags") or [])]))
    if datasets:
        data["datasets"] = list(datasets)
    return data


def _results(report: RobustnessReport) -> list[EvalResult]:
    """Accuracy when clean, under the paper's protocol and in the worst case, for the Hub's model-index."""
    data = report.data or "unnamed images"
    kind = re.sub(r"[^\w.-]+", "-", data.partition(",")[0].strip()).lower()
    labels = {
        "clean accuracy, %": report.clean,
        f"accuracy under PGD along its own gradient, {report.threat}, %": own_accuracy(report),
        f"worst-case accuracy, {report.threat}, suite {report.suite}, {report.samples} images, %": report.worst_case,
    }
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=kind,
            dataset_name=data,
            metric_type="accuracy",
            metric_name=label,
            metric_value=float(percent(share)),
        )
        for label, share in labels.items()
        if share is not None
    ]


def own_accuracy(report: RobustnessReport) -> float | None:
    """Accuracy under PGD along the model's own gradient, which is the paper's protocol; None if it was not run."""
    return report.accuracy("pgd") if any(attack.name == "pgd" for attack in report.attacks) else None


def percent(share: float) -> str:
    """A share in percent with one decimal, without the percent sign."""
    return f"{100 * share:.1f}"


def one_line(text: str) -> str:
    """The text in one line, so that it neither leaves its cell of a table nor works as markup."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


def _license(given: str | None, variant: Variant, folder: Path) -> Metadata:
    """Metadata of the licence that was given, or else of the one that the base's weights have."""
    if given is not None:
        return {"license": given}
    config = folder / TIMM_FILES[0]
    inherited = variant.base.license_in(json.loads(config.read_text())["pretrained_cfg"] if config.exists() else {})
    if not inherited:
        why = "did not come through a public name" if variant.base.name is None else "have a base that states none"
        raise ValueError(
            f"These weights {why}, so no licence is known: give one as license=, an identifier that the Hub knows, "
            "such as 'mit'."
        )
    return {"license": inherited} if inherited in HUB_LICENSES else {"license": "other", "license_name": inherited}


@dataclass(frozen=True)
class Kept:
    """The parts of an existing card that stay.

    Attributes:
        existed: Whether there was a card.
        before, after: Text before and after the generated part.
        metadata: Its metadata without the generated keys.
        base: The base model that the card named.
    """

    existed: bool
    before: str
    after: str
    metadata: Metadata
    base: object


def _kept(existing: str | None, name: str) -> Kept:
    """The parts of the card `existing` that stay; without a card, a heading made of `name`.

    Raises:
        ValueError: The metadata of the card cannot be read.
    """
    if existing is None:
        return Kept(False, f"# {name.rpartition('/')[2]}\n\n", "", {}, None)
    try:
        card = ModelCard(existing)
        content = card.data.to_dict()
        metadata = {k: v for k, v in content.items() if k not in OURS}
    except Exception as error:  # broken YAML raises errors of many kinds
        raise ValueError(
            f"The existing {CARD} has metadata that cannot be read ({error}): correct it first."
        ) from error
    before, marked, rest = card.text.replace("\r\n", "\n").partition(BEGIN)
    after = rest.partition(END)[2] if END in rest else rest
    if not marked:
        before = before.rstrip() + "\n\n"
    return Kept(True, before.lstrip("\n"), after.strip("\n"), metadata, content.get("base_model"))
