"""Files of an earlier push in a repository, and which of them are still true of the model that is pushed now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_nrpm.errors import BrokenFolder, NotOnHub
from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.latency import COST, parse_cost
from timm_nrpm.hub.templates import CARD, EVALUATION, parse_evaluation
from timm_nrpm.models.creation import LARGEST_CONFIG
from timm_nrpm.models.downloads import Repository
from timm_nrpm.models.format import LARGEST

LARGEST_CARD = 16 << 20
"""Most bytes that a card or a picture may have."""

STAYS = "The evaluation in the repository is of this same model, and was kept."
UNASKED = "The Hub was not asked: an evaluation in the repository is kept if it is of this same model, else removed."
UNKNOWN = "What the repository would lose is not known without the Hub; a push asks first, or is refused."
OF_ANOTHER = "The earlier evaluation is of another model, and was removed with its numbers."


@dataclass(frozen=True)
class Earlier:
    """What a repository holds at one commit.

    Attributes:
        repository: The repository at that commit.
        sizes: Size in bytes of each file at its top, by name.
        models: Content of the config of each model in it, by the name of that file; None for one that this version
            cannot read.
        card: Text of its card, if there is one.
        evaluation: Text of its `evaluation.json`, if it belongs to a model of this package.
        cost: Text of its `cost.json`, likewise.
    """

    repository: Repository
    sizes: Mapping[str, int]
    models: Mapping[str, Mapping[str, Any] | None]
    card: str | None
    evaluation: str | None
    cost: str | None

    @classmethod
    def read(
        cls,
        repository: Repository,
        sizes: Mapping[str, int],
        parsers: Mapping[str, Callable[[Path, str], Mapping[str, Any]]],
    ) -> Earlier:
        """Read what the repository holds.

        Args:
            repository: The repository at the commit that the push continues.
            sizes: Size in bytes of each file at its top, by name.
            parsers: Functions that check and read the config of a model of each kind, by the name of that file.

        Raises:
            timm_nrpm.errors.HubError: The Hub does not answer, or refuses.
        """
        models: dict[str, Mapping[str, Any] | None] = {}
        for name, parse in parsers.items():
            if (path := _fetch(repository, name, sizes)) is not None:
                try:
                    models[name] = parse(path, str(repository))
                except BrokenFolder:
                    models[name] = None  # whatever it holds, it is not the model that is pushed
        names = (CARD, *((EVALUATION, COST) if models else ()))
        files = {name: _fetch(repository, name, sizes) for name in names}
        texts = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file is not None}
        return cls(repository, sizes, models, texts.get(CARD), texts.get(EVALUATION), texts.get(COST))

    def owned(self, beside: Sequence[str]) -> frozenset[str]:
        """Names of the files that belong to models of this package.

        Args:
            beside: Names of the files that a push adds to those of a model.
        """
        files = [name for content in self.models.values() if content is not None for name in content["files"]]
        return frozenset([*self.models, *files, *(beside if self.models else ())]) & self.sizes.keys()

    def is_of(self, model: str) -> bool:
        """Whether the repository holds the model of this hash, with or without its weights."""
        return any(content is not None and content["model"] == model for content in self.models.values())

    def picture(self, model: str) -> bytes | None:
        """The repository's picture, as PNG, if it shows the lambdas of the model of this hash."""
        path = _fetch(self.repository, PICTURE, self.sizes) if self.is_of(model) else None
        return None if path is None else path.read_bytes()

    def known_cost(self, model: str) -> CostReport | None:
        """What a forward of the model of this hash costs, if the repository says it."""
        return parse_cost(self.cost, model) if self.is_of(model) else None

    def reports(
        self, model: str, given: Sequence[RobustnessReport] | None
    ) -> tuple[tuple[RobustnessReport, ...], tuple[str, ...], tuple[str, ...]]:
        """The reports that the new card shows, notes on what becomes of those in the repository, and what is lost.

        Args:
            model: Hash of the model that is pushed.
            given: Its reports, which replace those in the repository; None to keep the latter if they are still true.

        Raises:
            ValueError: The evaluation in the repository is of this very model, and cannot be read.
        """
        if self.evaluation is None:
            return tuple(given or ()), (), ()
        earlier = self._reports(model, given is None)
        if earlier is None:
            lost = () if given else (f"{EVALUATION} ({self.sizes[EVALUATION]:,} bytes), which is of another model",)
            advice = "" if given else " Evaluate this one, and push it again with its reports."
            return tuple(given or ()), (f"{OF_ANOTHER}{advice}",), lost
        if given is None:
            return earlier, (STAYS,), ()
        if not earlier:
            return tuple(given), (), (f"{EVALUATION} ({self.sizes[EVALUATION]:,} bytes), which cannot be read",)
        missing = [str(report.threat) for report in earlier if report.threat not in {r.threat for r in given}]
        if not missing:
            return tuple(given), (), ()
        advice = "give it beside the others" if given else "leave out reports="
        what = f"report under {' and '.join(missing)}"
        notes = (f"The earlier {what} was removed: to keep it, {advice}.",)
        return tuple(given), notes, (f"the {what} (to keep it, {advice})",)

    def _reports(self, model: str, needed: bool) -> tuple[RobustnessReport, ...] | None:
        """The reports in the repository: None if they are of another model, `()` if they are broken and not needed."""
        if not self.is_of(model):
            return None
        try:
            reports = tuple(parse_evaluation(self.evaluation or ""))
        except ValueError as error:
            if not needed:
                return ()
            raise ValueError(
                f"The {EVALUATION} in {self.repository.repo_id} cannot be read, and nothing was sent: {error} "
                "Give reports= of this model, or reports=() to remove it."
            ) from None
        return reports if all(report.sha256 == model for report in reports) else None


def _fetch(repository: Repository, name: str, sizes: Mapping[str, int]) -> Path | None:
    """The path of a file in the cache; None if the repository does not have it."""
    if name not in sizes:
        return None
    try:
        return repository.fetch(name, LARGEST.get(name, LARGEST_CONFIG if name.endswith(".json") else LARGEST_CARD))
    except NotOnHub:
        return None
