"""The commands that have to do with the Hub, each in a process of its own: a fork, or slowly, as one types them."""

import json
import os
import shutil
import subprocess
import sys

import forked
import pytest
import torch
from hub_server import Hub

import timm_nrpm
from timm_nrpm.cli.program import main
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.downloads import Repository
from timm_nrpm.models.format import parse_config

TOKEN = "hf_browse0123456789"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a variant and a report of it."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    pixels, labels = digits("test")
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    timm_nrpm.calibrate_(model, [pixels[:100]])
    timm_nrpm.save_pretrained(model, folder / "v")
    found = timm_nrpm.evaluate(
        model, [(pixels[:30], labels[:30])], timm_nrpm.Threat("Linf", 0.2), "quick", data="digits", control=False
    )
    (folder / "report.json").write_text(json.dumps(found.to_dict()))
    return folder


@pytest.fixture(scope="module", params=["forked", pytest.param("typed", marks=pytest.mark.slow)])
def command(request):
    """A function that runs a command in a folder."""
    run = (forked if request.param == "forked" else subprocess).run

    def command(hub, folder, *arguments, token=TOKEN, **more):
        """What `timm-nrpm ARGUMENTS` prints; its status and the last line of its errors if it fails."""
        kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1", "COLUMNS": "120"}
        ours |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
        ours |= {**({"HF_TOKEN": token} if token else {}), **more}
        line = [sys.executable, "-m", "timm_nrpm.cli", *map(str, arguments)]
        done = run(line, env={**kept, **ours}, cwd=folder, capture_output=True, text=True, timeout=120)
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if done.returncode == 0 else (done.returncode, done.stderr.strip().splitlines()[-1])

    return command


@pytest.fixture(scope="module")
def hub(command, tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as server:
        server.user("me", TOKEN)
        server.user("other", "hf_other0123456789")
        yield server
        assert server.unexpected == []


def test_publish_look_and_fetch(command, hub, work, tmp_path):
    said = command(hub, work, "push", "--variant", "v", "me/digits", "--report", "report.json", "--dry-run")
    assert said.startswith("Nothing was sent. me/digits would hold:\n")
    assert not hub.requests
    said = command(hub, work, "push", "--variant", "v", "me/digits", "--report", "report.json", "--message", "First")
    assert "README.md" in said
    assert said.count(" sent\n") == 7
    repo = hub.repo("me/digits")
    assert repo.commits()[0].title == "First"
    assert repo.private
    again = command(hub, work, "push", "--variant", "v", "me/digits", "--report", "report.json")
    assert "holds all of it already" in again
    assert len(repo.commits()) == 2

    hub.requests.clear()
    said = command(hub, work, "inspect", "--variant", "me/digits", HF_HOME=str(tmp_path / "fresh"))
    assert "base: resnet8_digits; weights untouched, not in it" in said
    assert "│ layer1.0.conv1        │ 0.500  │ ██████████ │" in said
    assert "Linf 0.2, 30 images (digits): clean" in said
    assert "flags: " in said
    assert not [r for r in hub.requests if "model.safetensors" in r.path]
    of_folder = command(hub, work, "inspect", "--variant", "v").splitlines()
    assert of_folder[-1] == "Not evaluated."
    assert of_folder[1:-1] == said.splitlines()[1:-2]

    assert "me/digits" in command(hub, work, "list", "me")
    assert "me/digits" not in command(hub, work, "list", "me", token="hf_other0123456789")  # it is private
    hub.create("me/plain").commit({"README.md": b"---\ntags: [timm]\n---\n"})
    assert "me/plain" not in command(hub, work, "list", "me")  # it has not the tag
    assert "has published no variant" in command(hub, work, "list", "nobody")

    said = command(hub, tmp_path, "pull", "--variant", "me/digits")
    assert "Evaluate it by timm-nrpm evaluate --variant digits" in said
    assert sorted(os.listdir(tmp_path / "digits")) == sorted([*os.listdir(work / "v"), *EXTRA])
    loaded, saved = (timm_nrpm.from_pretrained(path) for path in (tmp_path / "digits", work / "v"))
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), saved(x))
    pushed = command(hub, tmp_path, "push", "--variant", "digits", "me/copy")  # its report comes along
    assert "evaluation.json" in pushed
    assert "offline" not in pushed
    said = command(hub, tmp_path, "inspect", "--variant", "me/digits", "--offline")
    assert "flags: " in said


