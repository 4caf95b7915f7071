"""Ensembles and weight signatures on the Hub, by the real client, in a process of its own."""

from __future__ import annotations

import hub_worker
import pytest
from hub_worker import Failed

hub, repo, worker = (getattr(hub_worker, name) for name in ("hub", "repo", "worker"))

MIXTURE = "nrpm.ensembles.adaptive_smoothing.AdaptiveSmoothing(plain, variant(0.5), share={share})"


def pushed(worker, repo, share=0.6, **arguments):
    return worker.push(repo, MIXTURE.format(share=share), **arguments)


def test_what_was_pushed_is_loaded(hub, worker, repo):
    done = pushed(worker, repo)
    names = {"nrpm_ensemble.json", "nrpm_ensemble.safetensors", "README.md", "cost.json"}
    names |= {f"{member}.{file}" for member in ("accurate", "robust")
              for file in ("nrpm_config.json", "nrpm.safetensors", "config.json")}  # fmt: skip
    assert set(done["files"]) == names
    assert worker.load(repo) == worker(f"seen({MIXTURE.format(share=0.6)})")
    assert pushed(worker, repo)["uploaded"] == []
    card = hub.repo(repo).files()["README.md"].decode()
    assert "is an ensemble (adaptive-smoothing)" in card
    assert "| `robust` | timm_nrpm's `resnet8_digits` |" in card
    assert "**Not evaluated.**" in card


def test_another_share_is_another_model(hub, worker, repo):
    first = pushed(worker, repo)
    second = pushed(worker, repo, 0.9)
    assert set(second["uploaded"]) == {"nrpm_ensemble.json", "README.md", "cost.json"}
    assert worker.load(repo) == worker(f"seen({MIXTURE.format(share=0.9)})")
    assert worker.load(repo, revision=first["commit"]) == worker(f"seen({MIXTURE.format(share=0.6)})")


def test_an_ensemble_takes_the_place_of_a_variant(hub, worker, repo):
    worker.push(repo)
    with pytest.raises(
        Failed, match=r"would lose a variant of resnet8_digits, in whose place an ensemble \(adaptive-smo"
    ):
        pushed(worker, repo)
    done = pushed(worker, repo, allow_removal=True)
    assert set(done["deleted"]) == {"nrpm_config.json", "nrpm.safetensors", "config.json", "lambdas.png"}
    assert worker.load(repo) == worker(f"seen({MIXTURE.format(share=0.6)})")


def test_reports_of_another_model_are_refused(worker, repo):
    with pytest.raises(Failed, match="is of another model"):
        worker(f"push({MIXTURE.format(share=0.6)}, {repo!r}, reports=report(variant(0.5)))")


def test_its_report_is_on_the_card_and_stays(hub, worker, repo):
    mixture = MIXTURE.format(share=0.6)
    worker(f"push({mixture}, {repo!r}, reports=report({mixture}))")
    card = hub.repo(repo).files()["README.md"].decode()
    assert "| share that all attacks of the suite leave of the member that it is compared with |" in card
    assert "joining has not been shown to help" in card
    again = pushed(worker, repo)
    assert again["uploaded"] == []
    assert "was kept" in again["notes"][0]


def test_a_repository_that_is_not_there(worker, repo):
    with pytest.raises(Failed, match=f"^NotOnHub: .*{repo}.*There is no folder {repo} either"):
        worker.load(repo)


def test_it_is_copied_and_not_taken_for_a_variant(worker, repo):
    pushed(worker, repo)
    worker(f"nrpm.pull({repo!r}, {repo!r} + '-copy')")
    assert worker(f"seen(nrpm.from_pretrained({repo!r} + '-copy'))") == worker(f"seen({MIXTURE.format(share=0.6)})")
    with pytest.raises(Failed, match=r"is an ensemble \(adaptive-smoothing\) of accurate, robust"):
        worker(f"nrpm.inspect({repo!r})")


SIGNATURE = "nrpm.signatures.signature(plain, variant(0.5), layers='first:2')"


def test_a_signature_is_pushed_loaded_and_sent_once(hub, worker, repo):
    with pytest.raises(Failed, match="no licence of it is known: give one as license="):
        worker.push(repo, SIGNATURE, dry_run=True)
    with pytest.raises(Failed, match="A signature is no model, and has no report"):
        worker(f"push({SIGNATURE}, {repo!r}, license='mit', reports=report(variant(0.5)))")
    done = worker.push(repo, SIGNATURE, license="mit")
    assert set(done["files"]) == {"nrpm_signature.json", "nrpm_signature.safetensors", "README.md"}
    assert worker(f"nrpm.signatures.Signature.load({repo!r}).layers") == ["conv1", "layer1.0.conv1"]
    card = hub.repo(repo).files()["README.md"].decode()
    assert "| `layer1.0.conv1` |" in card
    assert "claims\nnothing about it" in card
    assert worker.push(repo, SIGNATURE, license="mit")["uploaded"] == []
    with pytest.raises(Failed, match="NotOnHub"):
        worker(f"nrpm.signatures.Signature.load({repo!r} + '-missing')")


def test_files_of_others_stay_and_a_licence_of_another_base_goes(hub, worker, repo):
    pushed(worker, repo)
    card = "---\\nlicense: other\\nlicense_name: strict\\nbase_model: someone/else\\n---\\nmine\\n"
    files = {"onnx.config.json": "{}", "docs.README.md": "mine", "README.md": card}
    for name, text in files.items():
        given = f"path_or_fileobj='{text}'.encode(), path_in_repo={name!r}, repo_id={repo!r}"
        worker(f"publishing.HfApi().upload_file({given})")
    with pytest.raises(
        Failed, match=r"would lose the licence strict, .* apache-2.0 .*; the base model on the card, someone/"
    ):
        pushed(worker, repo, 0.8)
    done = pushed(worker, repo, 0.8, allow_removal=True)
    assert done["deleted"] == []
    there = hub.repo(repo).files()
    assert {"onnx.config.json", "docs.README.md"} <= set(there)
    assert "strict" not in there["README.md"].decode()
    assert "license: apache-2.0" in there["README.md"].decode()


def test_a_damaged_folder_is_not_sent(worker, repo):
    worker(f"nrpm.save_pretrained({MIXTURE.format(share=0.6)}, {repo!r} + '-folder')")
    worker(f"open({repo!r} + '-folder/nrpm_ensemble.safetensors', 'ab').write(b' ')")
    with pytest.raises(Failed, match=r"BrokenVariant: nrpm_ensemble\.safetensors of .* is cut short or was changed"):
        worker(f"push({repo!r} + '-folder', {repo!r}, dry_run=True)")
