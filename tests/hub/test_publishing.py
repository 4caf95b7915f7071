"""Publishing and loading by the real client, in a process of its own, against the Hub of hub_server.py."""

from __future__ import annotations

import json
import os

import hub_worker
import pytest
from hub_worker import OURS, READ_ONLY, Failed, Worker

hub, repo, small, worker = (getattr(hub_worker, name) for name in ("hub", "repo", "small", "worker"))

FORMS = [{"full": False}, {"full": True}]


def others(hub, repo, start):
    """What was asked since, about a repository."""
    return [r for r in hub.requests[start:] if repo in r.path or "/create" in r.path]


def consented(hub, worker, repo, push, *lost):
    """The outcome of a push, an expression that ends in `)`, that is refused first, with what would go, and sends
    nothing before it may."""
    start = len(hub.requests)
    with pytest.raises(Failed, match=r"^ValueError: .* would lose .* Nothing was sent: give allow_removal=") as failed:
        worker(push)
    assert {r.method for r in others(hub, repo, start)} <= {"GET", "HEAD"}
    named = str(failed.value).partition(" would lose ")[2].partition(". Nothing was sent")[0].split("; ")
    assert len(named) == len(lost), named
    for words, expected in zip(named, lost, strict=True):
        assert expected in words
    return worker(f"{push[:-1]}, allow_removal=True)")


@pytest.mark.parametrize("visibility", ["public", "private"])
@pytest.mark.parametrize("form", FORMS, ids=["lambdas", "full"])
def test_what_was_pushed_is_loaded(hub, worker, small, repo, form, visibility):
    done = worker.push(repo, visibility=visibility, **form)
    assert hub.repo(repo).private is (visibility == "private")
    assert set(done["files"]) == OURS | ({"model.safetensors"} if form["full"] else set())
    assert done["files"] == {k: len(v) for k, v in hub.repo(repo).files().items() if k != ".gitattributes"}
    assert len(hub.repo(repo).commits()) == 2
    assert worker.load(repo) == worker.load(f"hf-hub:{repo}") == small != worker("seen(plain)")


@pytest.mark.parametrize("form", FORMS, ids=["lambdas", "full"])
def test_every_kind_of_revision(hub, worker, small, repo, form):
    first = worker.push(repo, **form)
    hub.repo(repo).tag("v1")
    proposed = worker.push(repo, "variant(0.9)", pull_request=True, **form)
    assert proposed["pull_request"] == f"{hub.url}/{repo}/discussions/1"
    assert (
        worker.push(repo, "variant(0.1)", revision="a/branch", **form)["commit"]
        == hub.repo(repo).commits("a/branch")[0].oid
    )
    main = worker.push(repo, "variant(0.3)", **form)
    lams = {
        "v1": 0.5,
        first["commit"]: 0.5,
        "refs/pr/1": 0.9,
        "a/branch": 0.1,
        "main": 0.3,
        None: 0.3,
        main["commit"]: 0.3,
    }
    for revision, lam in lams.items():
        assert worker.load(repo, revision=revision) == worker(f"seen(variant({lam}))"), revision
    assert [len(hub.repo(repo).commits(r)) for r in ("main", "a/branch", "refs/pr/1")] == [3, 3, 3]
    again = worker.push(repo, "variant(0.7)", revision="refs/pr/1", **form)
    assert worker.load(repo, revision="refs/pr/1") == worker("seen(variant(0.7))")
    assert again["commit"] == hub.repo(repo).commits("refs/pr/1")[0].oid


def test_through_timm(worker, small, repo):
    worker.push(repo)
    worker.push(f"{repo}-full", full=True)
    assert worker(f"from_timm({repo!r})") == small
    assert worker(f"from_timm({repo + '-full'!r})") == worker("seen(plain)")
    random = worker(f"from_timm({repo!r}, pretrained=False)")
    assert random[0] == small[0]
    assert random[1] != small[1]
    with pytest.raises(
        Failed, match=rf"^ValueError: .*{repo} is a variant, and is loaded as it was saved: without num_cl"
    ):
        worker(f"from_timm({repo!r}, num_classes=3)")
    with pytest.raises(Failed, match=r"^ValueError: .* is a variant already: load it by timm_nrpm.from_pretrained"):
        worker(f"nrpm.create_model('hf-hub:{repo}', pretrained=True)")


def test_through_timm_at_a_revision(hub, worker, small, repo):
    worker.push(repo)
    hub.repo(repo).tag("v1")
    worker.push(repo, "variant(0.9)")
    assert worker(f"from_timm({repo + '@v1'!r})") == small != worker(f"from_timm({repo!r})")


def test_a_base_on_the_hub_stays_at_its_commit(hub, worker, repo):
    base = hub.create(f"{repo}-base")
    for name, seed in (("first", 1), ("later", 2)):
        made = f"[torch.manual_seed({seed}), timm.create_model('resnet8_digits')][1]"
        worker(f"timm.models.save_for_hf({made}, {name!r}, safe_serialization=True)")
        base.commit({f.name: f.read_bytes() for f in (worker.folder / name).iterdir()}, lfs=["model.safetensors"])
        if name == "first":
            was = worker(f"seen(globals().setdefault('hubs', variant(0.5, 'hf-hub:{repo}-base')))")
            worker.push(repo, "hubs")
    assert "model.safetensors" not in hub.repo(repo).files()
    assert worker.load(repo) == was == worker(f"from_timm({repo!r})")
    assert f"\nbase_model: {repo}-base\n" in hub.repo(repo).files()["README.md"].decode()
    config = json.loads(hub.repo(repo).files()["nrpm_config.json"])
    assert config["base"]["revision"] == base.commits()[1].oid


def test_offline_from_the_cache(hub, worker, small, repo, tmp_path):
    worker.push(repo)
    worker.push(f"{repo}-full", full=True)
    for name in (repo, f"{repo}-full"):
        with pytest.raises(Failed, match=r"^Unreachable: .*the cache does not hold it"):
            worker.load(name, local_files_only=True)
        assert worker.load(name, cache_dir=None) == worker.load(name, cache_dir=None, local_files_only=True) == small
    offline = Worker(hub, tmp_path / "offline", HF_HUB_OFFLINE="1", HF_HOME=str(worker.folder / "home"))
    start = len(hub.requests)
    for name in (repo, f"{repo}-full"):
        assert offline.load(name, cache_dir=None) == small
    with pytest.raises(Failed, match=r"^Unreachable: .*the cache does not hold it"):
        offline.load(repo)
    with pytest.raises(Failed, match=r"^Unreachable: "):
        offline.push(repo)
    assert len(hub.requests) == start
    offline.kill()


@pytest.mark.parametrize("form", FORMS, ids=["lambdas", "full"])
def test_nothing_is_sent_twice(hub, worker, repo, form):
    first = worker.push(repo, **form)
    start = len(hub.requests)
    again = worker.push(repo, **form)
    assert (again["commit"], again["uploaded"], again["deleted"]) == (first["commit"], [], [])
    assert {r.method for r in others(hub, repo, start)} <= {"GET", "HEAD"}
    worker.push(repo, **form, license="mit")  # changes the card alone
    sent = others(hub, repo, start)
    assert not any(r.path.startswith("/lfs/") for r in hub.requests[start:])
    assert [r.path.partition("?")[0] for r in sent if "/commit/" in r.path] == [f"/api/models/{repo}/commit/main"]
    assert len(hub.repo(repo).commits()) == 3


def test_what_another_variant_left_goes_in_the_same_commit(hub, worker, small, repo):
    worker.push(repo, full=True, visibility="public")
    hub.repo(repo).commit({"notes/mine.txt": b"mine", "data.bin": b"mine"}, lfs=["data.bin"])
    size = len(hub.repo(repo).files()["model.safetensors"])
    push = f"push(variant(0.9), {repo!r}, full=False)"
    done = consented(hub, worker, repo, push, f"model.safetensors ({size:,} bytes)")
    assert done["deleted"] == ["model.safetensors"]
    assert len(hub.repo(repo).commits()) == 4
    assert set(hub.repo(repo).files()) == {*OURS, ".gitattributes", "notes/mine.txt", "data.bin"}
    assert worker.load(repo) == worker("seen(variant(0.9))")


BY_HAND = b"---\nlicense: mit\nlanguage: en\nmine: [1, 2]\ntags: [digits]\n---\n# Mine\n\nWords of mine.\n"