@pytest.mark.slow
def test_every_command_of_the_hub_gives_json(command, hub, work, tmp_path):
    pushed = json.loads(command(hub, work, "push", "--variant", "v", "me/json", "--json"))
    assert pushed["commit"] == hub.repo("me/json").commits()[0].oid
    about = json.loads(command(hub, work, "inspect", "--variant", "me/json", "--json"))
    assert about["commit"] == pushed["commit"]
    assert about["lams"] == timm_nrpm.lambdas(timm_nrpm.from_pretrained(work / "v"))
    pulled = json.loads(command(hub, tmp_path, "pull", "--variant", "me/json", "--json", "--quiet"))
    assert pulled["variant"] == "json"
    listed = json.loads(command(hub, work, "list", "me", "--json"))["variants"]
    assert {"me/json"} <= {one["repo_id"] for one in listed}
    of_hub = ["--variant", "me/json", "--revision", pushed["commit"]]
    drawn = json.loads(command(hub, tmp_path, "plot", *of_hub, "--output", "l.png", "--json"))
    assert (tmp_path / drawn["picture"]).read_bytes().startswith(b"\x89PNG")
    quick = ["--suite", "quick", "--first", "5", "--steps", "1", "--json"]
    report = json.loads(command(hub, tmp_path, "evaluate", *of_hub, *quick))["reports"][0]
    model = timm_nrpm.from_pretrained(work / "v")
    assert report["sha256"] == timm_nrpm.models.reprogramming.model_sha256(model)


EXTRA = ["README.md", "cost.json", "evaluation.json", "lambdas.png"]


def test_pull_replaces_a_variant_and_nothing_else(command, hub, work, tmp_path):
    command(hub, work, "push", "--variant", "v", "me/pulled")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    status, message = command(hub, tmp_path, "pull", "--variant", "me/pulled", "--output", "mine")
    assert status == 2
    assert "mine exists and holds no variant" in message
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    shutil.copytree(work / "v", tmp_path / "v")
    (tmp_path / "v" / "evaluation.json").write_text("of the one before")
    command(hub, tmp_path, "pull", "--variant", "me/pulled", "--output", "v")
    assert not (tmp_path / "v" / "evaluation.json").exists()


@pytest.mark.slow
def test_branches_and_pull_requests(command, hub, work, tmp_path):
    command(hub, work, "push", "--variant", "v", "me/branches", "--visibility", "public")
    repo = hub.repo("me/branches")
    assert not repo.private
    command(hub, work, "push", "--variant", "v", "me/branches", "--report", "report.json", "--revision", "next")
    assert "evaluation.json" in repo.files("next")
    assert "evaluation.json" not in repo.files()
    said = command(hub, work, "push", "--variant", "v", "me/branches", "--report", "report.json", "--pull-request")
    assert "/discussions/1" in said
    assert repo.pull_requests == ["refs/pr/1"]
    for revision in ("next", "refs/pr/1"):
        of = ["--variant", "me/branches", "--revision", revision]
        assert "30 images" in command(hub, work, "inspect", *of, token=None)
    assert "Not evaluated." in command(hub, work, "inspect", "--variant", "me/branches", token=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--variant", "me/nothing"], "there is no such repository, or it is private: run `hf auth login`"),
        (["pull", "--variant", "me/nothing"], "there is no such repository, or it is private"),
        (["push", "--variant", "v", "other/digits"], "this token may not do that"),
        (["push", "--variant", "v", "digits"], "REPO digits is not allowed (it names no owner)"),
        (["push", "--variant", "nowhere", "me/digits"], "nowhere holds no nrpm_config.json"),
        (["push", "--variant", "v", "me/x", "--report", "v/nrpm_config.json"], "is no report that timm-nrpm evaluate"),
        (["push", "--variant", "v", "me/digits", "--license", "of my own"], "The Hub refuses the card"),
        (["push", "--variant", "v", "me/digits", "--revision", "b", "--pull-request"], "leave out --revision b"),
        (["pull", "--variant", "no owner"], "--variant 'no owner' is not allowed"),
    ],
)
def test_what_fails_says_why(command, hub, work, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if "home" not in path.parts}
    status, said = command(hub, work, *arguments)
    assert status == 2
    assert said.startswith("timm-nrpm: ")
    assert message in said
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*") if "home" not in path.parts}


