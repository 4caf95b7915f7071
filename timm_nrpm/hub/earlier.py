"""Files of an earlier push in a repository, and which of them are still true of the model that is pushed now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_nrpm.errors import BrokenFolder, NotOnHub
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.templates import CARD, EVALUATION, parse_evaluation
from timm_nrpm.models.creation import LARGEST_CONFIG
from timm_nrpm.models.downloads import Repository
from timm_nrpm.models.format import LARGEST

LARGEST_CARD = 16 << 20
"""Most bytes that a card or a picture may have."""

STAYS = "The evaluation in the repository is of this same model, and was kept."
UNASKED = "The Hub was not asked: an evaluation in the repository is kept if it is of this same model, else removed."
OF_ANOTHER = "The earlier evaluation is of another model, and was removed with its numbers."


@dataclass(frozen=True)
class Earlier:
    """What a repository holds at one commit.

    Attributes:
        repository: The repository at that commit.
        card: Text of its card, if there is one.
        config: Content of the config of the model in it, if there is one of the same kind that this version reads.
        evaluation: Text of its `evaluation.json`, if there is one.
    """

    repository: Repository
    card: str | None
    config: Mapping[str, Any] | None
    evaluation: str | None

    @classmethod
    def read(cls, repository: Repository, config_name: str, parse: Callable[[Path, str], Mapping[str, Any]]) -> Earlier:
        """Read what the repository holds.

        Args:
            repository: The repository at the commit that the push continues.
            config_name: Name of the file that holds the config of a model of the kind that is pushed.
            parse: Function that checks and reads that file.

        Raises:
            timm_nrpm.errors.HubError: The Hub does not answer, or refuses.
        """
        path = _fetch(repository, config_name, LARGEST_CONFIG)
        try:
            config = None if path is None else parse(path, str(repository))
        except BrokenFolder:
            config = None  # whatever it holds, it is not the model that is pushed
        files = (_fetch(repository, name, LARGEST.get(name, LARGEST_CARD)) for name in (CARD, EVALUATION))
        card, evaluation = (None if file is None else file.read_text(encoding="utf-8") for file in files)
        return cls(repository, card, config, evaluation)

    def is_of(self, model: str) -> bool:
        """Whether the repository holds the model of this hash, with or without its weights."""
        return self.config is not None and bool(self.config["model"] == model)

    def picture(self, model: str) -> bytes | None:
        """The repository's picture, as PNG, if it shows the lambdas of the model of this hash."""
        path = _fetch(self.repository, PICTURE, LARGEST_CARD) if self.is_of(model) else None
        return None if path is None else path.read_bytes()

    def reports(
        self, model: str, given: Sequence[RobustnessReport] | None
    ) -> tuple[tuple[RobustnessReport, ...], tuple[str, ...]]:
        """The reports that the new card shows, and notes on what becomes of those in the repository.

        Args:
            model: Hash of the model that is pushed.
            given: Its reports, which replace those in the repository; None to keep the latter if they are still true.

        Raises:
            ValueError: The evaluation in the repository is of this very model, and cannot be read.
        """
        if self.evaluation is None:
            return tuple(given or ()), ()
        earlier = self._reports(model, given is None)
        if earlier is None:
            advice = "" if given else " Evaluate this one, and push it again with its reports."
            return tuple(given or ()), (f"{OF_ANOTHER}{advice}",)
        if given is None:
            return earlier, (STAYS,)
        missing = [str(report.threat) for report in earlier if report.threat not in {r.threat for r in given}]
        if not missing:
            return tuple(given), ()
        advice = "give it beside the others" if given else "leave out reports="
        return tuple(given), (f"The earlier report under {' and '.join(missing)} was removed: to keep it, {advice}.",)

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


def _fetch(repository: Repository, name: str, at_most: int) -> Path | None:
    """The path of a file in the cache; None if the repository does not have it."""
    try:
        return repository.fetch(name, at_most)
    except NotOnHub:
        return None
