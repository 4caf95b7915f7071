"""What a push would take away from a repository, which is asked about before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

from huggingface_hub import ModelCard

from timm_nrpm.checks import printable
from timm_nrpm.hub.cards import LICENSE
from timm_nrpm.hub.contents import BESIDE, Contents, title_of
from timm_nrpm.hub.earlier import Earlier
from timm_nrpm.hub.model_index import evaluated
from timm_nrpm.hub.templates import CARD, Metadata, is_edited, parse_evaluation

Consent: TypeAlias = "bool | Callable[[tuple[str, ...]], bool]"
"""Whether a push may take something away; or a function that is given what would go, and answers."""

READERS = "its readers, since it is public and would be private"


def check_consent(repo_id: str, lost: tuple[str, ...], consent: Consent) -> None:
    """Raise a ValueError that lists what a push would take away, unless it may.

    Args:
        repo_id: The repository, `owner/name`.
        lost: What would go; nothing is asked if this is empty.
        consent: The answer.
    """
    if lost and not (consent(lost) if callable(consent) else consent):
        raise ValueError(
            f"{repo_id} would lose {'; '.join(lost)}. Nothing was sent: give allow_removal=True if that may go."
        )


def lost_files(
    earlier: Earlier, contents: Contents, changed: Collection[str], stale: Collection[str]
) -> tuple[str, ...]:
    """Models and files that would go.

    What is made anew with each push is not among them, nor the reports, which :meth:`Earlier.reports` lists.

    Args:
        earlier: What the repository holds.
        contents: What is pushed.
        changed, stale: Names of the files that are sent and deleted.
    """
    others = [
        f"{'a model that this version cannot read' if content is None else title_of(name, content)}, in whose place "
        f"{contents.title} would come"
        for name, content in earlier.models.items()
        if content is None or title_of(name, content) != contents.title
    ]
    gone = [_with_size(name, earlier) for name in stale if name not in BESIDE]
    owned = earlier.owned(BESIDE)
    foreign = [
        f"{_with_size(name, earlier)}, which is of no model of timm_nrpm and would be overwritten"
        for name in changed
        if name in earlier.sizes and name not in owned and name != CARD
    ]
    return tuple(map(printable, [*others, *gone, *foreign]))


def lost_words(earlier: Earlier, card: str, license: str | None) -> tuple[str, ...]:
    """What would go from the card: metadata that is not generated, and changes by hand where the generated text stands.

    Args:
        earlier: What the repository holds, with its card.
        card: Text of the new card.
        license: The licence that is given, which takes the place of any other.
    """
    if earlier.card is None:
        return ()
    old, new = ModelCard(earlier.card).data.to_dict(), ModelCard(card).data.to_dict()
    lost = []
    if license is None and old.get("license") and any(old.get(key) != new.get(key) for key in LICENSE):
        was, becomes = (data.get("license_name") or data.get("license") for data in (old, new))
        lost.append(f"the licence {was}, in whose place {becomes} would come unless it is given")
    if datasets := [name for name in _listed(old.get("datasets")) if name not in _listed(new.get("datasets"))]:
        lost.append(f"the datasets on the card, {', '.join(datasets)}, unless they are given")
    if bases := [name for name in _listed(old.get("base_model")) if name not in _listed(new.get("base_model"))]:
        lost.append(f"the base model on the card, {', '.join(bases)}")
    ours = _metrics(_generated(earlier)) | _metrics(new)
    if others := sorted(_metrics(old) - ours):
        lost.append(f"numbers in the card's model-index: {', '.join(others)}")
    if is_edited(earlier.card):
        lost.append(f"what was changed by hand inside the generated part of {CARD}")
    return tuple(map(printable, lost))


def _with_size(name: str, earlier: Earlier) -> str:
    return f"{name} ({earlier.sizes[name]:,} bytes)"


def _listed(value: object) -> list[str]:
    """A value of a card's metadata, which may be one name or several, as a list."""
    return [str(each) for each in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _generated(earlier: Earlier) -> Metadata:
    """Metadata that this version generates of the reports in the repository."""
    try:
        reports = parse_evaluation(earlier.evaluation or "")
    except ValueError:
        return {}
    results = evaluated(earlier.repository.repo_id, reports).get("eval_results", [])
    return {"model-index": [{"results": [{"metrics": [{"name": result.metric_name} for result in results]}]}]}


def _metrics(data: Metadata) -> set[str]:
    """Names of the numbers in the model-index of some metadata, whoever wrote it."""
    found: set[str] = set()
    for model in _dicts(data.get("model-index")):
        for result in _dicts(model.get("results")):
            found |= {str(metric.get("name") or metric.get("type")) for metric in _dicts(result.get("metrics"))}
    return found


def _dicts(value: object) -> Iterable[Metadata]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
