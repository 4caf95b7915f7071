"""The Hub that other tests run against: that the real client gets along with it, and that it is strict."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from hub_server import Fault, Hub

CARD = b"---\nlicense: mit\nlibrary_name: timm\ntags: [nrpm]\nbase_model: timm/resnet18.a1_in1k\n---\n# A model\n"
MODEL = "/api/models/alice/m"

CLIENT = """
import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

api, repo = HfApi(), "alice/m"
card, large = Path("README.md").read_bytes(), Path("large.dat").read_bytes()


def commit(files, **settings):
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(repo, operations, commit_message="A commit", **settings)


def fails(error, do, *args, **kwargs):
    try:
        do(*args, **kwargs)
    except error as failure:
        return failure
    raise AssertionError(f"no {error}")


assert api.whoami()["name"] == "alice"
assert api.create_repo(repo, private=True).repo_id == repo
assert api.create_repo(repo, exist_ok=True).repo_id == repo
info = api.model_info(repo, files_metadata=True)
assert info.private
assert [file.rfilename for file in info.siblings] == [".gitattributes"]

first = commit({"README.md": card, "folder/large.dat": large, "small.safetensors": b"small"})
again = commit({"README.md": card, "folder/large.dat": large, "small.safetensors": b"small"})
assert again.oid == first.oid
info = api.model_info(repo, files_metadata=True)
assert info.sha == first.oid
assert info.card_data.base_model == "timm/resnet18.a1_in1k"
assert {"nrpm", "timm", "license:mit", "base_model:timm/resnet18.a1_in1k"} <= set(info.tags)
files = {file.rfilename: file for file in info.siblings}
assert files["folder/large.dat"].lfs.size == files["folder/large.dat"].size == len(large)
assert files["README.md"].lfs is None

api.create_tag(repo, tag="v/1")
api.create_branch(repo, branch="work", revision=first.oid)
worked = commit({"new.txt": b"new"}, revision="work", parent_commit=first.oid)
proposed = commit({"new.txt": b"proposed"}, create_pr=True)
assert proposed.pr_revision == "refs/pr/1"
more = commit({"more.txt": b"more"}, revision="refs/pr/1")
fails(EntryNotFoundError, api.hf_hub_download, repo, "new.txt")
fails(RevisionNotFoundError, api.hf_hub_download, repo, "new.txt", revision="nowhere")
wanted = {"work": b"new", worked.oid: b"new", "refs/pr/1": b"proposed", more.oid: b"proposed"}
for revision, content in wanted.items():
    assert Path(api.hf_hub_download(repo, "new.txt", revision=revision)).read_bytes() == content, revision
for revision in ("main", "work", "v/1", first.oid, "refs/pr/1"):
    cache = "by-" + revision.replace("/", "-")
    path = api.hf_hub_download(repo, "folder/large.dat", revision=revision, cache_dir=cache)
    assert Path(path).read_bytes() == large, revision
folder = Path(api.snapshot_download(repo, revision="v/1"))
assert (folder / "README.md").read_bytes() == card

refs = api.list_repo_refs(repo, include_pull_requests=True)
assert [ref.name for ref in refs.branches] == ["main", "work"]
assert [ref.ref for ref in refs.tags] == ["refs/tags/v/1"]
assert [ref.target_commit for ref in refs.pull_requests] == [more.oid]
assert [each.commit_id for each in api.list_repo_commits(repo)][0] == first.oid
paths = [".gitattributes", "README.md", "folder/large.dat", "small.safetensors"]
assert sorted(api.list_repo_files(repo)) == paths
assert [item.path for item in api.list_repo_tree(repo)] == ["folder", *paths[:2], paths[3]]
assert [item.path for item in api.list_repo_tree(repo, "folder")] == ["folder/large.dat"]
assert [item.path for item in api.get_paths_info(repo, ["README.md", "missing"])] == ["README.md"]
assert [model.id for model in api.list_models(author="alice", filter="nrpm")] == [repo]
assert not list(api.list_models(author="alice", filter="other"))

