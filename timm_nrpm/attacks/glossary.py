"""What the attacks of a report do and where their gradients come from, in a sentence each, by the names in a report.

The report page shows these sentences, and the tables of `docs/glossary.md` are made of them.
"""

from __future__ import annotations

from collections.abc import Mapping

DEEDS = {
    "fgsm": "takes one step along the sign of the gradient (arXiv 1412.6572)",
    "pgd": "takes many steps along the gradient, from a random start (arXiv 1706.06083); under L1 it is Auto-PGD, "
    "under L0 it changes pixels greedily, and as a patch it climbs",
    "ascent": "climbs the gradient with momentum, from the worst point so far or from a new one",
    "search": "pushes squares to the bound at random, from the worst point so far",
    "evolution": "searches from ten points of an image together, which copy squares from each other and follow the "
    "gradient in between",
    "square": "pushes squares to the bound at random, from its own start (Square, arXiv 1912.00049)",
    "exchange": "exchanges a pixel of the worst point for a better one that the gradient proposes (under L0)",
    "paste": "pastes patches where the gradient promises most, and climbs (under a patch)",
    "random_pixels": "changes pixels and colours at random (after Sparse-RS, arXiv 2006.12834)",
    "random_patch": "changes the place and colours of a patch at random (after Sparse-RS, arXiv 2006.12834)",
    "cw": "climbs the margin loss of Carlini and Wagner within the bound (arXiv 1608.04644)",
    "aa_apgd_ce": "climbs the cross-entropy with step sizes that adapt (Auto-PGD of AutoAttack, arXiv 2003.01690)",
    "aa_apgd_t": "climbs towards the most likely other classes in turn (targeted Auto-PGD of AutoAttack)",
    "aa_fab_t": "looks for the nearest point of each likely other class (targeted FAB of AutoAttack, arXiv 1907.02044)",
    "aa_square": "pushes squares to the bound at random, from its own start (Square of AutoAttack)",
}
"""What each attack does, by its name in a report without the source that may end it; the attack is the subject."""

GUIDES = {
    "own": "follows the attacked model's own gradient",
    "plain": "follows the gradient of the plain model",
    "base": "follows the gradient of another model, given as `base=`",
    "bpda": "follows the gradient of the linear maps behind the estimates, at the estimates' values (arXiv 1802.00420)",
    "soft": "follows the gradient of a surrogate whose estimate is smoother, with ten times the eps",
    "soft_short": "follows the gradient of a surrogate with ten times the eps and one iteration",
    "halfway": "follows the gradient of a surrogate with ten times the eps and every lambda halfway to 1",
    "member": "follows the gradient of one member of the ensemble",
    "best": "needs no gradient and sees only the scores",
    "scores": "needs no gradient and sees only the scores",
}
"""What each source gives an attack to go by, by its name in a report; `"member"` stands for every `"member_..."`."""

UNKNOWN_DEED = "is not known to this version of timm_nrpm"
UNKNOWN_GUIDE = "follows a source that this version of timm_nrpm does not know"


def explained(attack: str, source: str) -> str:
    """Return what an attack does and where its gradient comes from, in one sentence.

    Args:
        attack: Name of the attack in a report, such as `"ascent_plain"`.
        source: Its source in the report, such as `"plain"`.

    Example:
        >>> explained("search", "best")
        'It pushes squares to the bound at random, from the worst point so far; it needs no gradient and sees only ...'
    """
    ending = f"_{source}"
    deed = _first(DEEDS, UNKNOWN_DEED, attack, attack.removesuffix(ending))
    guide = _first(GUIDES, UNKNOWN_GUIDE, source, source.split("_")[0])
    return f"It {deed}; it {guide}.".replace("`", "")


def _first(sentences: Mapping[str, str], unknown: str, *names: str) -> str:
    """The sentence of the first name that has one."""
    return next((sentences[name] for name in names if name in sentences), unknown)
