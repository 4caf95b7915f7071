"""Cards: every number is one of the report's, and what was written by hand stays."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from scipy.stats import beta

import timm_nrpm
from timm_nrpm import RobustnessReport, Threat
from timm_nrpm.attacks.flags import THRESHOLDS
from timm_nrpm.evaluation.report import AttackResult
from timm_nrpm.hub.cards import write_card
from timm_nrpm.hub.publishing import push_to_hub
from timm_nrpm.hub.templates import BEGIN, END, evaluation_json, parse_evaluation
from timm_nrpm.models.loading import find_variant
from timm_nrpm.models.reprogramming import model_sha256
from timm_nrpm.version import PYTHON, __version__

CARDS = sorted((Path(__file__).parents[2] / "hub_cards").glob("*/README.md"))
FIXED = {"95", "2410.04577", "0", "1", __version__, PYTHON, "0.7", "1.6", "100"}
"""Numbers in the words around: the confidence, the paper, what lambda means, how to install, and how good estimates of
the cost are."""


def variant(tmp_path, name="v", **more):
    torch.manual_seed(0)
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, **{"lam": 0.7, "layers": "layer*", **more}).eval()
    timm_nrpm.calibrate_(model, [torch.rand(32, 1, 8, 8)])
    return model, timm_nrpm.save_pretrained(model, tmp_path / name)


def report(model, *, eps=0.15, flags=(), names=("fgsm", "pgd", "pgd_plain"), data="digits, test", control=True):
    torch.manual_seed(1)
    clean = tuple((torch.rand(37) < 0.9).tolist())
    attacks = tuple(
        AttackResult(
            name, name.partition("_")[2] or "own", tuple(c and s for c, s in zip(clean, row, strict=True)), 1, 1, 1.5
        )
        for name, row in zip(names, (torch.rand(len(names), 37) < 0.7).tolist(), strict=True)
    )
    made = RobustnessReport(
        Threat("Linf", eps), "quick", 20, 0, 7, clean, attacks, flags=flags, versions={"torch": "9.8.7"}, data=data
    )
    beside = replace(made, attacks=attacks[1:]) if control else None
    return replace(made, sha256=model_sha256(model), control=beside)


def card(folder, reports=(), existing=None, **more):
    return write_card(folder, "me/digits-nrpm", reports, existing, **more).read_text()


def recomputed(report):
    """The numbers of a report's JSON, from the outcomes of single images alone."""
    clean, attacks = report["correct"], report["attacks"]
    right = sum(c and all(a["survived"][i] is not False for a in attacks) for i, c in enumerate(clean))
    n = len(clean)
    low = beta.ppf(0.025, right, n - right + 1) if right else 0.0
    high = beta.ppf(0.975, right + 1, n - right) if right < n else 1.0
    own = next((sum(s is True for s in a["survived"]) / n for a in attacks if a["name"] == "pgd"), None)
    return {"clean": sum(clean) / n, "own": own, "worst": right / n, "low": low, "high": high}


def percent(share):
    return f"{100 * share:.1f}"


def known_numbers(folder):
    """Every number that a card of what is in `folder` may hold."""
    config = json.loads((folder / "nrpm_config.json").read_text())
    lams = list(timm_nrpm.lambdas(timm_nrpm.from_pretrained(folder)).values())
    found = {f"{value:.4g}" for value in (*lams, sum(lams) / len(lams))} | {str(len(lams))}
    found |= {str(config["settings"][key]) for key in ("iterations", "eps")}
    found |= {str(step["images"]) for step in config.get("statistics", [])}
    found.add(str(sum((folder / name).stat().st_size for name in ("nrpm_config.json", "nrpm.safetensors"))))
    if (images := json.loads((folder / "config.json").read_text())["pretrained_cfg"]) is not None:
        found |= {f"{value:.4g}" for value in (*images["mean"], *images["std"], *images["input_size"])}
    if (folder / "cost.json").exists():
        found |= times(json.loads((folder / "cost.json").read_text())["cost"])
    evaluation = folder / "evaluation.json"
    for told in json.loads(evaluation.read_text())["reports"] if evaluation.exists() else []:
        found |= {percent(share) for share in recomputed(told).values() if share is not None}
        effort = ("steps", "queries", "rounds", "evolutions", "seed")
        found |= {f"{told['threat']['eps']:.4g}", *(str(told[key]) for key in effort)}
        made = RobustnessReport.from_dict(told)  # whose numbers test_report.py and test_disparity.py have
        found |= set(re.findall(r"(?<![\w.])\d[\w.+]*(?<!\.)", f"{made.verdict} {made.class_verdict}"))
        found |= {str(len(told["correct"])), *told["versions"].values()}
        for attack in told["attacks"]:
            survived = attack["survived"]
            found |= {percent(sum(s is True for s in survived) / len(survived)), str(survived.count(False))}
            found.add(str(len(survived) - survived.count(None)))
        if told["control"]:
            found.add(percent(recomputed(told["control"])["worst"]))
    return found