def test_what_was_written_by_hand_stays(hub, worker, repo):
    hub.create(repo).commit({"README.md": BY_HAND})
    worker.push(repo, tags=["scans", "digits"])
    card = hub.repo(repo).files()["README.md"].decode()
    hub.repo(repo).commit({"README.md": f"{card}\nAfterwards.\n".encode()})
    worker(f"push(small, {repo!r}, reports=report(small))")
    card = hub.repo(repo).files()["README.md"].decode()
    before, generated, seal, after = card.split("<!-- timm_nrpm: ")
    assert seal.startswith("sha256 of the above")
    assert "# Mine\n\nWords of mine.\n" in before
    assert after.endswith("-->\nAfterwards.\n")
    assert "33.3" in generated
    for line in (
        "license: mit",
        "language: en",
        "- digits",
        "- scans",
        "- adversarial-robustness",
        "library_name: timm_nrpm",
    ):
        assert f"\n{line}\n" in before
    assert "evaluation.json" in hub.repo(repo).files()
    start = len(hub.requests)
    worker(f"push(small, {repo!r}, reports=report(small))")
    assert not [r for r in others(hub, repo, start) if r.method == "POST"]
    consented(hub, worker, repo, f"push(small, {repo!r}, reports=[])", "the report under Linf")
    assert "evaluation.json" not in hub.repo(repo).files()


def test_a_card_that_cannot_be_read(hub, worker, repo):
    hub.create(repo).commit({"README.md": b"---\nlicense: [mit\n---\n"})
    with pytest.raises(Failed, match=r"^ValueError: The existing README.md has metadata that cannot be read"):
        worker.push(repo)
    assert len(hub.repo(repo).commits()) == 2


def test_a_card_that_the_hub_does_not_take(hub, worker, repo):
    with pytest.raises(Failed, match=r'^ValueError: The Hub refuses the card: .*"license" must be one of'):
        worker.push(repo, license="mine")
    assert len(hub.repo(repo).commits()) == 1


def test_a_dry_run_asks_nobody(hub, worker, small, repo, tmp_path):
    worker.push(repo)
    start = len(hub.requests)
    folder = tmp_path / "v"
    done = worker.push(repo, full=True, dry_run=True, folder=str(folder))
    assert hub.requests[start:] == []
    assert (done["commit"], done["url"]) == (None, None)
    assert done["files"] == {f.name: f.stat().st_size for f in folder.iterdir()}
    assert set(done["files"]) == {*OURS, "model.safetensors"}
    assert worker.load(str(folder)) == small


REFUSED = {
    "report of another": (
        "push(variant(0.9), 'me/x', reports=report(small))",
        "The report under .* is of another model",
    ),
    "no licence": (
        "push(nrpm.reprogram_(torch.nn.Sequential(torch.nn.Linear(64, 3))), 'me/x')",
        "no licence is known: give one as license=",
    ),
    "no licence of random weights": (
        "push(nrpm.create_model('resnet8_digits', lam=0.5), 'me/x')",
        "no licence is known: give one as license=",
    ),
    "a name without owner": ("push(small, 'x')", "repo_id='x' is not allowed .*: write owner/name"),
    "a name that is none": ("push(small, 'me/x--y')", "repo_id='me/x--y' is not allowed .*: write owner/name"),
    "a pull request to a branch": ("push(small, 'me/x', revision='b', pull_request=True)", "leave out revision='b'"),
    "a plain model": ("push(plain, 'me/x')", "not reprogrammed"),
    "a folder of the other kind": ("push('small', 'me/x', full=True)", "small holds a variant without its weights"),
    "no message": ("push(small, 'me/x', commit_message=' ')", "commit_message is empty"),
}


