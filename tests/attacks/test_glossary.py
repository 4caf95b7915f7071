"""Every attack that a suite can run, and every source, has a sentence; docs/glossary.md says the same."""

import re
from pathlib import Path

import pytest

from timm_nrpm import Threat
from timm_nrpm.attacks.efforts import EFFORTS
from timm_nrpm.attacks.glossary import DEEDS, GUIDES, UNKNOWN_DEED, UNKNOWN_GUIDE, explained
from timm_nrpm.attacks.library import ORIGINALS
from timm_nrpm.attacks.sources import MEMBER, SURROGATES
from timm_nrpm.attacks.suites import attacks_of
from timm_nrpm.choices import NORMS, SUITES

GLOSSARY = Path(__file__).resolve().parents[2] / "docs" / "glossary.md"
SOURCES = ("own", "plain", "base", "bpda", *SURROGATES)
EACH = {"plain": ("own",), "reprogrammed": SOURCES, "ensemble": ("own", "bpda", "plain", f"{MEMBER}robust_one")}


def every_attack():
    """Name and source of every attack that any suite can run on any kind of model."""
    found = {(name, "scores" if name == "aa_square" else "own") for name in ORIGINALS}
    for suite in set(SUITES) - {"autoattack"}:  # which needs a package; its attacks are the originals
        for norm in NORMS:
            if suite in ("paper", "standard") and norm not in ("Linf", "L2"):
                continue
            for effort in EFFORTS.values():
                for sources in EACH.values():
                    attacks = attacks_of(
                        suite, Threat(norm, 3 if norm in ("L0", "patch") else 0.5), effort, sources, 10
                    )
                    found |= {(attack.name, attack.source) for attack in attacks}
    return found


def test_every_attack_of_every_suite_has_its_sentence():
    found = every_attack()
    assert {"fgsm", "pgd", "cw", "search", "random_patch", "aa_fab_t", f"ascent_{MEMBER}robust_one"} <= {
        name for name, _ in found
    }
    for name, source in found:
        sentence = explained(name, source)
        assert UNKNOWN_DEED not in sentence, name
        assert UNKNOWN_GUIDE not in sentence, (name, source)
        assert re.fullmatch(r"It [^`]+; it [^`]+\.", sentence), sentence


def test_no_sentence_is_left_over():
    found = every_attack()
    assert {name.removesuffix(f"_{source}") for name, source in found} == set(DEEDS)
    assert {"member" if source.startswith(MEMBER) else source for _, source in found} == set(GUIDES)


@pytest.mark.parametrize(("name", "source"), [("new", "own"), ("pgd", "new"), ("new_own", "new")])
def test_what_another_version_runs_is_not_guessed(name, source):
    sentence = explained(name, source)
    assert (UNKNOWN_DEED in sentence) == (name != "pgd")
    assert (UNKNOWN_GUIDE in sentence) == (source == "new")


def test_the_glossary_of_the_documentation_has_the_same_sentences():
    page = GLOSSARY.read_text(encoding="utf-8")
    for name, deed in DEEDS.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}" in line.split("|")[1])
        assert row.split("|")[2].strip() == deed, name
    for name, guide in GUIDES.items():
        row = next(line for line in page.splitlines() if line.startswith(("| `" + name + "`", "| `" + name + "_...`")))
        assert row.split("|")[2].strip() == guide, name
