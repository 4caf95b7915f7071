"""The steps of a push once its folder is complete: look, ask what may go, commit, and what comes after the commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from huggingface_hub.hf_api import RepoFile  # version 1.0 has it here alone

from timm_nrpm.evaluation.cost_report import CostReport
from timm_nrpm.evaluation.report import RobustnessReport
from timm_nrpm.hub import visibility as visible
from timm_nrpm.hub.cards import PICTURE
from timm_nrpm.hub.collection import added, existing
from timm_nrpm.hub.contents import BESIDE, PARSERS, About, Contents
from timm_nrpm.hub.earlier import Earlier
from timm_nrpm.hub.losses import READERS, Consent, check_consent, lost_files, lost_words
from timm_nrpm.hub.published import Published
from timm_nrpm.hub.pushing import Push
from timm_nrpm.hub.templates import CARD
from timm_nrpm.hub.visibility import PRIVATE, PUBLIC
from timm_nrpm.models.downloads import Repository


@dataclass(frozen=True)
class Sending:
    """What is sent, and how.

    Attributes:
        contents: The files, in a folder that is complete.
        about: What the card says beyond them.
        reports: Reports on the model; None to keep those in the repository if they are still true.
        cost: What a forward costs, if that was given and not found or estimated.
        completes: Whether weights that the repository holds are sent, too, since they are still the model's.
        visibility: Who may read the repository; None to leave that.
        collection: Slug or title of a collection that the repository is added to, if any.
        message: Title of the commit.
        pull_request: Whether to open a pull request.
        consent: Whether anything may be taken away.
    """

    contents: Contents
    about: About
    reports: Sequence[RobustnessReport] | None
    cost: CostReport | None
    completes: bool
    visibility: str | None
    collection: str | None
    message: str
    pull_request: bool
    consent: Consent

    def send(self, push: Push) -> Published:
        """Push the files, if they differ from what the repository holds.

        Raises:
            ValueError: The push would take something away, and may not, or the card in the repository cannot be read.
            timm_nrpm.errors.HubError: A step failed; the message says which one.
        """
        existing(push, self.collection)  # a slug that is wrong is noticed before anything is sent
        was = visible.found_or_made(push, self.visibility)
        parent = push.head()
        tree = push.tree(parent)
        sizes = {name: item.size for name, item in tree.items() if isinstance(item, RepoFile)}
        earlier = Earlier.read(Repository(push.repo_id, parent, token=push.token), sizes, PARSERS)
        notes, lost = self._complete(earlier)
        push.owned, push.sizes = earlier.owned(BESIDE), self.contents.sizes()
        changed, stale = push.difference(tree)
        lost = (*lost_files(earlier, self.contents, changed, stale), *lost)
        if self.pull_request:
            notes += tuple(f"Once it is merged, {push.repo_id} loses {each}." for each in lost)
            lost = ()
        hides = was == PUBLIC and self.visibility == PRIVATE
        check_consent(push.repo_id, (*lost, READERS) if hides else lost, self.consent)
        if hides:
            visible.change(push, PRIVATE)
            notes += (visible.HIDDEN,)
        done = push.commit(parent, changed, stale, self.message, self.pull_request)
        place = None
        with push.after(str(done.commit)):
            if was == PRIVATE and self.visibility == PUBLIC:
                visible.change(push, PUBLIC)
                notes += (visible.SHOWN,)
            if self.collection is not None:
                place = added(push, self.collection, (self.visibility or was) == PRIVATE)
        return replace(done, notes=notes, collection=place)

    def _complete(self, earlier: Earlier) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Complete the folder so that it continues what the repository holds.

        Returns:
            Notes on what became of the evaluation in the repository, and what is lost of it and of the card.
        """
        contents, held = self.contents, earlier.models.get(self.contents.config)
        if self.completes and held is not None and contents.is_based_on(held):
            contents.fill(True)
        model = contents.sha256
        shown, notes, lost = earlier.reports(model, self.reports)
        cost = self.cost or earlier.known_cost(model) or self.about.cost
        picture = None if (contents.folder / PICTURE).exists() else earlier.picture(model)
        contents.write_card(
            replace(self.about, reports=shown, existing=earlier.card, picture=picture, cost=cost),
        )
        card = (contents.folder / CARD).read_text(encoding="utf-8")
        return notes, (*lost, *lost_words(earlier, card, self.about.license))