def test_a_wrong_token(command, hub, work):
    call = ["push", "--variant", "v", "me/wrong"]
    assert "the token is not valid" in command(hub, work, *call, token="hf_wrong0123456789")[1]


def test_an_evaluation_of_another_model_says_nothing(work, tmp_path, capsys):
    shutil.copytree(work / "v", tmp_path / "v")
    told = json.loads((work / "report.json").read_text())
    (tmp_path / "v" / "evaluation.json").write_text(json.dumps({"reports": [{**told, "sha256": "0" * 64}]}))
    assert main(["inspect", "--variant", str(tmp_path / "v")]) == 0
    assert "Its evaluation is of another model" in capsys.readouterr().out
    (tmp_path / "v" / "evaluation.json").write_text("[")
    about = timm_nrpm.inspect(tmp_path / "v")
    assert about.note.startswith("Its evaluation cannot be read")
    assert about.reports == about.flags == ()


def test_a_full_variant_is_inspected_without_its_weights(tmp_path):
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    folder = timm_nrpm.save_pretrained(model, tmp_path / "v", full=True)
    (folder / "model.safetensors").unlink()
    about = timm_nrpm.inspect(folder)
    assert about.is_full
    assert about.lams == timm_nrpm.lambdas(model)
    assert about.base.sha256 == parse_config(folder / "nrpm_config.json", "v")["base"]["sha256"]
    with pytest.raises(timm_nrpm.errors.BrokenVariant, match="is missing"):
        timm_nrpm.from_pretrained(folder)


def test_words_of_strangers_do_not_steer_the_terminal(work, tmp_path, capsys):
    shutil.copytree(work / "v", tmp_path / "v")
    told = json.loads((work / "report.json").read_text())
    hostile = {"data": "[/x] \x1b[31m", "flags": ["[bold]"]}
    (tmp_path / "v" / "evaluation.json").write_text(json.dumps({"reports": [{**told, **hostile}]}))
    assert main(["inspect", "--variant", str(tmp_path / "v")]) == 0
    said = capsys.readouterr().out
    assert "([/x] \\x1b[31m)" in said
    assert "flags: [bold]" in said


def test_only_what_is_the_variants_is_sent(work, tmp_path):
    shutil.copytree(work / "v", tmp_path / "v")
    for name in ("model.safetensors", "secret.txt"):
        (tmp_path / "v" / name).write_text("private")
    pushed = timm_nrpm.push_to_hub(tmp_path / "v", "me/v", dry_run=True)
    assert set(pushed.files) == {*os.listdir(work / "v"), "README.md", "lambdas.png", "cost.json"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds no variant"):
        timm_nrpm.push_to_hub(tmp_path / "v", "me/v", dry_run=True, folder=tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


def test_the_reports_of_a_folder_go_along(work, tmp_path):
    shutil.copytree(work / "v", tmp_path / "v")
    told = json.loads((work / "report.json").read_text())
    (tmp_path / "v" / "evaluation.json").write_text(json.dumps({"reports": [told]}))
    assert "evaluation.json" in timm_nrpm.push_to_hub(tmp_path / "v", "me/v", dry_run=True).files
    assert "evaluation.json" not in timm_nrpm.push_to_hub(tmp_path / "v", "me/v", dry_run=True, reports=()).files


def test_what_is_not_in_the_cache_is_not_said_to_be_nowhere(command, hub, work, tmp_path):
    command(hub, work, "push", "--variant", "v", "me/cached", "--report", "report.json")
    load = "import timm_nrpm; timm_nrpm.from_pretrained('me/cached')"
    home = {"HF_HOME": str(tmp_path / "home")}
    ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", **home}
    forked.run([sys.executable, "-c", load], env={**os.environ, **ours}, check=True)
    said = command(hub, tmp_path, "inspect", "--variant", "me/cached", "--offline", **home)
    assert "If it was evaluated, the evaluation is not in the cache." in said
    assert "copy: " in command(hub, tmp_path, "pull", "--variant", "me/cached", "--output", "copy", "--offline", **home)
    assert sorted(os.listdir(tmp_path / "copy")) == sorted(os.listdir(work / "v"))


def test_a_token_is_in_no_repr():
    assert TOKEN not in repr(Repository("me/v", token=TOKEN))