def times(cost):
    """The numbers that a card has of a cost, from the times of layers or of whole forwards."""
    ours, plain = (
        sum(layer[key] for layer in cost["layers"]) + cost["rest_seconds"] for key in ("seconds", "plain_seconds")
    )
    if cost["measured"]:
        ours, plain = cost["measured"]["seconds"], cost["measured"]["plain_seconds"]
    size = "x".join(map(str, cost["image"]))
    name = re.findall(r"(?<![\w.])\d[\w.+]*(?<!\.)", cost["machine"]["name"])
    return {f"{ours / plain:.1f}", f"{1e3 * ours:.3g}", f"{1e3 * plain:.3g}", str(cost["batch"]), size, *name}


def check_numbers(folder):
    text = (folder / "README.md").read_text()
    words = re.sub("<!-- .* -->", "", text.partition(BEGIN)[2].partition(END)[0])
    words = re.sub(r"`[^`\n]*[a-z_/][^`\n]*`", "", words)  # names of layers, attacks, files
    words = re.sub(
        r"```.*?```|\]\([^)]*\)|\[[^\]]*/[^\]]*\]", "", words, flags=re.DOTALL
    )  # code, addresses, repositories
    numbers = set(re.findall(r"(?<![\w.])\d[\w.+]*(?<!\.)", words))
    unknown = numbers - known_numbers(folder) - FIXED - {"L0", "L1", "L2"}
    assert not unknown
    assert "95" in numbers or "Not evaluated" in text
    metadata = yaml.safe_load(text.split("---")[1])
    reports = parse_evaluation((folder / "evaluation.json").read_text()) if "model-index" in metadata else []
    metrics = [m for entry in metadata.get("model-index", []) for r in entry["results"] for m in r["metrics"]]
    expected = []
    for told in reports:
        again = recomputed(json.loads(told.to_json()))
        shown = ["worst", "clean", "own"][: 3 if told.flags in ((), ("plain_model_changed",)) else 2]
        numbers = [(key, len(told.correct), float(percent(again[key]))) for key in shown if again[key] is not None]
        expected += [each for each in numbers if each[0] != "clean" or each not in expected]  # which is said once
    assert [metric["value"] for metric in metrics] == [value for _, _, value in expected]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_the_cards_in_the_project_are_rendered_from_what_lies_beside_them(path, tmp_path):
    folder = path.parent
    found = find_variant(folder).variant
    reports = parse_evaluation((folder / "evaluation.json").read_text())
    assert [r.sha256 for r in reports] == [found.model]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    again = write_card(tmp_path, f"me/{folder.name}", reports).read_text()
    assert again == path.read_text()
    check_numbers(folder)


def test_there_is_a_card_for_every_paradigm():
    relations = [find_variant(path.parent).variant.base.tuned for path in CARDS]
    assert len(CARDS) == 3
    assert sorted(relations) == [False, False, True]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"flags": ("gradient_masking", "attack_not_finished")},
        {"names": ("apgd_ce_own",)},  # without PGD there is no number of the paper's protocol
        {"control": False, "data": ""},
    ],
)
def test_every_number_is_one_of_the_reports(tmp_path, more):
    model, folder = variant(tmp_path)
    found = report(model, **more)
    text = card(folder, [found, report(model, eps=0.3, **more)])
    check_numbers(folder)
    for flag in found.flags:
        assert f"**Flag `{flag}`** (Linf 0.15, Linf 0.3): " in text
    assert ("not run" in text) == ("names" in more or "control" in more)
    assert "Not evaluated" not in text


def test_the_classes_are_told_after_the_verdict_of_their_report(tmp_path):
    model, folder = variant(tmp_path)
    labels, right = (0,) * 20 + (1,) * 20, (True,) * 25 + (False,) * 15
    attack = AttackResult("pgd", "own", tuple(each or None for each in right), 1, 1, 1.5)
    labelled = replace(report(model, control=False), correct=right, attacks=(attack,), labels=labels)
    unlabelled = report(model, eps=0.3)
    text = card(folder, [labelled, unlabelled])
    check_numbers(folder)
    assert "class 1 has the lowest accuracy: 25.0 % (" in labelled.class_verdict
    assert f"**{labelled.verdict}** {labelled.class_verdict}\n" in text
    assert f"**{unlabelled.verdict}**\n" in text


def test_a_number_that_is_not_the_reports_would_be_found(tmp_path):
    model, folder = variant(tmp_path)
    text = card(folder, [report(model)])
    (folder / "README.md").write_text(text.replace(percent(report(model).worst_case), "99.9"))
    with pytest.raises(AssertionError):
        check_numbers(folder)


