"""What a push would take away: each is refused with its name, before anything is sent, and goes where it may."""

from __future__ import annotations

import json

import hub_worker
import pytest
from hub_worker import Failed

hub, repo, worker = (getattr(hub_worker, name) for name in ("hub", "repo", "worker"))

PLAIN = {
    "config.json": b'{"architecture": "resnet18"}',
    "model.safetensors": b"weights of the owner",
    "evaluation.json": b'{"top1": 81.2}',
    "README.md": b"---\nlicense: mit\ntags: [timm]\n---\n# Mine\n",
}
"""A repository that holds a plain timm model, and no variant."""

CARD = """---
license: mit
base_model: timm/vit_tiny_patch16_224.augreg_in21k
datasets: [me/one, me/two]
extra_gated_prompt: Agree first.
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {type: imagenet, name: ImageNet}
    metrics:
    - {type: accuracy, value: 75.5, name: top-1 of mine}
---
# Mine
"""


def asked(hub, repo, start):
    """The requests since then that may change something, and name the repository."""
    return [r for r in hub.requests[start:] if r.method not in ("GET", "HEAD") and repo in r.path]


def refused(hub, worker, repo, push):
    """What a push says that it would take away, of which nothing has gone."""
    before, start = hub.repo(repo).commits()[0].oid, len(hub.requests)
    with pytest.raises(
        Failed, match=r"^ValueError: .* Nothing was sent: give allow_removal=True if that may go\.$"
    ) as no:
        worker(push)
    assert asked(hub, repo, start) == []
    assert hub.repo(repo).commits()[0].oid == before
    return str(no.value).partition(" would lose ")[2].partition(". Nothing was sent")[0].split("; ")


def test_files_of_a_plain_model_are_neither_overwritten_unasked_nor_deleted(hub, worker, repo):
    hub.create(repo).commit(PLAIN, lfs=["model.safetensors"])
    push = f"push(small, {repo!r}, license='mit'"
    of_none = "which is of no model of timm_nrpm and would be overwritten"
    size = len(PLAIN["config.json"])
    assert refused(hub, worker, repo, f"{push})") == [f"config.json ({size} bytes), {of_none}"]
    full = refused(hub, worker, repo, f"{push}, full=True, reports=report(small))")
    assert [line.partition(" (")[0] for line in full] == ["config.json", "model.safetensors", "evaluation.json"]
    done = worker(f"{push}, allow_removal=True)")
    assert done["deleted"] == []
    files = hub.repo(repo).files()
    assert files["model.safetensors"] == PLAIN["model.safetensors"]
    assert files["evaluation.json"] == PLAIN["evaluation.json"]
    assert "**Not evaluated.**" in files["README.md"].decode()


def test_another_model_in_its_place(hub, worker, repo):
    """Of the same kind, of another kind, and one of a later version."""
    other = "nrpm.reprogram_(timm.create_model('resnet10t', num_classes=3), nrpm.NRPMConfig(0.5))"
    worker.push(repo, other, full=True, license="mit")
    lost = refused(hub, worker, repo, f"push(small, {repo!r})")
    assert lost[0] == "a variant of resnet10t, in whose place a variant of resnet8_digits would come"
    assert [line.partition(" (")[0] for line in lost[1:]] == ["model.safetensors"]
    signature = "nrpm.signatures.signature(plain, variant(0.5), layers='first:2')"
    lost = refused(hub, worker, repo, f"push({signature}, {repo!r}, license='mit')")
    assert "in whose place a weight signature of resnet8_digits would come" in lost[0]
    names = {"nrpm_config.json", "nrpm.safetensors", "config.json", "model.safetensors"}
    assert {line.partition(" (")[0] for line in lost[1:]} == names
    done = worker.push(repo, signature, license="mit", allow_removal=True)
    assert set(done["deleted"]) == {*names, "lambdas.png", "cost.json"}
    hub.repo(repo).commit({"nrpm_signature.json": b'{"format": 2}'})
    lost = refused(hub, worker, repo, f"push(small, {repo!r})")
    assert lost[0] == "a model that this version cannot read, in whose place a variant of resnet8_digits would come"


def test_an_ensemble_gives_way_to_a_variant_and_leaves_nothing(hub, worker, repo):
    mixture = "nrpm.ensembles.adaptive_smoothing.AdaptiveSmoothing(plain, variant(0.5), share=0.5)"
    worker.push(repo, mixture)
    hub.repo(repo).commit({"robust.notes.txt": b"mine"})
    lost = refused(hub, worker, repo, f"push(small, {repo!r})")
    assert lost[0].startswith("an ensemble (adaptive-smoothing) of accurate, robust, in whose place a variant")
    done = worker.push(repo, allow_removal=True)
    left = set(hub.repo(repo).files())
    assert left == {*hub_worker.OURS, ".gitattributes", "robust.notes.txt"}
    assert {line.partition(" (")[0] for line in lost[1:]} == set(done["deleted"])


def test_words_of_the_card(hub, worker, repo):
    hub.create(repo).commit({"README.md": CARD.encode()})
    lost = refused(hub, worker, repo, f"push(small, {repo!r})")
    assert lost == [
        "the licence mit, in whose place apache-2.0 would come unless it is given",
        "the datasets on the card, me/one, me/two, unless they are given",
        "the base model on the card, timm/vit_tiny_patch16_224.augreg_in21k",
        "numbers in the card's model-index: top-1 of mine",
    ]
    keeping = f"push(small, {repo!r}, license='mit', datasets=['me/two', 'me/one', 'me/new']"
    assert refused(hub, worker, repo, f"{keeping})")[0].startswith("the base model on the card, ")
    worker(f"{keeping}, allow_removal=True)")
    card = hub.repo(repo).files()["README.md"].decode()
    assert "\nextra_gated_prompt: Agree first.\n" in card  # the gate stays
    lost = refused(hub, worker, repo, f"push(small, {repo!r}, datasets=['me/two'])")
    assert lost == ["the datasets on the card, me/one, me/new, unless they are given"]
    assert worker.push(repo)["uploaded"] == []


