"""What a repository holds of an earlier push, and what of it is still true of the variant that is pushed now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_nrpm.errors import BrokenVariant, NotOnHub
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub.cards import CARD, EVALUATION, PICTURE, parse_evaluation
from timm_nrpm.models.creation import TIMM_FILES
from timm_nrpm.models.downloads import Repository
from timm_nrpm.models.format import CONFIG, LARGEST, Variant, parse_config

LARGEST_CARD = 16 << 20
"""Bytes that a card or a picture may have."""

STAYS = "The evaluation that is there is of this same model, and stays."
UNASKED = "The Hub was not asked: an evaluation of this same model that is there would stay, another would go."
OF_ANOTHER = "The evaluation that was there is of another model, and went with its numbers."


@dataclass(frozen=True)
class Earlier:
    """What a repository holds at one commit.

    Attributes:
        repository: The repository at that commit.
        card: Text of its card, if there is one.
        config: Content of its `nrpm_config.json`, if there is one that this version reads.
        evaluation: Text of its `evaluation.json`, if there is one.
    """

    repository: Repository
    card: str | None
    config: dict[str, Any] | None
    evaluation: str | None

    @classmethod
    def read(cls, repository: Repository) -> Earlier:
        """Ask the Hub.

        Args:
            repository: The repository at the commit that the push continues.

        Raises:
            timm_nrpm.errors.HubError: The Hub does not answer.
        """
        path = _fetch(repository, CONFIG, LARGEST[CONFIG])
        try:
            config = None if path is None else parse_config(path, str(repository))
        except BrokenVariant:
            config = None  # whatever it is, it is another model
        files = (_fetch(repository, name, LARGEST.get(name, LARGEST_CARD)) for name in (CARD, EVALUATION))
        card, evaluation = (None if file is None else file.read_text(encoding="utf-8") for file in files)
        return cls(repository, card, config, evaluation)

    def is_of(self, variant: Variant) -> bool:
        """Whether the model that is there is this very one, in whatever form."""
        return self.config is not None and bool(self.config["model"] == variant.model)

    def holds_weights_of(self, variant: Variant) -> bool:
        """Whether the weights that are there are those that a variant is based on."""
        if self.config is None or TIMM_FILES[1] not in self.config["files"]:
            return False
        base = self.config["base"]
        return isinstance(base, dict) and base.get("sha256") == variant.base.sha256

    def picture(self, variant: Variant) -> bytes | None:
        """The picture of these very lambdas, if it is there."""
        path = _fetch(self.repository, PICTURE, LARGEST_CARD) if self.is_of(variant) else None
        return None if path is None else path.read_bytes()

    def reports(
        self, variant: Variant, given: Sequence[RobustnessReport] | None
    ) -> tuple[tuple[RobustnessReport, ...], tuple[str, ...]]:
        """The reports that the card shows from now on, and what is to be said about those that are there.

        Args:
            variant: The variant that is pushed.
            given: Its reports, which take the place of those that are there; None for those that are there and still
                true.

        Raises:
            ValueError: The evaluation that is there is of this very model, and cannot be read.
        """
        if self.evaluation is None:
            return tuple(given or ()), ()
        there = self._reports(variant, given is None)
        if there is None:
            advice = "" if given else " Evaluate this one, and push it again with its reports."
            return tuple(given or ()), (f"{OF_ANOTHER}{advice}",)
        if given is None:
            return there, (STAYS,)
        missing = [str(report.threat) for report in there if report.threat not in {r.threat for r in given}]
        if not missing:
            return tuple(given), ()
        advice = "give it beside the others" if given else "leave out reports="
        return tuple(given), (f"The report under {' and '.join(missing)} that was there went: to keep it, {advice}.",)

    def _reports(self, variant: Variant, needed: bool) -> tuple[RobustnessReport, ...] | None:
        """The reports that are there: None if they are of another model, none if they are broken and not needed."""
        if not self.is_of(variant):
            return None
        try:
            there = tuple(parse_evaluation(self.evaluation or ""))
        except ValueError as error:
            if not needed:
                return ()
            raise ValueError(
                f"The {EVALUATION} that is in {self.repository.repo_id} cannot be read, and nothing was sent: {error} "
                "Give reports= of this model, or reports=() to remove it."
            ) from None
        return there if all(report.sha256 == variant.model for report in there) else None


def _fetch(repository: Repository, name: str, at_most: int) -> Path | None:
    """A file's path in the cache; None if the repository has none."""
    try:
        return repository.fetch(name, at_most)
    except NotOnHub:
        return None