def test_without_an_evaluation_it_says_so(tmp_path):
    _, folder = variant(tmp_path)
    text = card(folder)
    assert "**Not evaluated.**" in text
    assert "model-index" not in text
    assert not re.search(r"\d %|worst case", text.partition("## How robust")[2].partition("## Lambda")[0])
    assert not (folder / "evaluation.json").exists()
    check_numbers(folder)


def test_standard_units_are_told(tmp_path):
    assert "standard units" not in card(variant(tmp_path)[1])
    _, folder = variant(tmp_path, "units", eps=0.6, standardize=True)
    text = card(folder)
    assert "and eps 0.6 in standard units: inputs are counted from the mean of their channel" in text
    assert timm_nrpm.inspect(folder).standardize


def test_a_report_of_another_model_is_refused(tmp_path):
    model, folder = variant(tmp_path)
    other, _ = variant(tmp_path, "w", iterations=2)  # the same weights, statistics and lambdas are not enough
    for wrong in (report(other), replace(report(model), sha256="")):
        with pytest.raises(ValueError, match="is of another model"):
            card(folder, [wrong])
        with pytest.raises(ValueError, match="is of another model"):
            push_to_hub(model, "me/digits-nrpm", reports=wrong, dry_run=True)


def test_metadata(tmp_path):
    model, folder = variant(tmp_path)
    data = ModelCard(card(folder, [report(model)], license="mit", datasets=["me/digits"])).data
    assert (data.library_name, data.license, data.datasets) == ("timm_nrpm", "mit", ["me/digits"])
    assert {"timm_nrpm", "timm"} <= set(data.tags)
    assert data.get("base_model") is None  # which is on no Hub
    names = [result.metric_name for result in data.eval_results]
    assert names == [
        "accuracy under all attacks of the suite quick, which is no worst case, Linf 0.15, 37 images, %",
        "clean accuracy, 37 images, %",
        "accuracy under PGD along the model's own gradient alone, no worst case, Linf 0.15, 37 images, %",
    ]
    assert {(r.dataset_name, r.dataset_type) for r in data.eval_results} == {("digits, test", "digits")}


@pytest.mark.parametrize(("tuned", "relation"), [(False, "adapter"), (True, "finetune")])
def test_base_and_licence_are_inherited(tmp_path, tuned, relation):
    import timm
    from hub_cache import hub_cache

    hub_cache(tmp_path, "timm/resnet18.a1_in1k", {"model.safetensors": timm.create_model("resnet18").state_dict()})
    model = timm_nrpm.create_model("resnet18", pretrained=True, layers="layer1.*", cache_dir=str(tmp_path)).eval()
    if tuned:
        with torch.no_grad():
            model.fc.bias.add_(1)
    push_to_hub(model, "me/resnet18-nrpm", dry_run=True, folder=tmp_path / "v")
    text = (tmp_path / "v" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.license) == (
        "timm/resnet18.a1_in1k",
        relation,
        "apache-2.0",
    )
    assert ("The weights were tuned" in text, "The weights are untouched" in text) == (tuned, not tuned)
    assert ("**Plain timm loads it" in text) == (tmp_path / "v" / "model.safetensors").exists() == tuned
    assert ("0123456789abcdef" in text) == (not tuned)  # the commit of the base


def test_a_licence_is_asked_for(tmp_path):
    model = timm_nrpm.create_model("resnet8_digits", lam=0.5, pretrained_cfg_overlay={"license": None})
    with pytest.raises(ValueError, match="give one as license="):
        push_to_hub(model, "me/v", dry_run=True)
    pushed = push_to_hub(model, "me/v", dry_run=True, license="mit", folder=tmp_path / "v")
    assert pushed.commit is None
    text = (tmp_path / "v" / "README.md").read_text()
    assert "license: mit" in text
    assert 'from_pretrained("me/v", base=model)' in text  # random weights have no public name


HAND = """---
license: mit
language: en
tags: [mine, timm]
model-index:
- name: old
  results: []
---
# My own title

What I have to say, {{ in braces }} & <b>with marks</b>.
"""


def test_what_was_written_by_hand_stays(tmp_path):
    model, folder = variant(tmp_path)
    first = card(folder, [report(model)], HAND)
    assert first.index("What I have to say, {{ in braces }} & <b>with marks</b>.") < first.index(BEGIN)
    data = ModelCard(first).data
    assert (data.license, data.language) == ("mit", "en")
    assert set(data.tags) == {"timm_nrpm", "timm", "adversarial-robustness", "mine"}
    assert data.model_name == "digits-nrpm"
    edited = first.replace(END, f"{END}\n\n## Thanks\n\nTo all.").replace("# My own title", "# Another title")
    edited = edited.replace("## Limits", "## No limits")  # in the generated part, where it does not last
    again = card(folder, [], edited)
    assert "# Another title" in again
    assert again.rstrip().endswith("## Thanks\n\nTo all.")
    assert "## Limits" in again
    assert "## No limits" not in again
    assert "model-index" not in again  # its numbers were the other report's
    assert card(folder, [], again) == again
    assert again.count(BEGIN) == again.count(END) == 1


@pytest.mark.parametrize("broken", ["---\na: [\n---\n", "---\n- a list\n---\n", "---\nmodel-index: 3\n---\n"])
def test_a_card_that_cannot_be_read_is_not_overwritten(tmp_path, broken):
    _, folder = variant(tmp_path)
    with pytest.raises(ValueError, match="metadata that cannot be read"):
        card(folder, [], broken)


def test_text_of_others_stays_in_its_cell(tmp_path):
    model, folder = variant(tmp_path)
    text = card(folder, [replace(report(model, data="a | b\n\n# <script>"), warnings=("one\ntwo | three <img>",))])
    assert "| a / b # &lt;script> |" in text
    assert "- Warning: one two / three &lt;img>" in text
    assert "<script>" not in text.partition(BEGIN)[2]


def test_reports_come_back(tmp_path):
    model, _ = variant(tmp_path)
    reports = [report(model), report(model, eps=0.3)]
    assert parse_evaluation(evaluation_json(reports)) == reports
    for text in ("", "[]", "{}", '{"reports": 3}', '{"reports": [{}]}', "[" * 10**5):
        with pytest.raises(ValueError, match="holds no reports"):
            parse_evaluation(text)


def test_what_is_said_of_plain_timm_is_true(tmp_path):
    """timm alone knows no architecture of ours, and no variant without weights."""
    model, _ = variant(tmp_path)
    with torch.no_grad():
        model.fc.bias.add_(1)
    push_to_hub(model, "me/v", dry_run=True, folder=tmp_path / "full")
    text = (tmp_path / "full" / "README.md").read_text()
    assert "is timm_nrpm's `resnet8_digits`" in text
    assert "Plain timm" not in text
    assert "hf-hub:" not in text
    assert 'timm.create_model("hf-hub:me/digits-nrpm", pretrained=True)' in card(variant(tmp_path, "w")[1])


def test_a_licence_goes_with_its_base(tmp_path):
    _, folder = variant(tmp_path)
    other = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: {}\n---\n"
    of_another = ModelCard(card(folder, [], other.format("timm/resnet18.a1_in1k"))).data
    assert (of_another.license, of_another.get("license_name")) == ("apache-2.0", None)
    given = ModelCard(card(folder, [], other.replace("base_model: {}\n", ""), license="mit")).data
    assert (given.license, given.get("license_name"), given.get("license_link")) == ("mit", None, None)
    kept = ModelCard(card(folder, [], other.replace("base_model: {}\n", ""))).data
    assert (kept.license, kept.license_name) == ("other", "mine")


def test_blank_lines_of_others_stay(tmp_path):
    _, folder = variant(tmp_path)
    code = "```python\na = 1\n\n\n\nb = 2\n```"
    text = card(folder, [], f"# Mine\n\n{code}\n\n{BEGIN}\n{END}\n\n{code}\n")
    assert text.count(code) == 2


def test_every_flag_has_its_sentence(tmp_path):
    model, folder = variant(tmp_path)
    text = card(folder, [report(model, flags=tuple(THRESHOLDS))])
    assert len(re.findall(r"^- \*\*Flag `\w+`\*\*: [A-Z].*\.$", text, re.MULTILINE)) == len(THRESHOLDS)


def test_the_picture_is_looked_at_beside_the_table(tmp_path, monkeypatch):
    _, folder = variant(tmp_path)
    assert "![lambda of every layer](lambdas.png)" in card(folder)
    assert (folder / "lambdas.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    text = card(folder)
    assert "lambdas.png" not in text
    assert not (folder / "lambdas.png").exists()
    assert "| `layer1.0.conv1` | 0.7 |" in text


def test_the_evaluation_in_a_folder_stays_with_its_model(tmp_path):
    model, folder = variant(tmp_path)
    push_to_hub(model, "me/v", reports=report(model), dry_run=True, folder=folder)
    evaluation = (folder / "evaluation.json").read_text()
    for again in (model, folder):
        assert "evaluation.json" in push_to_hub(again, "me/v", dry_run=True, folder=folder).files
        assert (folder / "evaluation.json").read_text() == evaluation
        assert percent(report(model).worst_case) in (folder / "README.md").read_text()
    push_to_hub(variant(tmp_path, "w", lam=0.2)[0], "me/v", dry_run=True, folder=folder)
    assert not (folder / "evaluation.json").exists()
    assert "**Not evaluated.**" in (folder / "README.md").read_text()