@pytest.mark.parametrize(("expression", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_any_request(hub, worker, expression, message):
    start = len(hub.requests)
    with pytest.raises(Failed, match=f"^ValueError: .*{message}"):
        worker(expression)
    assert hub.requests[start:] == []


NOT_ALLOWED = {
    "wrong token": ("push(small, 'me/there', token='hf_wrongwrong')", "HubError: .*the token is not valid"),
    "no token": ("push(small, 'me/public', token=False)", "HubError: .*the token is not valid"),
    "read-only token": (f"push(small, 'me/there', token={READ_ONLY!r})", "HubError: .*may not do that .*no write acc"),
    "somebody else's": ("push(small, 'you/public')", "HubError: .*may not do that .*rights"),
    "somebody else's name": ("push(small, 'you/new')", "HubError: .*may not do that .*rights"),
    "no such pull request": ("push(small, 'me/there', revision='refs/pr/9')", "NotOnHub: .*no such revision"),
    "load what is private": ("load('me/there', token=False)", "NotOnHub: .*no such repository, or it is private"),
    "load by a wrong token": ("load('me/there', token='hf_wrongwrong')", "HubError: "),
    "load what is not there": ("load('me/nowhere')", "NotOnHub: .*no such repository, or it is private"),
    "load no such revision": ("load('me/there', revision='gone')", "NotOnHub: .*no such revision"),
    "load what is no variant": ("load('me/there')", "NotOnHub: .*nrpm_config.json.*no such file"),
    "pull what is not there": ("nrpm.pull('me/nowhere', 'nowhere')", "NotOnHub: .*no such repository"),
    "list without token": ("nrpm.list_variants('me', token='hf_wrongwrong')", "HubError: .*the token is not valid"),
}


@pytest.mark.parametrize(("expression", "message"), NOT_ALLOWED.values(), ids=NOT_ALLOWED)
def test_what_one_may_not(hub, worker, expression, message):
    for name in ("me/there", "me/public", "you/public"):
        hub.create(name, private=name == "me/there")
    start = len(hub.requests)
    with pytest.raises(Failed, match=f"^{message}") as failed:
        worker(expression)
    assert "The above exception" not in failed.value.trace
    assert "hf_wrong" not in str(failed.value)
    assert all(len(hub.repo(name).commits()) == 1 for name in ("me/there", "me/public", "you/public"))
    assert not [r for r in hub.requests[start:] if r.method == "PUT"]
    assert not (worker.folder / "nowhere").exists()


def test_a_hub_that_makes_private_ones_public(hub, worker, repo):
    hub.lying_visibility = True
    start = len(hub.requests)
    with pytest.raises(Failed, match=r"^HubError: .* is public, and was to be private: nothing was sent"):
        worker.push(repo)
    hub.lying_visibility = False
    assert [r.path for r in others(hub, repo, start) if r.method != "GET"] == ["/api/repos/create"]
    assert list(hub.repo(repo).files()) == [".gitattributes"]


def test_what_the_hub_has(hub, worker, small, repo, tmp_path):
    done = worker(f"push(small, {repo!r}, reports=report(small), full=True)")
    about = worker(f"(lambda d: [d.commit, d.is_full, len(d.reports), d.note])(nrpm.inspect({repo!r}))")
    assert about == [done["commit"], True, 1, "1 evaluation"]
    assert not any("model.safetensors" in r.path for r in hub.requests if r.method == "GET" and repo in r.path)
    assert repo in worker("[found.repo_id for found in nrpm.list_variants('me')]")
    worker(f"nrpm.pull({repo!r}, {str(tmp_path / 'v')!r}, cache_dir=fresh())")
    files = {f.name: f.read_bytes() for f in (tmp_path / "v").iterdir()}
    assert files == {name: content for name, content in hub.repo(repo).files().items() if name != ".gitattributes"}
    assert worker.load(str(tmp_path / "v")) == small
    assert os.listdir(tmp_path) == ["v"]


def evaluated(hub, worker, repo, **options):
    """A repository with a model, its evaluation, datasets and a licence."""
    about = {"license": "mit", "datasets": ["me/digits"], "visibility": "public", **options}
    worker(f"push(small, {repo!r}, reports=report(small), **{about!r})")
    return dict(hub.repo(repo).files())


def same_but(before, after, *names):
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set(names)


def test_the_numbers_of_the_same_model_stay(hub, worker, repo):
    before = evaluated(hub, worker, repo)
    done = worker.push(repo)
    assert (done["uploaded"], done["deleted"]) == ([], [])
    assert done["notes"] == ["The evaluation in the repository is of this same model, and was kept."]
    assert "evaluation.json" in done["files"]
    done = worker.push(repo, "'small'", license="bsd-3-clause")  # from a folder, and something changes
    assert (done["uploaded"], done["deleted"]) == (["README.md"], [])
    after = hub.repo(repo).files()
    assert same_but(before, after, "README.md")
    assert after["README.md"] == before["README.md"].replace(b"license: mit", b"license: bsd-3-clause")
    assert b"33.3" in after["README.md"]


@pytest.mark.parametrize("where", [{"revision": "work"}, {"pull_request": True}], ids=["branch", "pull request"])
def test_the_numbers_stay_on_a_branch_and_in_a_pull_request(hub, worker, repo, where):
    before = evaluated(hub, worker, repo)
    worker.push(repo, license="bsd-3-clause", **where)
    files = hub.repo(repo).files(where.get("revision", "refs/pr/1"))
    assert same_but(before, files, "README.md")
    assert files["README.md"] == before["README.md"].replace(b"license: mit", b"license: bsd-3-clause")


def test_numbers_of_another_model_go_and_it_is_said(hub, worker, repo):
    evaluated(hub, worker, repo)
    size = len(hub.repo(repo).files()["evaluation.json"])
    push, lost = f"push(variant(0.9), {repo!r})", f"evaluation.json ({size:,} bytes), which is of another model"
    done = consented(hub, worker, repo, push, lost)
    assert done["deleted"] == ["evaluation.json"]
    assert len(done["notes"]) == 1
    assert "is of another model, and was removed with its numbers" in done["notes"][0]
    card = hub.repo(repo).files()["README.md"].decode()
    assert "**Not evaluated.**" in card
    assert "model-index" not in card
    assert "33.3" not in card
    for line in ("license: mit", "- me/digits"):  # which are still true of a model with the same base
        assert f"\n{line}\n" in card


def test_an_empty_list_of_reports_removes_them(hub, worker, repo):
    evaluated(hub, worker, repo)
    lost = "the report under Linf 0.03137 (to keep it, leave out reports=)"
    done = consented(hub, worker, repo, f"push(small, {repo!r}, reports=[])", lost)
    assert done["deleted"] == ["evaluation.json"]
    assert "to keep it, leave out reports=" in done["notes"][0]


def test_reports_that_are_not_among_those_given_are_named(hub, worker, repo):
    evaluated(hub, worker, repo)
    other = "__import__('dataclasses').replace(report(small), threat=nrpm.Threat('L2', 0.5))"
    push = f"push(small, {repo!r}, reports={other})"
    done = consented(hub, worker, repo, push, "the report under Linf 0.03137 (to keep it, give it beside the others)")
    assert done["uploaded"] == ["evaluation.json", "README.md"]
    assert "Linf 0.03137" in done["notes"][0]
    assert "give it beside the others" in done["notes"][0]


def test_an_evaluation_that_cannot_be_read_is_not_lost(hub, worker, repo):
    evaluated(hub, worker, repo)
    for content in (b"[", b'{"reports": [{"of": "a later version"}]}'):
        hub.repo(repo).commit({"evaluation.json": content})
        start = len(hub.requests)
        with pytest.raises(Failed, match=r"^ValueError: .*evaluation.json .*cannot be read.*reports=\(\)"):
            worker.push(repo)
        assert {r.method for r in others(hub, repo, start)} <= {"GET", "HEAD"}
    push, lost = f"push(small, {repo!r}, reports=[])", f"evaluation.json ({len(content)} bytes), which cannot be read"
    consented(hub, worker, repo, push, lost, "numbers in the card's model-index: accuracy under")
    assert "evaluation.json" not in hub.repo(repo).files()


def test_numbers_that_somebody_put_there_are_not_believed(hub, worker, repo):
    """They lie beside this very model, and are of another."""
    before = evaluated(hub, worker, repo)
    forged = before["evaluation.json"].replace(
        json.loads(before["evaluation.json"])["reports"][0]["sha256"].encode(), b"0" * 64
    )
    hub.repo(repo).commit({"evaluation.json": forged})
    done = consented(hub, worker, repo, f"push(small, {repo!r})", "evaluation.json (")
    assert done["deleted"] == ["evaluation.json"]
    assert "is of another model" in done["notes"][0]
    assert "33.3" not in hub.repo(repo).files()["README.md"].decode()


def test_weights_that_are_there_stay(hub, worker, small, repo):
    """Weights are not asked for again where the repository holds these very ones."""
    worker.push(repo, full=True)
    done = worker.push(repo)
    assert (done["uploaded"], done["deleted"]) == ([], [])
    done = worker.push(repo, "variant(0.9)")
    assert "model.safetensors" not in [*done["uploaded"], *done["deleted"]]
    assert worker.load(repo) == worker("seen(variant(0.9))")
    done = consented(hub, worker, repo, f"push(variant(0.9), {repo!r}, full=False)", "model.safetensors (")
    assert done["deleted"] == ["model.safetensors"]


def test_a_picture_stays_where_there_is_nothing_to_draw_it(hub, worker, small, repo, tmp_path):
    before = evaluated(hub, worker, repo)
    bare = Worker(hub, tmp_path / "bare", WITHOUT="matplotlib")
    done = bare.push(repo)
    assert (done["uploaded"], done["deleted"]) == ([], [])
    done = bare.push(repo, license="bsd-3-clause")
    assert done["uploaded"] == ["README.md"]
    assert same_but(before, hub.repo(repo).files(), "README.md")
    done = bare.push(repo, "variant(0.9)", allow_removal=True)
    assert done["deleted"] == ["evaluation.json", "lambdas.png"]  # of other lambdas
    bare.kill()


def test_a_dry_run_says_what_it_cannot_know(worker, repo):
    said = worker(f"str(nrpm.push_to_hub(small, {repo!r}, dry_run=True))")
    assert "evaluation in the repository is kept if it is of this same model" in said