fails(RepositoryNotFoundError, api.hf_hub_download, repo, "README.md", token=False, cache_dir="nobody")
fails(RepositoryNotFoundError, api.hf_hub_download, repo, "README.md", token="of-bob", cache_dir="nobody")
assert not list(api.list_models(author="alice", token="of-bob"))
fails(ValueError, commit, {"README.md": b"---\\nlicense: mine\\n---\\n"})
api.update_repo_settings(repo, private=False)
assert Path(api.hf_hub_download(repo, "folder/large.dat", token=False, cache_dir="nobody")).read_bytes() == large

api.update_repo_settings(repo, private=True)
assert api.model_info(repo).private
made = api.create_collection("Robust models, mine", private=True)
assert made.slug.startswith("alice/robust-models-mine-")
assert api.create_collection("Robust models, mine", exists_ok=True).slug == made.slug
fails(HfHubHTTPError, api.create_collection, "Robust models, mine")
assert api.add_collection_item(made.slug, repo, "model").items[0].item_id == repo
assert len(api.add_collection_item(made.slug, repo, "model", exists_ok=True).items) == 1
fails(HfHubHTTPError, api.add_collection_item, made.slug, repo, "model")
fails(HfHubHTTPError, api.add_collection_item, made.slug, "alice/none", "model")
fails(HfHubHTTPError, api.get_collection, made.slug, token="of-bob")
assert [item.item_id for item in api.get_collection(made.slug).items] == [repo]
fails(HfHubHTTPError, api.create_collection, "Of alice", namespace="alice", token="of-bob")