def test_changes_by_hand_inside_the_generated_part(hub, worker, repo):
    worker.push(repo)
    card = hub.repo(repo).files()["README.md"].decode()
    hub.repo(repo).commit({"README.md": card.replace("\n", "\r\n").encode()})  # as some editors write it: no change
    assert worker.push(repo, "variant(0.9)")["uploaded"]
    card = hub.repo(repo).files()["README.md"].decode()
    hub.repo(repo).commit({"README.md": card.replace("## Limits", "## Limits that I found").encode()})
    lost = refused(hub, worker, repo, f"push(small, {repo!r})")
    assert lost == ["what was changed by hand inside the generated part of README.md"]
    worker.push(repo, allow_removal=True)
    assert "that I found" not in hub.repo(repo).files()["README.md"].decode()


def test_numbers_that_the_owner_added_to_those_of_a_report(hub, worker, repo):
    worker(f"push(small, {repo!r}, reports=report(small))")
    card = hub.repo(repo).files()["README.md"].decode()
    first = "    - type: accuracy\n"
    added = f"{first}      value: 75.5\n      name: top-1 of mine\n{first}"
    hub.repo(repo).commit({"README.md": card.replace(first, added, 1).encode()})
    assert refused(hub, worker, repo, f"push(small, {repo!r})") == ["numbers in the card's model-index: top-1 of mine"]


def test_a_pull_request_takes_nothing_away_and_says_what_it_would(hub, worker, repo):
    worker.push(repo, full=True)
    done = worker.push(repo, "variant(0.9)", full=False, pull_request=True)
    assert done["deleted"] == ["model.safetensors"]
    assert len(done["notes"]) == 1
    assert done["notes"][0].startswith(f"Once it is merged, {repo} loses model.safetensors (")
    assert "model.safetensors" in hub.repo(repo).files()


def test_a_branch_is_not_made_for_a_push_that_is_refused(hub, worker, repo):
    worker.push(repo, full=True)
    push = f"push(variant(0.9), {repo!r}, full=False, revision='work')"
    assert [line.partition(" (")[0] for line in refused(hub, worker, repo, push)] == ["model.safetensors"]
    with pytest.raises(KeyError):
        hub.repo(repo).commits("work")
    done = worker(f"{push[:-1]}, allow_removal=True)")
    assert done["commit"] == hub.repo(repo).commits("work")[0].oid
    assert worker.push(repo, full=True, revision="same")["uploaded"] == []  # and yet the branch is there
    assert hub.repo(repo).commits("same")[0].oid == hub.repo(repo).commits()[0].oid


def test_a_function_answers(hub, worker, repo):
    worker.push(repo, full=True)
    note = "globals().setdefault('asked', []).append"
    start = len(hub.requests)
    with pytest.raises(Failed, match=r"would lose model\.safetensors"):
        worker(f"push(variant(0.9), {repo!r}, full=False, allow_removal=lambda lost: bool({note}(lost)))")
    assert asked(hub, repo, start) == []
    worker(f"push(variant(0.9), {repo!r}, full=False, allow_removal=lambda lost: [True, {note}(lost)][0])")
    first, second = worker("asked")
    assert first == second
    assert first[0].startswith("model.safetensors (")
    worker.push(repo, "variant(0.3)", allow_removal=True)  # nothing to ask
    assert worker("len(asked)") == 2


def test_the_same_push_again_asks_nothing(hub, worker, repo):
    """Nor do newer versions of one model, with and without reports."""
    worker.push(repo, tags=["scans"], datasets=["me/one"], license="mit")
    worker.push(repo)
    worker(f"push(small, {repo!r}, reports=report(small))")
    worker(f"push(variant(0.9), {repo!r}, reports=report(variant(0.9)))")
    card = hub.repo(repo).files()["README.md"].decode()
    for line in ("license: mit", "- scans", "- me/one"):
        assert f"\n{line}\n" in card
    assert json.loads(hub.repo(repo).files()["cost.json"])["model"] == worker("model_sha256(variant(0.9))")


def test_what_it_costs_stays_with_its_model(hub, worker, repo):
    worker.push(repo)
    before = hub.repo(repo).files()["cost.json"]
    assert worker.push(repo, license="mit")["uploaded"] == ["README.md"]
    assert hub.repo(repo).files()["cost.json"] == before
    measured = "nrpm.cost(small, measured=True)"
    assert set(worker(f"push(small, {repo!r}, cost={measured})")["uploaded"]) == {"README.md", "cost.json"}
    assert "Both were measured." in hub.repo(repo).files()["README.md"].decode()
    assert worker.push(repo)["uploaded"] == []
    hub.repo(repo).commit({"cost.json": b"[]"})
    assert set(worker.push(repo)["uploaded"]) == {"README.md", "cost.json"}
    assert "and not measured" in hub.repo(repo).files()["README.md"].decode()
    with pytest.raises(Failed, match=r"^ValueError: cost= is of another model \(resnet8_digits, with other layers\)"):
        worker(f"push(small, {repo!r}, cost=nrpm.cost(plain))")
    worker.push(repo, "variant(0.9)", cost=False)
    assert "Neither measured nor estimated." in hub.repo(repo).files()["README.md"].decode()
    assert "cost.json" not in hub.repo(repo).files()
