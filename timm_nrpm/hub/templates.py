"""A card from a template: what is generated anew each time, and what its owner wrote around it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import ModelCard, ModelCardData

from timm_nrpm.attacks.flags import MEANINGS
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.verdict import verdict
from timm_nrpm.version import INSTALL, PYTHON, __version__

CARD, EVALUATION = "README.md", "evaluation.json"
BEGIN = "<!-- timm_nrpm: from here to the next mark this card is generated; write before or after it -->"
END = "<!-- timm_nrpm: end of what is generated -->"
SEAL = re.compile(r"<!-- timm_nrpm: sha256 of the above ([0-9a-f]{16}) -->\n*$")
"""The last line of what is generated: a hash of all of it, by which changes that somebody made inside are noticed."""

PARTS = ("install", "preprocessing", "latency", "robustness")
"""Templates that several cards share; `{{ robustness }}` on a line of its own stands for robustness.md."""

BEFORE, AFTER = "<!-- before -->", "<!-- after -->"
"""Placeholders in the rendered template for the text around the generated part, which is then put there unchanged."""

OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "model-index")
"""Keys of the metadata that are generated; the others of an existing card stay."""

Metadata: TypeAlias = "dict[str, Any]"
"""Metadata of a card: the YAML between its first two lines of dashes."""


def written(template: str, data: Metadata, kept: Kept, content: Metadata) -> ModelCard:
    """The card that a template gives.

    Args:
        template: Name of the template.
        data: Its metadata.
        kept: The parts of an existing card that stay.
        content: The values of the template's variables.
    """
    whole = _text_of(template)
    for part in PARTS:
        whole = whole.replace(f"{{{{ {part} }}}}\n", _text_of(f"{part}.md"))
    marks = {"before": f"{BEFORE}\n", "after": f"{AFTER}\n", "begin": BEGIN, "end": END}
    how: Metadata = {"version": __version__, "install": INSTALL, "python": PYTHON, "one_line": one_line}
    text = str(ModelCard.from_template(ModelCardData(**data), template_str=whole, **content, **marks, **how))
    text = re.sub(r"\n{3,}", "\n\n", text)  # gaps of the template; the text of others comes later
    generated = text.partition(BEGIN)[2].partition(END)[0]
    text = text.replace(END, f"<!-- timm_nrpm: sha256 of the above {_hash_of(generated)} -->\n{END}", 1)
    head, _, rest = text.partition(f"{BEFORE}\n")
    middle, _, _ = rest.partition(AFTER)  # both are found before any text of others, which may name them
    return ModelCard(f"{head}{kept.before}{middle}{kept.after}".rstrip() + "\n")


def _text_of(name: str) -> str:
    return (files("timm_nrpm.hub_cards") / name).read_text(encoding="utf-8")


def _hash_of(generated: str) -> str:
    return hashlib.sha256(generated.strip().encode()).hexdigest()[:16]


def is_edited(card: str) -> bool:
    """Whether somebody changed the generated part of a card, where the next one does not keep it."""
    _, generated, _ = _split(card)
    seal = SEAL.search(generated)
    return bool(generated) and (seal is None or seal[1] != _hash_of(generated[: seal.start()]))


def _split(card: str) -> tuple[bool, str, str]:
    """Whether a card has a generated part, that part, and what comes behind it."""
    _, marked, rest = card.replace("\r\n", "\n").partition(BEGIN)
    generated, ended, after = rest.partition(END)
    return bool(marked), generated if ended else "", after if ended else rest


def measured(reports: Sequence[RobustnessReport], beside: str, caveat: str) -> Metadata:
    """The values of the variables in the part on robustness.

    Args:
        reports: The reports.
        beside: The model that this one is compared with, in words.
        caveat: What follows from the comparison.
    """
    flags = dict.fromkeys(flag for report in reports for flag in report.flags)
    adaptive = all(report.suite == "adaptive" for report in reports)
    return {
        "reports": reports,
        "verdict": verdict(reports),
        "adaptive": adaptive,
        "share": "worst case" if adaptive else "share that all attacks of the suite leave",
        "percent": percent,
        "own_accuracy": own_accuracy,
        "flags": [(f, MEANINGS.get(f, "")) for f in flags],
        "flagged": {f: ", ".join(str(r.threat) for r in reports if f in r.flags) for f in flags},
        "beside": beside,
        "caveat": caveat,
    }


def own_accuracy(report: RobustnessReport) -> float | None:
    """Accuracy under PGD along the model's own gradient, which is the paper's protocol; None if it was not run."""
    return report.own_gradient


def percent(share: float) -> str:
    """A share in percent with one decimal, without the percent sign."""
    return f"{100 * share:.1f}"


def one_line(text: str) -> str:
    """The text in one line, so that it neither leaves its cell of a table nor works as markup."""
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


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


def kept_of(existing: str | None, name: str) -> Kept:
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
    begun, _, after = _split(card.text)
    before = card.text.replace("\r\n", "\n").partition(BEGIN)[0]
    if not begun:
        before = before.rstrip() + "\n\n"
    return Kept(True, before.lstrip("\n"), after.strip("\n"), metadata, content.get("base_model"))


def tagged(ours: Sequence[str], given: Sequence[str], kept: Kept) -> list[str]:
    """Tags of a new card: this package's, those that are given, and those in the existing card, each once."""
    return list(dict.fromkeys([*ours, *given, *(kept.metadata.get("tags") or [])]))


def check_reports(reports: Sequence[RobustnessReport], model: str) -> None:
    """Raise a ValueError for a report that is not on the model of this hash."""
    for report in reports:
        if report.sha256 != model:
            raise ValueError(
                f"The report under {report.threat} is of another model ({report.sha256[:12]}... was attacked, and "
                f"{model[:12]}... is the model here): evaluate it as it is now."
            )


def write_evaluation(reports: Sequence[RobustnessReport], folder: Path) -> None:
    """Write the reports behind a card to its folder; without any, the file goes."""
    if reports:
        (folder / EVALUATION).write_text(evaluation_json(reports))
    else:
        (folder / EVALUATION).unlink(missing_ok=True)


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