api.create_commit(repo, [CommitOperationDelete("folder/")], commit_message="Less", parent_commit=first.oid)
assert not api.file_exists(repo, "folder/large.dat")
api.delete_branch(repo, branch="work")
api.delete_tag(repo, tag="v/1")
api.delete_repo(repo)
assert not api.repo_exists(repo)
"""


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


def ask(hub: Hub, method: str, path: str, data: Any = None, token: str | None = None, **headers: str) -> Reply:
    """One request; what is no bytes goes as JSON."""
    address = urlsplit(hub.url + path if path.startswith("/") else path)
    body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if not isinstance(data, bytes) and data is not None:
        headers.setdefault("Content-Type", "application/json")
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(address.netloc, timeout=10)
    try:
        connection.request(method, address._replace(scheme="", netloc="").geturl(), body, headers)
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers, reply.read())
    finally:
        connection.close()


def send_commit(
    hub: Hub, files: Mapping[str, bytes], path: str = MODEL + "/commit/main", token: str = "of-alice", **header: str
) -> Reply:
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "A commit", **header}}]
    for name, content in files.items():
        value = {"path": name, "content": base64.b64encode(content).decode(), "encoding": "base64"}
        lines.append({"key": "file", "value": value})
    body = "\n".join(map(json.dumps, lines)).encode()
    return ask(hub, "POST", path, body, token, Content_Type="application/x-ndjson")


def ask_upload(hub: Hub, content: bytes) -> dict[str, Any]:
    each = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    data = {"operation": "upload", "transfers": ["basic"], "objects": [each], "hash_algo": "sha256"}
    reply = ask(hub, "POST", "/alice/m.git/info/lfs/objects/batch", data, "of-alice")
    assert reply.status == 200
    found: dict[str, Any] = json.loads(reply.body)["objects"][0]
    return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        hub.user("alice", "of-alice", organizations=["lab"])
        hub.user("alice", "to-read", write=False, organizations=["lab"])
        hub.user("bob", "of-bob")
        yield hub


def test_the_real_client(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(CARD)
    (tmp_path / "large.dat").write_bytes(os.urandom(12_000_000))
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "of-alice",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | settings
    command = [sys.executable, "-c", CLIENT]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert hub.unexpected == []
    sent = [request for request in hub.requests if request.path.startswith("/lfs/")]
    assert [request.body_size for request in sent if request.method == "PUT"] in ([5, 12_000_000], [12_000_000, 5])
    assert not any(request.authorized for request in sent)
    with pytest.raises(KeyError):
        hub.repo("alice/m")


FAULTS = {
    "reset": ConnectionResetError,
    "lost": http.client.RemoteDisconnected,
    "stall": http.client.RemoteDisconnected,
    "lost-stall": http.client.RemoteDisconnected,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_without_an_answer(hub: Hub, kind: str) -> None:
    hub.create("alice/m")
    hub.fault(Fault(kind, "POST", "/commit/main$", seconds=0.3))
    assert ask(hub, "GET", MODEL).status == 200
    start = time.monotonic()
    with pytest.raises(FAULTS[kind]) as error:
        send_commit(hub, {"a.txt": b"a"})
    assert type(error.value) is FAULTS[kind]
    assert (time.monotonic() - start > 0.25) is kind.endswith("stall")
    assert ("a.txt" in hub.repo("alice/m").files()) is kind.startswith("lost")
    assert [(request.method, request.status) for request in hub.requests] == [("GET", 200), ("POST", 0)]
    assert send_commit(hub, {"a.txt": b"b"}).status == 200  # used up


def test_fault_status(hub: Hub) -> None:
    hub.create("alice/m")
    hub.fault(Fault("status", "*", "alice", times=2, status=429))
    assert send_commit(hub, {"a.txt": b"a"}).status == 429
    assert len(hub.repo("alice/m").commits()) == 1
    limited = ask(hub, "GET", MODEL)
    assert (limited.status, limited.error) == (429, "The server is not well")
    assert ask(hub, "GET", MODEL).status == 200
    hub.fault(Fault("status", "GET", "alice", times=-1))
    assert [ask(hub, "GET", MODEL).status for _ in range(3)] == [503] * 3
    hub.clear()
    assert hub.requests == []
    assert ask(hub, "GET", MODEL).status == 200
    with pytest.raises(ValueError, match="unknown kind"):
        Fault("typo", "GET", "")


@pytest.mark.parametrize("large", [False, True])
def test_faults_of_the_body(hub: Hub, large: bool) -> None:
    content = os.urandom(3_000_001)
    hub.create("alice/m").commit({"x.txt": content}, lfs=["x.txt"] if large else [])
    where = "/alice/m/resolve/main/x.txt"
    assert ask(hub, "HEAD", where).body == b""
    where = ask(hub, "HEAD", where).headers["Location"] if large else where
    hub.fault(Fault("cut", "*", r"x\.txt"))
    hub.fault(Fault("flip", "GET", r"x\.txt"))
    assert ask(hub, "HEAD", where).status == 200  # has no body to spoil
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(hub, "GET", where)
    assert cut.value.partial == content[:1_500_000]
    flipped = ask(hub, "GET", where)
    assert flipped.headers["Content-Length"] == str(len(content))
    changed = [i for i, (a, b) in enumerate(zip(content, flipped.body, strict=True)) if a != b]
    assert changed == [1_500_000]
    assert (content[1_500_000] ^ flipped.body[1_500_000]).bit_count() == 1
    assert ask(hub, "GET", where).body == content


def test_stopping_does_not_wait(tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        hub.fault(Fault("stall", "GET", "", seconds=60))
        stalled, idle = (http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10) for _ in range(2))
        stalled.request("GET", MODEL)
        while not hub.requests:
            time.sleep(0.01)
        idle.request("GET", MODEL)
        idle.getresponse().read()
        start = time.monotonic()
    assert time.monotonic() - start < 5
    with pytest.raises(http.client.RemoteDisconnected):
        stalled.getresponse()
    assert idle.sock.recv(1) == b""
    idle.close()
    while any("process_request" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() - start < 5, "a thread stalls on"
        time.sleep(0.01)


def test_a_wrong_upload_is_refused_and_forgotten(hub: Hub) -> None:
    repo, content = hub.create("alice/m"), b"right"
    item = ask_upload(hub, content)
    address, verify = item["actions"]["upload"]["href"], item["actions"]["verify"]["href"]
    proof = {"oid": item["oid"], "size": item["size"]}
    assert ask(hub, "POST", verify, proof, "of-alice").status == 404  # nothing came yet
    for wrong in (b"wrong", b"right and more"):
        assert ask(hub, "PUT", address, wrong).status == 200
        assert ask(hub, "POST", verify, proof, "of-alice").status == 422
        assert ask(hub, "POST", verify, proof, "of-alice").status == 404
    assert ask(hub, "PUT", address, content, "of-alice").status == 400  # the token is not for the storage
    assert ask(hub, "PUT", address[:-1] + "-", content).status == 403
    assert ask(hub, "PUT", address, content).status == 200
    assert ask(hub, "POST", verify, proof).status == 401
    value = {"path": "x.bin", "algo": "sha256", **proof}
    lines = [{"key": "header", "value": {"summary": "A commit"}}, {"key": "lfsFile", "value": value}]
    body, kind = "\n".join(map(json.dumps, lines)).encode(), "application/x-ndjson"
    assert ask(hub, "POST", MODEL + "/commit/main", body, "of-alice", Content_Type=kind).status == 400
    assert ask(hub, "POST", verify, proof, "of-alice").status == 200
    assert ask(hub, "POST", MODEL + "/commit/main", body, "of-alice", Content_Type=kind).status == 200
    assert repo.files()["x.bin"] == content
    assert "actions" not in ask_upload(hub, content)


def test_commits_onto_a_stale_parent(hub: Hub) -> None:
    repo = hub.create("alice/m")
    start = repo.commits()[0].oid
    reply = send_commit(hub, {"a.txt": b"a"}, parentCommit=start)
    assert reply.status == 200
    assert json.loads(reply.body)["commitOid"] == repo.commits()[0].oid
    stale = send_commit(hub, {"b.txt": b"b"}, parentCommit=start)
    assert stale.status == 412
    assert stale.error
    assert sorted(repo.files()) == [".gitattributes", "a.txt"]


def test_names_stay_as_they_are(hub: Hub) -> None:
    names = ["../x", "/etc/passwd", "a//b", "a b%2Fc", "é"]
    repo = hub.create("alice/m")
    repo.commit(dict.fromkeys(names, b"there"))
    listed = json.loads(ask(hub, "GET", MODEL + "/tree/main?recursive=true").body)
    assert set(names) <= {item["path"] for item in listed if item["type"] == "file"}
    assert set(names) <= {each["rfilename"] for each in json.loads(ask(hub, "GET", MODEL).body)["siblings"]}
    for path in ("../x", "/etc/passwd", "a//b", "a%20b%252Fc", "%C3%A9"):
        assert ask(hub, "GET", "/alice/m/resolve/main/" + path).body == b"there", path
    assert hub.requests[-5].path == "/alice/m/resolve/main/../x"
    repo.commit({"x": b"x"}, branch="main/x")
    assert ask(hub, "GET", "/alice/m/resolve/main%2Fx/x").status == 200
    assert ask(hub, "GET", "/alice/m/resolve/main/x/x").status == 404
    for path in ("../x", "/x", "a//b", ".git/config", ""):
        assert send_commit(hub, {path: b""}).status == 400, path
    assert ask(hub, "GET", "//alice/m/resolve/main/x").status == 501
    assert len(hub.unexpected) == 1


def test_blobs_are_named_as_git_names_them(hub: Hub) -> None:
    hub.create("alice/m").commit({"a.txt": b"hello\n", "b.txt": b"hello\n"}, lfs=["b.txt"])
    sha1, sha256 = "ce013625030ba8dba906f756967f9e9ca394464a", hashlib.sha256(b"hello\n").hexdigest()
    reply = ask(hub, "HEAD", "/alice/m/resolve/main/a.txt")
    assert (reply.headers["ETag"], reply.headers["Content-Length"]) == (f'"{sha1}"', "6")
    reply = ask(hub, "HEAD", "/alice/m/resolve/main/b.txt")
    assert (reply.status, reply.headers["X-Linked-Etag"], reply.headers["X-Linked-Size"]) == (302, f'"{sha256}"', "6")
    files = [{"path": name, "sample": "", "size": 6} for name in ("a.txt", "b.txt", "c.txt", "c.pt")]
    found = json.loads(ask(hub, "POST", MODEL + "/preupload/main", {"files": files}, "of-alice").body)["files"]
    assert [each.get("oid") for each in found] == [sha1, sha256, None, None]
    assert [each["uploadMode"] for each in found] == ["regular", "regular", "regular", "lfs"]
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 6\n".encode()
    listed = {each["path"]: each for each in json.loads(ask(hub, "GET", MODEL + "/tree/main").body)}
    assert listed["a.txt"]["oid"] == sha1
    assert listed["b.txt"]["oid"] == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert listed["b.txt"]["lfs"] == {"oid": sha256, "size": 6, "pointerSize": len(pointer)}


def test_ranges(hub: Hub) -> None:
    hub.create("alice/m").commit({"x.txt": b"0123456789"})
    where = "/alice/m/resolve/main/x.txt"
    for asked, status, content in [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=8-99", 206, b"89"),
    ]:
        reply = ask(hub, "GET", where, Range=asked)
        assert (reply.status, reply.body) == (status, content)
        assert reply.headers["Content-Range"].endswith("/10")
    reply = ask(hub, "GET", where, Range="bytes=10-")
    assert (reply.status, reply.headers["Content-Range"]) == (416, "bytes */10")
    assert ask(hub, "GET", where).status == 200


def test_who_may_do_what(hub: Hub) -> None:
    hub.create("alice/m", private=True)
    hub.create("lab/public")
    wrong = ask(hub, "GET", "/api/models/lab/public", token="wrong")
    assert (wrong.status, wrong.headers["X-Error-Message"]) == (401, "Invalid username or password.")
    for path in (MODEL, MODEL + "/refs", "/alice/m/resolve/main/.gitattributes", "/api/models/no/such"):
        for token, status in ((None, 401), ("of-bob", 404)):
            reply = ask(hub, "GET", path, token=token)
            assert (reply.status, reply.headers["X-Error-Code"]) == (status, "RepoNotFound")
    assert ask(hub, "GET", MODEL, token="to-read").status == 200
    for token, status in ((None, 401), ("to-read", 403), ("of-bob", 403), ("of-alice", 201)):
        assert ask(hub, "POST", "/api/models/lab/public/branch/b", {}, token).status == status
        made = ask(hub, "POST", "/api/repos/create", {"name": "n", "organization": "lab"}, token).status
        assert made == (200 if status == 201 else status)
    missing = ask(hub, "GET", MODEL + "/revision/no", token="of-alice")
    assert (missing.status, missing.headers["X-Error-Code"]) == (404, "RevisionNotFound")
    missing = ask(hub, "GET", "/alice/m/resolve/main/no", token="of-alice")
    assert (missing.status, missing.headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert missing.headers["X-Repo-Commit"] == hub.repo("alice/m").commits()[0].oid


def test_visibility(hub: Hub) -> None:
    def create(name: str, **settings: Any) -> int:
        return ask(
            hub, "POST", "/api/repos/create", {"name": name, "organization": None, **settings}, "of-alice"
        ).status

    assert create("a", visibility="private") == create("b") == create("c", private=True) == 200
    assert [hub.repo(f"alice/{name}").private for name in "abc"] == [True, False, True]
    assert create("a", visibility="private") == 409
    assert create("d", visibility="secret") == create("../d") == 400
    hub.lying_visibility = True
    assert create("d", visibility="private") == 200
    assert not hub.repo("alice/d").private


@pytest.mark.parametrize(
    "front",
    [
        "license: mine",
        "base_model: ./checkpoints/base",
        "base_model: [timm/resnet18, /a/b]",
        "base_model_relation: sibling",
        "tags: one",
        "tags: [1]",
        "model-index: [{results: []}]",
        "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d}, metrics: []}]}]",
        "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: a}]}]}]",
        "[",
    ],
)
def test_cards_that_are_refused(hub: Hub, front: str) -> None:
    def validate(text: str) -> Reply:
        return ask(hub, "POST", "/api/validate-yaml", {"content": text, "repoType": "model"})

    hub.create("alice/m")
    card = f"---\n{front}\n---\n# A model\n"
    reply = validate(card)
    assert reply.status == 400
    assert json.loads(reply.body)["errors"][0]["message"]
    assert send_commit(hub, {"README.md": card.encode()}).status == 400
    assert validate(CARD.decode()).status == 200
    result = "{task: {type: t}, dataset: {type: d, name: d}, metrics: [{type: a, value: 1}]}"
    fine = validate(f"---\nmodel-index: [{{name: m, results: [{result}]}}]\n---\n")
    assert (fine.status, json.loads(fine.body)["warnings"]) == (200, [])
    assert json.loads(validate("# A model").body)["warnings"]


def test_what_is_missing_or_unknown(hub: Hub) -> None:
    hub.create("alice/m")
    for method, path, data in [
        ("POST", "/api/repos/create", {}),
        ("POST", "/api/repos/create", {"name": 1, "organization": None}),
        ("PUT", MODEL + "/settings", {}),
        ("POST", MODEL + "/preupload/main", {"files": [{"path": "a", "sample": "", "size": True}]}),
        ("POST", MODEL + "/commit/main", {"key": "header", "value": {"summary": "A commit"}}),
        ("POST", MODEL + "/tag/main", {"message": "no name"}),
        ("POST", "/alice/m.git/info/lfs/objects/batch", {"operation": "upload"}),
        ("POST", "/api/validate-yaml", b"text"),
    ]:
        assert ask(hub, method, path, data, "of-alice").status == 400, path
    assert send_commit(hub, {"a.safetensors": b"not through LFS"}).status == 400
    assert send_commit(hub, {}).status == 400
    assert send_commit(hub, {"a": b""}, summary="").status == 400
    assert hub.unexpected == []
    for method, path in [("GET", "/api/datasets/a/b"), ("PATCH", MODEL), ("GET", "/api/models?other=1")]:
        assert ask(hub, method, path).status == 501
    assert ask(hub, "GET", hub.storage_url + MODEL).status == 501
    assert len(hub.unexpected) == 4


def test_branches_and_tags(hub: Hub) -> None:
    repo = hub.create("alice/m")
    repo.tag("v1")
    start = repo.commits("v1")[0].oid
    assert ask(hub, "POST", MODEL + "/branch/v%2F2", {"startingPoint": "v1"}, "of-alice").status == 201
    assert ask(hub, "POST", MODEL + "/branch/v%2F2", {}, "of-alice").status == 409
    assert ask(hub, "POST", MODEL + "/tag/main", {"tag": "v1"}, "of-alice").status == 409
    assert ask(hub, "POST", MODEL + "/tag/nowhere", {"tag": "v3"}, "of-alice").status == 404
    assert ask(hub, "DELETE", MODEL + "/branch/main", token="of-alice").status == 403
    assert ask(hub, "DELETE", MODEL + "/branch/nowhere", token="of-alice").status == 404
    assert send_commit(hub, {"a": b"a"}, MODEL + "/commit/v1").status == 404  # a tag stays where it is
    assert send_commit(hub, {"a": b"a"}, MODEL + "/commit/v%2F2").status == 200
    assert [len(repo.commits(name)) for name in ("main", "v1", "v/2", start)] == [1, 1, 2, 1]


def test_pull_requests_of_others(hub: Hub) -> None:
    repo = hub.create("lab/m")

    def commit(where: str, token: str) -> Reply:
        return send_commit(hub, {"a": b"a"}, f"/api/models/lab/m/commit/{where}", token)

    assert commit("main", "of-bob").status == 403
    assert json.loads(commit("main?create_pr=1", "of-bob").body)["pullRequestUrl"].endswith("/lab/m/discussions/1")
    assert commit("refs%2Fpr%2F1", "of-bob").status == commit("refs%2Fpr%2F1", "of-alice").status == 200
    assert json.loads(commit("main?create_pr=1", "of-alice").body)["pullRequestUrl"].endswith("/2")
    assert commit("refs%2Fpr%2F2", "of-bob").status == 403
    assert repo.pull_requests == ["refs/pr/1", "refs/pr/2"]
    assert len(repo.commits("refs/pr/1")) == 4
    assert len(repo.commits()) == 1
