"""A small strict Hugging Face Hub on loopback, for tests that run the real client against it.

It keeps to what the client's methods for models send and expect. A request that lacks a field or has one of the wrong
type is refused with 400; one that it does not know is answered with 501 and noted in `Hub.unexpected`. Large files
lie on a second port, as the real ones lie on another host: the client has to keep its token to itself there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import NoneType
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml

MAIN = "refs/heads/main"
LFS_NAMES = (".safetensors", ".bin", ".png", ".pt", ".pth", ".ckpt")
LFS_SIZE = 10_000_000  # above which a file of any name is a large one
ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES)
LICENSES = ["apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "openrail", "unknown", "other"]
LICENSES += ["cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0"]
RELATIONS = ("adapter", "merge", "quantized", "finetune")
CARD = re.compile(r"---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)
LIST_OPTIONS = {"author", "filter", "search", "limit", "full", "cardData", "sort", "expand", "pipeline_tag"}
KINDS = ("status", "cut", "flip", "slow")
SILENT = ("reset", "stall", "lost", "lost-stall")  # the faults that leave the client without an answer


@dataclass
class Fault:
    """What goes wrong, with the next `times` requests that fit.

    status: answers `status` and does nothing. reset: reads the request, then resets the connection. cut: sends half of
    the body and closes. flip: changes one bit in the middle of the body. lost: does what was asked, then closes without
    an answer. stall: does nothing and keeps the connection open for `seconds`. lost-stall: does it, then stalls. slow:
    waits for `seconds`, then answers as if nothing were wrong.
    """

    kind: str
    method: str  # or "*" for any
    path: str  # a regular expression, searched in the raw path with its query
    times: int = 1  # -1 for ever
    status: int = 503
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, *SILENT):
            raise ValueError(f"unknown kind of fault {self.kind!r}")


@dataclass(frozen=True)
class Request:
    """A request that came, and how it was answered."""

    method: str
    path: str
    status: int  # 0 when there was no answer
    user: str | None
    body_size: int
    authorized: bool  # whether it carried an Authorization header


@dataclass(frozen=True)
class User:
    name: str
    write: bool
    organizations: tuple[str, ...]

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class Upload:
    """What was put into the storage, under whatever name."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Blob:
    """A file's content, which lies in the hub's folder under its sha256."""

    path: Path
    size: int
    sha1: str  # of the content as a git blob
    lfs: bool

    @property
    def sha256(self) -> str:
        return self.path.name

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        return git_oid(self.pointer) if self.lfs else self.sha1

    def as_item(self, path: str) -> dict[str, Any]:
        """As tree and paths-info list it."""
        item = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            item["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return item


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    date: datetime
    files: dict[str, Blob]
    author: str = "test"
    message: str = ""


@dataclass
class Answer:
    """Sent with the right Content-Length. The body is `body`, or `length` bytes of a file from `start` on."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if self.file is None:
            self.length = len(self.body)

    def chunks(self) -> Iterator[bytes]:
        if self.file is None:
            yield self.body
            return
        with open(self.file, "rb") as file:
            file.seek(self.start)
            left = self.length
            while left:
                yield (chunk := file.read(min(left, 1 << 20)))
                left -= len(chunk)


class Refused(Exception):
    """Becomes an answer with an error, in its body and in the headers that the client reads."""

    def __init__(self, status: int, message: str, code: str = "", *, headers: Mapping[str, str] = {}, **body: Any):
        super().__init__(message)
        self.answer = as_json({"error": message, **body}, status)
        self.answer.headers |= {"X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
        self.answer.headers |= ({"X-Error-Code": code} if code else {}) | dict(headers)


def as_json(data: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(data, default=str).encode(), {"Content-Type": "application/json; charset=utf-8"})


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def as_date(date: datetime) -> str:
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_NAMES) or size > LFS_SIZE


def check(data: Any, **kinds: type | tuple[type, ...]) -> Any:
    """Refuses an object that lacks one of the fields or has one of another type; NoneType: it may be absent."""
    for name, kind in kinds.items():
        kind = kind if isinstance(kind, tuple) else (kind,)
        value = data.get(name) if isinstance(data, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise Refused(400, f"`{name}` must be {' or '.join(k.__name__ for k in kind)}, not {value!r}")
    return data


class Repo:
    """A model's repository. What is asked of it here comes from the test and not from a request."""

    def __init__(self, hub: Hub, repo_id: str, private: bool) -> None:
        self.hub, self.id, self.private = hub, repo_id, private
        self.gated: bool | str = False
        self.refs: dict[str, str] = {}  # by their full names
        self.authors: dict[str, str] = {}  # of the pull requests
        self.objects: dict[str, Blob] = {}  # large files that were uploaded, by sha256
        self._commits: dict[str, Commit] = {}
        self._count = 0
        self.commit({".gitattributes": ATTRIBUTES.encode()}, "initial commit")

    @property
    def pull_requests(self) -> list[str]:
        return [ref for ref in self.refs if ref.startswith("refs/pr/")]

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def head(self, revision: str) -> Commit | None:
        ref = self.ref(revision)
        return self._commits.get(self.refs[ref] if ref else revision)

    def commits(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        with self.hub.lock:
            found, commit = [], self.head(revision)
            if commit is None:
                raise KeyError(revision)
            while commit is not None:
                found.append(commit)
                commit = self._commits[commit.parent] if commit.parent else None
            return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.path.read_bytes() for path, blob in self.commits(revision)[0].files.items()}

    def commit(
        self, files: Mapping[str, bytes], title: str = "A commit", branch: str = "main", lfs: Collection[str] = ()
    ) -> str:
        """Adds files, under any names, to a branch or a pull request; a new branch starts at main."""
        with self.hub.lock:
            ref = self.ref(branch) or f"refs/heads/{branch}"
            parent = self._commits.get(self.refs.get(ref) or self.refs.get(MAIN, ""))
            tree = dict(parent.files) if parent else {}
            for path, content in files.items():
                tree[path] = self.hub.store(content, lfs=path in lfs)
                if path in lfs:
                    self.objects[tree[path].sha256] = tree[path]
            return self.add(ref, parent, tree, title).oid

    def add(
        self,
        ref: str,
        parent: Commit | None,
        files: dict[str, Blob],
        title: str,
        message: str = "",
        author: str = "test",
    ) -> Commit:
        self._count += 1
        above = parent.oid if parent else None
        oid = hashlib.sha1(f"{self.id} {self._count} {above} {title} {sorted(files)}".encode()).hexdigest()
        self._commits[oid] = commit = Commit(oid, above, title, datetime.now(timezone.utc), files, author, message)
        self.refs[ref] = oid
        return commit

    def tag(self, name: str, revision: str = "main") -> None:
        with self.hub.lock:
            self.refs[f"refs/tags/{name}"] = self.commits(revision)[0].oid

    def info(self, commit: Commit, blobs: bool = False) -> dict[str, Any]:
        """As model_info and list_models give it."""
        readme = commit.files.get("README.md")
        card, _ = read_card(readme.path.read_text("utf-8", "replace") if readme else "")
        named = {"library_name": "", "pipeline_tag": "", "license": "license:", "base_model": "base_model:"}
        tags = list(card.get("tags") or [])
        for key, prefix in named.items():
            values = card.get(key) or []
            tags += [prefix + value for value in ([values] if isinstance(values, str) else values)]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if blobs else ():
            blob = commit.files[sibling["rfilename"]]
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.lfs:
                sibling["lfs"] = {"size": blob.size, "sha256": blob.sha256, "pointerSize": len(blob.pointer)}
        internal = hashlib.sha1(self.id.encode()).hexdigest()[:24]
        info: dict[str, Any] = {"_id": internal, "id": self.id, "modelId": self.id}
        info |= {"author": self.id.split("/")[0], "sha": commit.oid, "private": self.private, "gated": self.gated}
        info |= {"disabled": False, "downloads": 0, "likes": 0, "tags": list(dict.fromkeys(tags)), "siblings": siblings}
        info |= {"lastModified": as_date(commit.date), "createdAt": as_date(self.commits(commit.oid)[-1].date)}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        return info | ({"cardData": card} if card else {})


@dataclass
class Collected:
    """A list of repositories that somebody keeps."""

    slug: str
    title: str
    owner: str
    private: bool
    items: list[dict[str, str]] = field(default_factory=list)

    @property
    def answer(self) -> dict[str, Any]:
        items = [
            {"_id": hashlib.sha1(item["id"].encode()).hexdigest()[:24], "position": place, **item}
            for place, item in enumerate(self.items)
        ]
        about = {"slug": self.slug, "title": self.title, "owner": {"type": "user", "name": self.owner}, "items": items}
        about |= {"lastUpdated": as_date(datetime.now(timezone.utc)), "position": 0, "private": self.private}
        return about | {"theme": "blue", "upvotes": 0}


class Hub:
    """The server, as a context manager, and what it has seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()  # around all state; not held while an answer is sent or a fault stalls
        self.stopping = threading.Event()
        self.requests: list[Request] = []
        self.unexpected: list[str] = []
        self.lying_visibility = False  # whether repositories become public whatever the request says
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, Collected] = {}  # by slug
        self.faults: list[Fault] = []
        self.incoming: dict[str, Upload] = {}  # not verified yet, by path in the storage
        self._secret = secrets.token_bytes(16)
        self._servers = [Server(self, storage=False), Server(self, storage=True)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> Hub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def user(self, name: str, token: str, write: bool = True, organizations: Sequence[str] = ()) -> None:
        with self.lock:
            self.users[token] = User(name, write, tuple(organizations))

    def fault(self, fault: Fault) -> None:
        with self.lock:
            self.faults.append(fault)

    def clear(self) -> None:
        """No faults any more, and no requests so far."""
        with self.lock:
            self.faults.clear()
            self.requests.clear()

    def repo(self, repo_id: str) -> Repo:
        with self.lock:
            return self.repos[repo_id]

    def create(self, repo_id: str, private: bool = False) -> Repo:
        with self.lock:
            self.repos[repo_id] = Repo(self, repo_id, private)
            return self.repos[repo_id]

    def store(self, content: bytes, lfs: bool = False) -> Blob:
        path = self.folder / hashlib.sha256(content).hexdigest()
        if not path.exists():
            path.write_bytes(content)
        return Blob(path, len(content), git_oid(content), lfs)

    def signed(self, method: str, path: str, name: str = "") -> str:
        """An address in the storage that works without a token."""
        return f"{self.storage_url}{path}?name={quote(name, safe='')}&signature={self.signature(method, path, name)}"

    def signature(self, method: str, path: str, name: str) -> str:
        return hmac.new(self._secret, f"{method} {path} {name}".encode(), "sha256").hexdigest()

    def take(self, method: str, path: str, body: bool) -> Fault | None:
        """The next fault for a request; those that spoil a body wait for an answer that has one."""
        with self.lock:
            for fault in self.faults:
                fits = fault.times and fault.method in ("*", method) and re.search(fault.path, path)
                if fits and (fault.kind in ("cut", "flip")) is body:
                    fault.times -= 1
                    return fault
        return None

    def perform(self, call: Call) -> Answer:
        """Does what a request asks for."""
        try:
            with self.lock:
                for method, pattern, storage, act in ROUTES:
                    found = re.fullmatch(pattern, call.path)
                    if found and storage is call.storage and call.method in method.split():
                        call.groups = {key: unquote(value or "") for key, value in found.groupdict().items()}
                        if not storage:
                            call.log_in()
                        return act(call)
                raise Refused(501, f"{call.method} {call.path} is not part of this hub")
        except Refused as refused:
            if refused.answer.status == 501:
                self.unexpected.append(f"{call.method} {call.target}: {refused}")
            return refused.answer
        except Exception:
            self.unexpected.append(f"{call.method} {call.target}: {traceback.format_exc()}")
            return as_json({"error": "Internal error"}, 500)


@dataclass
class Call:
    """A request on its way, with what the handlers below ask of it."""

    hub: Hub
    storage: bool
    method: str
    target: str
    headers: Message
    body: bytes
    upload: Upload | None  # the body of a large file
    user: User | None = None
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)

    def option(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def log_in(self) -> None:
        if "Authorization" in self.headers:
            self.user = self.hub.users.get(self.headers["Authorization"].removeprefix("Bearer "))
            if self.user is None or not self.headers["Authorization"].startswith("Bearer "):
                raise Refused(401, "Invalid username or password.")

    def json(self, **kinds: type | tuple[type, ...]) -> Any:
        if not re.match(r"application/(json|vnd\.git-lfs\+json)\b", self.headers.get("Content-Type", "")):
            raise Refused(400, "The content type must be application/json")
        try:
            return check(json.loads(self.body), **kinds)
        except ValueError as error:
            raise Refused(400, f"Not JSON: {error}") from error

    def writer(self) -> User:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self.user.write:
            raise Refused(403, "This token has no write access")
        return self.user

    def repo(self, repo_id: str = "") -> Repo:
        """The repository, which looks as if there were none to those who may not read it."""
        repo = self.hub.repos.get(repo_id or self.groups["id"])
        if repo is None or (repo.private and not (self.user and self.user.owns(repo.id))):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def repo_to_write(self, repo_id: str = "", ref: str = "", proposing: bool = False) -> Repo:
        """Anyone who may read it may propose a pull request, and add to it later."""
        repo, user = self.repo(repo_id), self.writer()
        if not (proposing or user.owns(repo.id) or repo.authors.get(ref) == user.name):
            raise Refused(403, f"You don't have the rights to write to {repo.id}")
        return repo

    def commit(self, repo: Repo, revision: str = "") -> Commit:
        commit = repo.head(revision or self.groups.get("rev") or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision or self.groups['rev']}", "RevisionNotFound")
        return commit


Act = Callable[[Call], Answer]
ROUTES: list[tuple[str, str, bool, Act]] = []
MODEL = r"/api/models/(?P<id>[\w.-]+/[\w.-]+)"


def route(methods: str, pattern: str, storage: bool = False) -> Callable[[Act], Act]:
    """The pattern is for the raw path, so that a quoted slash in a revision is none."""

    def remember(act: Act) -> Act:
        ROUTES.append((methods, pattern, storage, act))
        return act

    return remember


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    user = call.user
    orgs = [{"type": "org", "name": name, "fullname": name} for name in user.organizations]
    token = {"displayName": "test", "role": "write" if user.write else "read"}
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Answer:
    """The client asks once for each HF_HOME; without an answer it goes on all the same."""
    return as_json({"standardEnvVars": [], "harnesses": {}})


def visibility(data: dict[str, Any]) -> bool | None:
    """Whether the request makes the repository private, if it says so at all."""
    check(data, visibility=(str, NoneType), private=(bool, NoneType))
    if data.get("visibility") not in (None, "public", "private"):
        raise Refused(400, f"`visibility` must be public or private, not {data['visibility']}")
    return data["visibility"] == "private" if data.get("visibility") else data.get("private")


def named_repo(call: Call) -> tuple[str, dict[str, Any]]:
    data = call.json(name=str, organization=(str, NoneType), type=(str, NoneType))
    if data.get("type") not in (None, "model"):
        raise Refused(501, "This hub has models only")
    if not re.fullmatch(r"\w[\w.-]{0,95}", data["name"]):
        raise Refused(400, f"Invalid name {data['name']}")
    return f"{data.get('organization') or call.writer().name}/{data['name']}", data


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    repo_id, data = named_repo(call)
    private = visibility(data) or False
    if not call.writer().owns(repo_id):
        raise Refused(403, f"You don't have the rights to create a model under the namespace {repo_id.split('/')[0]}")
    url = f"{call.hub.url}/{repo_id}"
    if repo_id in call.hub.repos:
        raise Refused(409, "You already created this model repo", url=url)
    call.hub.create(repo_id, private and not call.hub.lying_visibility)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    repo = call.repo_to_write(named_repo(call)[0])
    del call.hub.repos[repo.id]
    return Answer(200, b"OK")


@route("PUT", MODEL + "/settings")
def settings(call: Call) -> Answer:
    repo, data = call.repo_to_write(), call.json(gated=(bool, str, NoneType))
    private = visibility(data)
    if private is None and data.get("gated") is None:
        raise Refused(400, "No setting to change")
    repo.private = repo.private if private is None or call.hub.lying_visibility else private
    repo.gated = repo.gated if data.get("gated") is None else data["gated"]
    return as_json({"private": repo.private, "gated": repo.gated})


COLLECTION = r"/api/collections/(?P<slug>[\w.-]+/[\w.-]+-[0-9a-f]{24})"


def readable(call: Call) -> Collected:
    found = call.hub.collections.get(call.groups["slug"])
    if found is None or (found.private and not (call.user and call.user.owns(found.slug))):
        raise Refused(404, "Collection not found")
    return found


@route("POST", "/api/collections")
def create_collection(call: Call) -> Answer:
    data = call.json(title=str, namespace=str, private=bool, description=(str, NoneType))
    user = call.writer()
    if not user.owns(f"{data['namespace']}/"):
        raise Refused(403, f"You don't have the rights to create a collection under the namespace {data['namespace']}")
    if not 0 < len(data["title"]) <= 60:
        raise Refused(400, "The title must have 1 to 60 characters")
    for each in call.hub.collections.values():
        if (each.owner, each.title) == (data["namespace"], data["title"]):
            raise Refused(409, "This collection already exists", slug=each.slug)
    words = "-".join(re.findall(r"\w+", data["title"].lower()))
    slug = f"{data['namespace']}/{words}-{hashlib.sha1(data['title'].encode()).hexdigest()[:24]}"
    call.hub.collections[slug] = Collected(slug, data["title"], data["namespace"], data["private"])
    return as_json(call.hub.collections[slug].answer)


@route("GET", COLLECTION)
def get_collection(call: Call) -> Answer:
    return as_json(readable(call).answer)


@route("POST", COLLECTION + "/items")
def add_collection_item(call: Call) -> Answer:
    found, user = readable(call), call.writer()
    if not user.owns(found.slug):
        raise Refused(403, f"You don't have the rights to change {found.slug}")
    item = check(check(call.json(item=dict, note=(str, NoneType))["item"], id=str, type=str), id=str)
    if item["type"] != "model":
        raise Refused(501, "This hub has models only")
    call.repo(item["id"])
    if any(each["id"] == item["id"] for each in found.items):
        raise Refused(409, "This item is already in the collection")
    found.items.append({"id": item["id"], "type": "model"})
    return as_json(found.answer)


def read_card(text: str) -> tuple[dict[str, Any], list[str]]:
    """The front matter of a model card, and what is wrong with it."""
    found = CARD.match(text)
    try:
        card = (yaml.safe_load(found[1]) or {}) if found else {}
    except yaml.YAMLError as error:
        return {}, [f"Not YAML: {error}"]
    if not isinstance(card, dict):
        return {}, ["The metadata must be a mapping"]
    wrong = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag")
        if not isinstance(card.get(key, ""), str)
    ]
    licenses, bases = ([v] if isinstance(v := card.get(key, []), str) else v for key in ("license", "base_model"))
    if not isinstance(licenses, list) or not all(name in LICENSES for name in licenses):
        wrong.append(f'"license" must be one of {", ".join(LICENSES)}')
    if not isinstance(bases, list) or not all(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(base)) for base in bases):
        wrong.append('"base_model" must be the id of a model on the Hub')
    if card.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    tags = card.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        wrong.append('"tags" must be a list of strings')
    try:
        for model in check(card, **{"model-index": (list, NoneType)}).get("model-index") or []:
            for result in check(model, name=str, results=list)["results"]:
                check(check(result, task=dict, dataset=dict, metrics=list)["task"], type=str)
                check(result["dataset"], type=str, name=str, config=(str, NoneType), split=(str, NoneType))
                for metric in result["metrics"]:
                    check(metric, type=str, value=(int, float, str, bool, list, dict))
    except Refused as refused:
        wrong.append(f'"model-index" is malformed: {refused}')
    return ({} if wrong else card), wrong


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    text = call.json(content=str, repoType=str)["content"]
    card, wrong = read_card(text)
    warnings = [] if card or wrong else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [{"message": each} for each in wrong], "warnings": warnings}, 400 if wrong else 200)


def expanded(call: Call, info: dict[str, Any]) -> dict[str, Any]:
    """Only what `expand` asks for, where it does."""
    asked = call.query.get("expand", []) + call.query.get("expand[]", [])
    return {key: value for key, value in info.items() if key in ("_id", "id", *asked)} if asked else info


@route("GET", MODEL + "(/revision/(?P<rev>[^/]+))?")
def model_info(call: Call) -> Answer:
    repo = call.repo()
    return as_json(expanded(call, repo.info(call.commit(repo), blobs=call.option("blobs"))))


@route("GET", "/api/models")
def list_models(call: Call) -> Answer:
    if unknown := set(call.query) - LIST_OPTIONS:
        raise Refused(501, f"Listing by {unknown} is not part of this hub")
    asked = {key: values[0] for key, values in call.query.items()}
    found = []
    for repo in call.hub.repos.values():
        info = repo.info(call.commit(repo))
        may = not repo.private or (call.user and call.user.owns(repo.id))
        fits = (
            asked.get("author", info["author"]) == info["author"] and asked.get("search", "").lower() in repo.id.lower()
        )
        wanted = call.query.get("filter", []) + call.query.get("pipeline_tag", [])
        if may and fits and set(wanted) <= set(info["tags"]):
            extra = () if "expand" in asked or call.option("full") else ("siblings", "author", "sha", "lastModified")
            dropped = (*extra, *(() if "expand" in asked or call.option("cardData") else ("cardData", "model-index")))
            found.append({key: value for key, value in expanded(call, info).items() if key not in dropped})
    return as_json(found[: int(asked.get("limit", 1000))])


def folders(files: Mapping[str, Blob]) -> list[dict[str, Any]]:
    names = {path[: cut.start()] for path in files for cut in re.finditer("/", path)} - {""}
    return [{"type": "directory", "path": name, "size": 0, "oid": git_oid(name.encode())} for name in sorted(names)]


@route("GET", MODEL + "/tree/(?P<rev>[^/]+)(/(?P<path>.*))?")
def tree(call: Call) -> Answer:
    files = call.commit(call.repo()).files
    items = folders(files) + [files[path].as_item(path) for path in sorted(files)]
    start = call.groups["path"].rstrip("/") + "/" if call.groups["path"] else ""
    items = [item for item in items if item["path"].startswith(start)]
    if start and not items:
        raise Refused(404, f"{start} does not exist", "EntryNotFound")
    deep = call.option("recursive")
    return as_json([item for item in items if deep or "/" not in item["path"][len(start) :]])


@route("POST", MODEL + "/paths-info/(?P<rev>[^/]+)")
def paths_info(call: Call) -> Answer:
    files, paths = call.commit(call.repo()).files, parse_qs(call.body.decode()).get("paths")
    if call.headers.get("Content-Type") != "application/x-www-form-urlencoded" or not paths:
        raise Refused(400, "`paths` must come as a form")
    items = folders(files) + [blob.as_item(path) for path, blob in files.items()]
    return as_json([item for item in items if item["path"] in paths])


@route("GET", MODEL + "/refs")
def refs(call: Call) -> Answer:
    groups: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, oid in call.repo().refs.items():
        _, kind, name = ref.split("/", 2)
        groups[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": oid})
    if not call.option("include_prs"):
        del groups["pullRequests"]
    return as_json(groups)


@route("GET", MODEL + "/commits/(?P<rev>[^/]+)")
def commits(call: Call) -> Answer:
    repo = call.repo()
    return as_json(
        [
            {
                "id": c.oid,
                "title": c.title,
                "message": c.message,
                "authors": [{"user": c.author}],
                "date": as_date(c.date),
            }
            for c in repo.commits(call.commit(repo).oid)
        ]
    )


@route("POST DELETE", MODEL + "/branch/(?P<name>[^/]+)")
@route("DELETE", MODEL + "/tag/(?P<name>[^/]+)")
@route("POST", MODEL + "/tag/(?P<rev>[^/]+)")
def name_revision(call: Call) -> Answer:
    """Makes or deletes a branch or a tag."""
    repo, kind = call.repo_to_write(), "tags" if "/tag/" in call.path else "heads"
    if call.method == "DELETE":
        ref = f"refs/{kind}/{call.groups['name']}"
        if ref not in repo.refs:
            raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        if ref == MAIN:
            raise Refused(403, "The main branch cannot be deleted")
        del repo.refs[ref]
        return Answer()
    if kind == "tags":
        name, start = call.json(tag=str, message=(str, NoneType))["tag"], call.groups["rev"]
    else:
        name, start = call.groups["name"], call.json(startingPoint=(str, NoneType)).get("startingPoint") or "main"
    ref, commit = f"refs/{kind}/{name}", call.commit(repo, start)
    if ref in repo.refs or not name:
        raise Refused(409 if name else 400, f"Reference {ref} already exists" if name else "No name")
    repo.refs[ref] = commit.oid
    return as_json({}, 201)


@route("POST", MODEL + "/preupload/(?P<rev>[^/]+)")
def preupload(call: Call) -> Answer:
    repo = call.repo_to_write(ref=call.groups["rev"], proposing=call.option("create_pr"))
    found, old = [], call.commit(repo).files
    for file in call.json(files=list)["files"]:
        check(file, path=str, sample=str, size=int)
        mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
        item = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        if blob := old.get(file["path"]):
            item["oid"] = blob.sha256 if blob.lfs else blob.oid
        found.append(item)
    return as_json({"files": found})


LFS = r"/(?P<id>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/"


def lfs_path(repo: Repo, oid: str) -> str:
    return f"/lfs/{hashlib.sha1(repo.id.encode()).hexdigest()}/{oid}"


@route("POST", LFS + "batch")
def lfs_batch(call: Call) -> Answer:
    data = call.json(operation=str, transfers=list, objects=list, hash_algo=str, ref=(dict, NoneType))
    if data["operation"] != "upload" or data["hash_algo"] != "sha256" or "basic" not in data["transfers"]:
        raise Refused(400, "This hub takes uploads with sha256 in basic transfers")
    ref = check(data["ref"], name=str)["name"] if data.get("ref") else ""
    repo = call.repo_to_write(ref=ref, proposing=not ref)  # a pull request to be comes without one
    objects = []
    for each in data["objects"]:
        oid, size = check(each, oid=str, size=int)["oid"], each["size"]
        if not re.fullmatch("[0-9a-f]{64}", oid):
            raise Refused(400, f"{oid} is no sha256")
        objects.append({"oid": oid, "size": size})
        if oid not in repo.objects:
            verify = {"href": f"{call.hub.url}/{repo.id}.git/info/lfs/objects/verify"}
            upload = {"href": call.hub.signed("PUT", lfs_path(repo, oid))}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return as_json({"transfer": "basic", "objects": objects})


def check_signature(call: Call, method: str) -> None:
    if "Authorization" in call.headers:
        raise Refused(400, "Only one auth mechanism allowed: a token has no place in the storage")
    query = {key: values[0] for key, values in call.query.items()}
    if query.get("signature") != call.hub.signature(method, call.path, query.get("name", "")):
        raise Refused(403, "The signature does not match")


@route("PUT", "/lfs/[0-9a-f]{40}/[0-9a-f]{64}", storage=True)
def lfs_put(call: Call) -> Answer:
    check_signature(call, "PUT")
    assert call.upload is not None
    call.hub.incoming[call.path] = call.upload
    return Answer(200, headers={"ETag": f'"{secrets.token_hex(16)}"'})


@route("POST", LFS + "verify")
def lfs_verify(call: Call) -> Answer:
    """What came under a wrong name is forgotten."""
    data, repo = call.json(oid=str, size=int), call.repo_to_write(proposing=True)
    upload = call.hub.incoming.pop(lfs_path(repo, data["oid"]), None)
    if upload is None:
        raise Refused(404, f"{data['oid']} was never uploaded")
    if (upload.size, upload.sha256) != (data["size"], data["oid"]):
        upload.path.unlink()
        raise Refused(422, f"The upload of {data['oid']} has another size or sha256")
    path = upload.path.replace(call.hub.folder / upload.sha256)
    repo.objects[data["oid"]] = Blob(path, upload.size, "", lfs=True)
    return as_json({"success": True})


def commit_lines(call: Call) -> list[tuple[str, dict[str, Any]]]:
    if call.headers.get("Content-Type") != "application/x-ndjson":
        raise Refused(400, "The content type must be application/x-ndjson")
    try:
        items = [check(json.loads(line), key=str, value=dict) for line in call.body.splitlines()]
    except ValueError as error:
        raise Refused(400, f"Not JSON: {error}") from error
    if len(items) < 2 or [item["key"] for item in items].index("header"):
        raise Refused(400, "A commit has a header first and then operations")
    return [(item["key"], item["value"]) for item in items]


def checked_path(value: dict[str, Any]) -> str:
    path: str = check(value, path=str)["path"]
    if {"", ".", "..", ".git"} & set(path.removesuffix("/").split("/")):
        raise Refused(400, f"Invalid path {path!r}")
    return path


def apply_operation(call: Call, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = checked_path(value)
    if key == "file":
        check(value, content=str, encoding=str)
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise Refused(400, f"The content of {path} is not in base64") from error
        if value["encoding"] != "base64" or (content and is_lfs(path, len(content))):
            raise Refused(400, f"{path} must come in base64, and through LFS if it is large")
        if path == "README.md" and (wrong := read_card(content.decode("utf-8", "replace"))[1]):
            raise Refused(400, "Invalid metadata in README.md: " + "; ".join(wrong))
        files[path] = call.hub.store(content)
    elif key == "lfsFile":
        check(value, algo=str, oid=str, size=(int, NoneType))
        blob = repo.objects.get(value["oid"])
        if blob is None or value["algo"] != "sha256" or value.get("size", blob.size) != blob.size:
            raise Refused(400, f"{path} points to an LFS object that was not uploaded: {value['oid']}")
        files[path] = blob
    elif key in ("deletedFile", "deletedFolder"):
        gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(path.rstrip("/") + "/")]
        if not gone or gone[0] not in files:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refused(501, f"{key} is not part of this hub")


@route("POST", MODEL + "/commit/(?P<rev>[^/]+)")
def commit(call: Call) -> Answer:
    propose = call.option("create_pr")
    repo = call.repo_to_write(ref=call.groups["rev"], proposing=propose)
    ref, parent = repo.ref(call.groups["rev"]), call.commit(repo)
    if ref is None or ref.startswith("refs/tags/"):
        raise Refused(404, f"Invalid rev id: {call.groups['rev']} is no branch", "RevisionNotFound")
    (_, header), *operations = commit_lines(call)
    check(header, summary=str, description=(str, NoneType), parentCommit=(str, NoneType))
    if not header["summary"]:
        raise Refused(400, "A commit needs a summary")
    if header.get("parentCommit", parent.oid) != parent.oid:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for key, value in operations:
        apply_operation(call, repo, files, key, value)
    user = call.writer()
    if propose:
        ref = f"refs/pr/{len(repo.authors) + 1}"
        repo.authors[ref] = user.name
    done = repo.add(ref, parent, files, header["summary"], header.get("description") or "", user.name)
    answer = {"success": True, "commitOid": done.oid, "commitUrl": f"{call.hub.url}/{repo.id}/commit/{done.oid}"}
    if propose:
        answer["pullRequestUrl"] = f"{call.hub.url}/{repo.id}/discussions/{ref.rpartition('/')[2]}"
    return as_json(answer)


def send_file(call: Call, blob: Path, name: str, headers: dict[str, str]) -> Answer:
    """All of a file, or what the Range header asks for."""
    size = blob.stat().st_size
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    headers |= {"Content-Disposition": f"inline; filename*=UTF-8''{quote(name, safe='')}"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if asked is None or asked[0] == "bytes=-":
        return Answer(200, headers=headers, file=blob, length=size)
    start = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
    end = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
    if start >= end:
        raise Refused(416, "The range is beyond the file", headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Answer(206, headers=headers, file=blob, start=start, length=end - start)


@route("GET HEAD", r"/(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    repo, path = call.repo(), call.groups["path"]
    found = call.commit(repo)
    headers, blob = {"X-Repo-Commit": found.oid}, found.files.get(path)
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound", headers=headers)
    headers["ETag"] = f'"{blob.oid}"'
    if not blob.lfs:
        return send_file(call, blob.path, path, headers)
    address = call.hub.signed("GET", lfs_path(repo, blob.sha256), path)
    linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    return Answer(302, headers=headers | linked | {"Location": address})


@route("GET HEAD", "/lfs/[0-9a-f]{40}/(?P<sha256>[0-9a-f]{64})", storage=True)
def lfs_get(call: Call) -> Answer:
    check_signature(call, "GET")
    sha256 = call.groups["sha256"]
    return send_file(call, call.hub.folder / sha256, call.query["name"][0], {"ETag": f'"{sha256}"'})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: Hub, storage: bool) -> None:
        self.hub, self.storage = hub, storage
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.hub.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.hub.lock:
            self.connections.discard(request)
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            self.close_request(request)  # at once, for the reset: a shutdown would say goodbye first
        else:
            super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self.hub.lock:
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is none of the server's errors."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def read_body(self) -> tuple[bytes, Upload | None]:
        """All of it, always; a large file goes to a file."""
        size = left = int(self.headers.get("Content-Length") or 0)
        if not self.server.storage or self.command != "PUT":
            return self.rfile.read(size), None
        path, sha256 = self.server.hub.folder / f"upload-{secrets.token_hex(8)}", hashlib.sha256()
        with open(path, "wb") as file:
            while left and (chunk := self.rfile.read(min(left, 1 << 20))):
                sha256.update(chunk)
                left -= file.write(chunk)
        if left:
            raise ConnectionError("the upload broke off")
        return b"", Upload(path, size, sha256.hexdigest())

    def answer(self) -> None:
        hub, target = self.server.hub, self.requestline.split(" ")[1]  # self.path is not raw: it loses leading slashes
        body, upload = self.read_body()
        call = Call(hub, self.server.storage, self.command, target, self.headers, body, upload)
        fault = hub.take(self.command, target, body=False)
        kind = fault.kind if fault else ""
        if fault and kind == "slow":
            hub.stopping.wait(fault.seconds)
            fault, kind = None, ""
        answer = Answer(fault.status if fault else 0)
        if kind == "status":
            answer = Refused(answer.status, "The server is not well").answer
        elif "Transfer-Encoding" in self.headers:
            answer, self.close_connection = Refused(411, "A body needs a Content-Length").answer, True
        elif kind not in ("reset", "stall"):
            answer = hub.perform(call)
        if not kind and answer.length and answer.status < 300 and self.command != "HEAD":
            fault = hub.take(self.command, target, body=True)
            kind = fault.kind if fault else ""
        status = 0 if kind in SILENT else answer.status
        size = int(self.headers.get("Content-Length") or 0)
        name = call.user.name if call.user else None
        with hub.lock:
            seen = Request(self.command, target, status, name, size, "Authorization" in self.headers)
            hub.requests.append(seen)
        if fault and kind.endswith("stall"):
            hub.stopping.wait(fault.seconds)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if kind in SILENT:
            self.close_connection = True
        else:
            self.send(answer, spoilt=kind if kind in ("cut", "flip") else "")

    def send(self, answer: Answer, spoilt: str) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        middle, sent = answer.length // 2, 0
        for chunk in answer.chunks() if self.command != "HEAD" else ():
            if spoilt and sent <= middle < sent + len(chunk):
                at = middle - sent
                if spoilt == "cut":
                    self.wfile.write(chunk[:at])
                    self.close_connection = True
                    return
                chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
            self.wfile.write(chunk)
            sent += len(chunk)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer
