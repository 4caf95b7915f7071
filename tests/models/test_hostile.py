"""Variants that somebody made to do harm, all their hashes fitting: refused in the project's words, and nothing else.

A process of its own loads them while an audit hook looks on: what it opens, runs and connects to.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import select
import struct
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hub_server import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import timm_nrpm
from timm_nrpm.hub.templates import evaluation_json
from timm_nrpm.models.base import checksum_of
from timm_nrpm.models.registry import DIGITS

VICTIM = """
import hashlib, json, os, sys, threading, warnings
warnings.simplefilter("ignore")
import timm, torch, timm_nrpm
timm_nrpm.models.downloads.WAITS = ()
inside, *ports = sys.argv[1:]
roots = (sys.prefix, sys.base_prefix, os.path.dirname(timm_nrpm.__file__), inside, "/proc", "/dev")
roots = tuple(os.path.realpath(root) + os.sep for root in roots)
places = {"open": 0, "os.listdir": 0, "os.scandir": 0, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.symlink": 1}
runs = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "urllib.Request")
state, seen, watching = threading.local(), [], False

def harmless(path):
    if not isinstance(path, (str, bytes)):
        return True
    path = os.path.realpath(os.fsdecode(path))
    return (path + os.sep).startswith(roots) and (".no_exist" in path or not path.endswith((".bin", ".pth")))

def watch(event, args):
    if not watching or getattr(state, "busy", False):
        return
    state.busy, good = True, event not in runs
    if event in places:
        good = harmless(args[places[event]])
    elif event in ("exec", "compile"):
        name = getattr(args[0], "co_filename", "") if event == "exec" else args[1]
        good = str(name).startswith("<frozen") or harmless(name)
    elif event in ("socket.connect", "socket.getaddrinfo"):
        host, port = args[1] if event == "socket.connect" else args[:2]
        good = host == "127.0.0.1" and str(port) in ports
    if not good:
        seen.append(f"{event} {args[:3]!r}"[:300])
    state.busy = False

calls = {
    "load": lambda source: timm_nrpm.from_pretrained(source),
    "base": lambda source: timm_nrpm.from_pretrained(source, base=plain),
    "timm": lambda source: timm.create_model(("local-dir:" if source[0] == "/" else "hf-hub:") + source, True),
    "shape": lambda source: timm.create_model(("local-dir:" if source[0] == "/" else "hf-hub:") + source),
    "inspect": lambda source: timm_nrpm.inspect(source),
    "pull": lambda source: timm_nrpm.pull(source, inside + "/pulled"),
}
image = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
digest = lambda model: hashlib.sha256(model.eval()(image).detach().numpy().tobytes()).hexdigest()
plain = timm.create_model("resnet8_digits", pretrained=True).eval()
form = lambda: (str(plain), sorted(vars(plain)), timm_nrpm.models.base.weights_sha256(plain.state_dict()))
before = form(), digest(timm_nrpm.create_model("resnet8_digits"))  # which compiles
sys.addaudithook(watch)
for line in sys.stdin:
    job, answers = json.loads(line), []
    for call in job["calls"]:
        answer, watching = {"call": call, "error": None, "own": True, "logits": None}, True
        try:
            found = calls[call](job["source"])
            answer["text"] = getattr(found, "note", "")
            answer["logits"] = digest(found) if call in ("load", "base", "timm") else None
            timm_nrpm.restore_(plain)
        except Exception as error:
            errors = timm_nrpm.errors
            own = isinstance(error, (errors.BrokenVariant, errors.WrongBase, errors.HubError))
            answer |= {"error": type(error).__name__, "text": str(error), "own": own}
        watching = False
        answers.append({**answer, "seen": [*seen], "plain": form() == before[0]})
        seen.clear()
    print(json.dumps(answers), flush=True)
"""
CONFIG, TENSORS, TIMM, WEIGHTS = "nrpm_config.json", "nrpm.safetensors", "config.json", "model.safetensors"
LFS = (TENSORS, WEIGHTS)
EVERY = ("load", "base", "timm", "shape", "inspect")


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Scene:
    """Two good variants, a Hub, and the victim."""

    def __init__(self, folder, hub):
        self.folder, self.hub, self.inside = folder, hub, folder / "inside"
        self.marker, self.count = folder / "executed", 0
        for each in ("inside/variants", "inside/tmp", "outside"):
            (folder / each).mkdir(parents=True)
        (folder / "outside" / "secret").write_text("{}")
        self.exploit = pickle.dumps({"conv1.weight": Exploit(self.marker)})
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.inside / "cache"), "no_proxy": "*"}
        env |= {"TMPDIR": str(self.inside / "tmp"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TIMM_NRPM_TIMEOUT": "10"}
        env |= {"PYTHONPATH": os.path.dirname(os.path.dirname(timm_nrpm.__file__))}
        command = [sys.executable, "-c", VICTIM, str(self.inside)]
        command += [url.rpartition(":")[2] for url in (hub.url, hub.storage_url)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.victim = subprocess.Popen(command, env={**os.environ, **env}, cwd=self.inside, **pipes)
        torch.manual_seed(0)
        model = timm_nrpm.create_model(DIGITS, pretrained=True, lam=0.7, layers="layer*").eval()
        timm_nrpm.calibrate_(model, [torch.rand(32, 1, 8, 8)])
        saved = [timm_nrpm.save_pretrained(model, folder / str(full), full=full) for full in (False, True)]
        self.light, self.full = ({f.name: f.read_bytes() for f in each.iterdir()} for each in saved)
        for name, files, calls in (("light", self.light, EVERY), ("full", self.full, ("load", "inspect"))):
            hub.create(f"me/{name}").commit(files, lfs=LFS)
            for source in (self.put(files), f"me/{name}"):
                good = self.ask(source, *calls)
                assert not any(answer.error for answer in good), good
                self.logits = good[0].logits
                assert {answer.logits for answer in good} <= {self.logits, None}

    def put(self, files):
        self.count += 1
        folder = self.inside / "variants" / str(self.count)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    def ask(self, source, *calls):
        """What the victim makes of files, a folder or a repository: never harm, never silence."""
        source = self.put(source) if isinstance(source, dict) else source
        self.victim.stdin.write(json.dumps({"source": str(source), "calls": calls}).encode() + b"\n")
        self.victim.stdin.flush()
        if not select.select([self.victim.stdout], [], [], 60)[0]:
            self.victim.kill()
        answers = [SimpleNamespace(**answer) for answer in json.loads(self.victim.stdout.readline() or "[]")]
        assert len(answers) == len(calls), "the victim hung or died"
        for answer in answers:
            assert not answer.seen, answer
            assert answer.plain, answer
            assert answer.own, answer
            assert not answer.error or (len(answer.text) < 1500 and answer.text.isprintable()), answer
        assert not self.marker.exists(), answers
        return answers

    def refuse(self, source, *calls):
        answers = self.ask(source, *calls)
        assert all(answer.error for answer in answers), answers
        return answers

    def tolerate(self, source, *calls):
        """Refused, or the same model."""
        for answer in self.ask(source, *calls):
            assert answer.error or answer.logits in (None, self.logits), answer


def forged(files, change=lambda content: None, **changed):
    """Files with fitting hashes, after those named by their constants were changed, and then what the config says."""
    files = {**files, **{globals()[name.upper()]: content for name, content in changed.items()}}
    content = json.loads(files[CONFIG])
    del content["sha256"]
    content["files"] = {name: hashlib.sha256(files[name]).hexdigest() for name in content["files"]}
    change(content)
    return {**files, CONFIG: dumped({**content, "sha256": checksum_of(content)})}


def dumped(content):
    return json.dumps(content).replace("Infinity", "1e999").encode()


def setting(path, value):
    """A change of one value in parsed JSON."""

    def change(content):
        *way, last = path.split("|")
        for key in way:
            content = content[key]
        content[last] = value

    return change


def split(content):
    """The header of safetensors, parsed, and the body."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, body, length=None):
    header = header if isinstance(header, bytes) else dumped(header)
    return struct.pack("<Q", len(header) if length is None else length) + header + body


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with Hub(folder / "hub") as hub:
        scene = Scene(folder, hub)
        yield scene
        scene.victim.kill()
        scene.victim.communicate()


HASH, LONG, DEEP, SECRET = "0" * 64, "x" * 10**6, json.loads("[" * 300 + "]" * 300), "../../../outside/secret"
OVERLAYS = [{"url": "http://127.0.0.1:9/x"}, {"file": SECRET}, {"state_dict": {"a": 1}}, {"custom_load": "hf"}]
OVERLAYS += [{"source": "hf-hub"}, {"hf_hub_filename": "pytorch_model.bin"}, {"hf_hub_id": "me/bin"}]
ARGUMENTS = [{"checkpoint_path": SECRET}, {"pretrained_cfg": {"file": SECRET}}, {"pretrained_cfg": "x"}, {"a": LONG}]
ARGUMENTS += [{key: "os.system"} for key in ("act_layer", "norm_layer", "block", "pretrained_filter_fn", "aa_layer")]
ARGUMENTS += [{"cache_dir": "/"}, {"device": "meta"}, {"dtype": "float16"}, {"pretrained": False}, {"a": DEEP}, {"": 1}]
ARGUMENTS += [{"num_classes": 10**15}, {"features_only": True}, {"model_name": "local-dir:/"}, None, [], "x"]
SIZES = [[1, 30000, 30000], [3, 8, 8], "x", [1, 8, 10**400]]
MORE = [*OVERLAYS, 5, [["file", SECRET]], {"hf_hub_id": "../.."}, *({"input_size": size} for size in SIZES)]
ARGUMENTS += [{"pretrained_cfg_overlay": overlay} for overlay in MORE]
LAYERS = [None, "layer1.0.conv1", {}, [], [1], ["layer1.0.conv1"] * 2, ["*"], ["layer?.0.conv1"], ["nowhere"], [LONG]]
LAYERS += [[f"a{i}" for i in range(10**6)]]
OTHERS = [SECRET, "/etc/passwd", "C:\\x", "pytorch_model.bin", "README.md", "\ud800", LONG]
CONFIGS = {  # by the place of the value in nrpm_config.json
    "format": [0, 2, "1", 1.0, True, None, [], 10**400],
    "extra": [1],
    "layers": LAYERS,
    "settings": [None, [], {}, {"lam": 0.1}],
    "settings|extra": [1],
    "settings|iterations": [True, -1, 1.5, "3", None, math.inf],
    "settings|eps": [0, -1, True, "x", None, math.nan, math.inf, 10**400, [], 1e-30],
    "settings|delta": [-1, "x", 10**400, math.nan, DEEP],
    "settings|penalty": ["l0", None, [], {}, LONG],
    "settings|learnable": [0, 1, "yes", None, []],
    "model": [None, 5, "", "g" * 64, HASH[1:], HASH + "\n"],
    "files": [None, [], {}, {TENSORS: None}, {WEIGHTS: HASH}, *({TENSORS: HASH, x: HASH} for x in OTHERS)],
    "base": [None, [], "x", {}],
    # From here on what may count only where the base is not given:
    "base|extra": [1],
    "base|architecture": [None, 5, "", "local-dir:/etc", "hf-hub:me/back", f"nrpm_{DIGITS}", "../x", "\ud800", LONG],
    "base|name": [None, 5, [], "", "..", "/etc/passwd", "local-dir:/etc", "local-dir:.", f"nrpm_{DIGITS}", "resnet18"],
    "base|name ": ["mlp3_mnist", f"{DIGITS}.x", "http://127.0.0.1:9/x", "hf-hub:me/gone", "hf-hub:../..", "hf-hub:me"],
    "base|name  ": [f"hf-hub:me/{name}" for name in ("light", "back", "bin", "full@../../x", "full@/x")],
    "base|sha256": [None, 5, [], "", HASH],
    "base|tag": [5, [], "../x", ""],
    "base|hub_id": [5, [], "", "x", "../..", "/etc/passwd", "me/x y", "me/gone", "me/bin", "me/light"],
    "base|revision": [5, [], "", "../../x", "/etc/passwd", "a b", "a/../b", "x\n"],
    "base|dtype": [5, None, "", "load", "int8", "float99", "\ud800", "onnx", "float64", "float8_e4m3fn", "complex64"],
    "base|tuned": [True, 1, "yes", None],
    "base|kwargs": ARGUMENTS,
}


@pytest.mark.parametrize("path", CONFIGS)
def test_config(scene, path):
    scene.hub.create("me/bin").commit({TIMM: scene.full[TIMM], "pytorch_model.bin": scene.exploit})
    scene.hub.create("me/back").commit(forged(scene.light, setting("base|name", "hf-hub:me/back")), lfs=LFS)
    for value in [*CONFIGS[path], DEEP]:
        files = forged(scene.light, setting(path.strip(), value))
        scene.refuse(files, "load", "timm")
        (scene.tolerate if path.startswith("base|") else scene.refuse)(files, "base", "shape", "inspect")
    scene.refuse("me/back", "load", "timm")


def test_config_as_text(scene):
    text = scene.light[CONFIG]
    for wrong in (b"", b"\xff\xfe", b"null", b'"x"', b"[" * 10**6, b'{"a":' * 10**5, text * 2, b" " * ((16 << 20) + 1)):
        scene.refuse({**scene.light, CONFIG: wrong}, *EVERY)
    content = json.loads(forged(scene.light, setting("base|kwargs", {"a": "@"}))[CONFIG])
    del content["sha256"]
    for depth in range(900, 1000, 3):  # about where Python's own limit is
        deep = json.dumps(content, sort_keys=True).replace('"@"', "[" * depth + "]" * depth)
        deep = f'{{"sha256": "{hashlib.sha256(deep.encode()).hexdigest()}", {deep[1:]}'
        scene.refuse({**scene.light, CONFIG: deep.encode()}, "load", "timm")


def test_many_layers_take_no_time(scene):
    for names in ([f"layer{i}.conv1" for i in range(20000)], ["*" * i for i in range(1, 2000)]):
        tensors = save({f"{name}.lam": torch.tensor(0.7) for name in names})
        scene.refuse(forged(scene.light, setting("layers", names), tensors=tensors), "load", "base")


EIGHT, FIRST, NAN = torch.ones(8), "layer1.0.conv1", math.nan
OWNERS = ("nowhere", "layer1.0.conv1", "layer1.0", "", "layer1.0.conv1.correction", "\x1b[2J")
LAMBDAS = [NAN, math.inf, -math.inf, -0.1, 1.1, [0.7], [], 1, True, 0.7j]
CONTENTS = [
    *({f"{FIRST}.lam": torch.tensor(value)} for value in LAMBDAS),
    *({f"{FIRST}.lam": torch.tensor(0.7).to(kind)} for kind in (torch.half, torch.int8, torch.float8_e4m3fn)),
    *({f"{owner}.running_{key}": EIGHT.clone() for key in ("mean", "var")} for owner in OWNERS),
    *({"bn1.running_mean": torch.full((8,), value)} for value in (NAN, math.inf, 1e6, 1, True)),
    *({"bn1.running_var": torch.full((8,), value)} for value in (-1e-9, NAN, -math.inf)),
    *({"bn1.running_var": torch.ones(shape)} for shape in (0, 1, 9, (8, 1), ())),
    *({"bn1.running_mean": EIGHT.to(kind)} for kind in (torch.half, torch.double, torch.complex64)),
    *({f"{FIRST}.correction.{key}": wrong.clone() for key in ("gain", "offset")} for wrong in (EIGHT[1:], EIGHT * NAN)),
    *({f"{FIRST}.units.{key}": wrong.clone() for key in ("centre", "distance")} for wrong in (EIGHT[1:], EIGHT * 0)),
    {f"conv1.correction.{key}": EIGHT.clone() for key in ("gain", "offset")},  # which is not reprogrammed
    {f"conv1.units.{key}": EIGHT.clone() for key in ("centre", "distance")},
    {f"{FIRST}.lam": None},
    {"bn1.running_mean": None},
    {"blocks.0.attn.relative_position_index": torch.zeros(4, dtype=torch.long)},
    {"bn1.num_batches_tracked": torch.tensor(1)},
    {f"{FIRST}.weight": torch.zeros(8, 8, 3, 3)},
    {f"{FIRST}.correction.gain": EIGHT},
]


def test_tensors(scene):
    for changed in CONTENTS:
        tensors = {key: value for key, value in {**load(scene.light[TENSORS]), **changed}.items() if value is not None}
        for files, calls in ((scene.light, EVERY), (scene.full, ("load", "inspect"))):
            answers = scene.ask(forged(files, tensors=save(tensors)), *calls)
            wrong = [a for a in answers if a.error != "BrokenVariant" and a.call not in ("shape", "inspect")]
            assert not wrong, (changed, wrong)


def headers(content):
    """Safetensors that are none."""
    header, body = split(content)
    first, second = [name for name in header if name != "__metadata__"][:2]
    huge = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    start = header[first]["data_offsets"]
    changes = [{"data_offsets": header[second]["data_offsets"]}, {"data_offsets": start[::-1]}, {"shape": [-1]}, huge]
    changes += [{"shape": [2**63, 2**63]}, {"dtype": "OBJECT"}, {"shape": DEEP}, {"shape": None}, {"data_offsets": [0]}]
    texts = [dumped(header)[:-1] + b", " + dumped({first: header[second]})[1:], b'{"a":' * 10**5, b"", b"{x", b"[]"]
    others = [{**header, first: {**header[first], **change}} for change in changes]
    others += [{**header, "x": huge}, {"__metadata__": 5}, {f"x{name}": value for name, value in header.items()}]
    whole = [b"", content[:7], content[:-4], content + b"x", joined(header, b"", 2**63), joined(b"\xff", body)]
    return whole + [joined(other, body) for other in texts + others]


def test_headers(scene):
    for name, files, calls in (("tensors", scene.light, EVERY), ("weights", scene.full, ["load"])):
        for content in [*headers(files[globals()[name.upper()]]), scene.exploit]:
            answers = scene.refuse(forged(files, **{name: content}), *calls)
            assert {answer.error for answer in answers} <= {"BrokenVariant", "WrongBase"}, content[:1000]


def test_pickles_beside_are_not_read(scene):
    strays = dict.fromkeys(("pytorch_model.bin", "model.pth", WEIGHTS), scene.exploit)
    assert {answer.error for answer in scene.ask({**scene.light, **strays}, *EVERY)} == {None}
    assert scene.ask({**strays, **scene.full}, "load")[0].logits == scene.logits


@pytest.mark.parametrize("name", [CONFIG, TENSORS, TIMM, WEIGHTS, "evaluation.json"])
def test_what_is_no_file(scene, name):
    secret = scene.folder / "outside" / "secret"
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(secret), lambda path: path.symlink_to(path)):
        folder = scene.put({file: content for file, content in scene.full.items() if file != name})
        make(folder / name)
        if name != "evaluation.json":
            scene.refuse(folder, "load")
        else:
            assert scene.ask(folder, "inspect", "load")[0].text.startswith("Its evaluation cannot be read")


PLAIN = {  # by the place of the value in timm's config
    "architecture": [None, 5, [DIGITS], "unknown", f"nrpm_{DIGITS}", "resnet18", "local-dir:/etc", "hf-hub:me/full"],
    "num_classes": [-1, 0, 11, "x", 10**15, 10**400],
    "pretrained_cfg": [None, [], 5],
    "pretrained_cfg|input_size": SIZES,
    "model_args": [5, [], *ARGUMENTS],
    "model_args|pretrained_cfg_overlay": OVERLAYS,
}


def test_config_of_timm(scene):
    for path, values in PLAIN.items():
        for value in values:
            content = json.loads(scene.full[TIMM])
            setting(path, value)(content)
            scene.tolerate(forged(scene.full, timm=dumped(content)), "load", "inspect")
    for where in (*OVERLAYS, {"file": "/etc"}, {"architecture": "hf-hub:me/bin", "tag": "../x"}):
        content = json.loads(scene.full[TIMM])
        content["pretrained_cfg"] |= {"hf_hub_id": "me/bin", **where}
        assert scene.ask(forged(scene.full, timm=dumped(content)), "load")[0].logits == scene.logits
    for text in (b"", b"{", b"[]", b"\xff", b"[" * 10**6, b'{"pretrained_cfg": ' * 10**4, b" " * ((16 << 20) + 1)):
        scene.refuse(forged(scene.full, timm=text), "load")


def test_evaluations(scene):
    report = timm_nrpm.RobustnessReport(timm_nrpm.Threat("Linf", 0.1), "quick", 1, 1, 0, (True,), (), sha256=HASH)
    hostile = [b"", b"[]", b"\xff", b"[" * 10**6, b'{"reports": 5}', b'{"reports": [' + b'{"control": ' * 10**5]
    card = b"---\nlicense: !!python/object/apply:os.system ['touch %s']\n---\n" % str(scene.marker).encode()
    for text in (*hostile, dumped({"reports": [{LONG: 1}]}), evaluation_json([report]).encode()):
        files = {**scene.light, "evaluation.json": text, "README.md": card}
        note = scene.ask(files, "inspect", "load")[0].text
        assert "cannot be read" in note or "of another model" in note, note[:200]
        assert len(note) < 1500
    above = {"../x": b"x", "a/../../x": b"x", "lambdas.png/../x": b"x"}
    scene.hub.create("me/carded").commit({**files, **above}, lfs=LFS)
    assert not any(answer.error for answer in scene.ask("me/carded", "pull", "inspect", "load"))
    assert {f.name for f in (scene.inside / "pulled").iterdir()} == set(files)
    assert not list(scene.folder.rglob("x"))
    folder = scene.put(scene.light)
    with (folder / "evaluation.json").open("wb") as huge:
        huge.truncate(1 << 33)  # a hole
    assert "bytes" in scene.ask(folder, "inspect")[0].text


def test_repositories(scene):
    """The same checks on the way from the Hub."""
    changes = {"files|../../x": HASH, "base|name": "local-dir:/etc", "base|kwargs": {"checkpoint_path": "/etc/passwd"}}
    for i, (path, value) in enumerate((changes | {"base|hub_id": "me/bin", "settings|eps": 10**400}).items()):
        scene.hub.create(f"me/h{i}").commit(forged(scene.light, setting(path, value)), lfs=LFS)
        scene.refuse(f"me/h{i}", "load", "timm")
        scene.tolerate(f"me/h{i}", "inspect")
    scene.hub.create("me/pickle").commit(forged(scene.full, weights=scene.exploit), lfs=LFS)
    scene.refuse("me/pickle", "load")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, TIMM])
def test_what_is_announced_too_large_is_not_downloaded(scene, name):
    repo = scene.hub.create(f"me/large-{name}")
    repo.commit(scene.full, lfs=[*LFS, name])
    files = repo.commits()[0].files
    files[name] = replace(files[name], size=1 << 40)
    scene.hub.clear()
    answer = scene.refuse(repo.id, "load")[0]
    assert (answer.error, "bytes" in answer.text) == ("HubError", True)
    got = [request.path for request in scene.hub.requests if request.method == "GET"]
    assert not [path for path in got if path.endswith(f"/{name}") or files[name].sha256 in path]


def test_a_strangers_proposal_to_the_bases_repository_is_not_unpickled(scene):
    repo = scene.hub.create("timm/resnet18.a1_in1k")
    repo.refs["refs/pr/1"] = repo.refs["refs/heads/main"]
    commit = repo.commit({"pytorch_model.bin": scene.exploit}, branch="refs/pr/1")
    content = json.loads(scene.light[CONFIG])["base"]
    for revision in ("refs/pr/1", commit):
        base = {"architecture": "resnet18", "name": "resnet18.a1_in1k", "hub_id": repo.id, "revision": revision}
        answer = scene.refuse(forged(scene.light, setting("base", {**content, **base})), "load")[0]
        assert answer.error == "WeightsUnavailable"


NASTY = [None, True, False, 0, 1, -1, 1.5, 2**63, 10**400, math.inf, NAN, "", "x", "\ud800", "..", "*", "os.system"]
NASTY += [
    SECRET,
    [],
    {},
    [None],
    [[0]],
    {"a": 1},
    {"file": SECRET},
    DIGITS,
    "hf-hub:me/bin",
    "me/full",
    HASH,
    LONG,
    DEEP,
]
HOW = st.sampled_from(["replace", "delete", "insert", "swap"])
MUTATIONS = st.lists(st.tuples(HOW, st.integers(0, 999), st.sampled_from(NASTY)), min_size=1, max_size=3)
FLIPS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), min_size=1, max_size=4)
quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
fuzz = settings(derandomize=True, max_examples=200, **quiet)


def places(node):
    """Every place in parsed JSON, as what holds it and its key."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def mutate(content, mutations):
    for how, number, value in mutations:
        value = json.loads(json.dumps(value))  # of its own, since it may be mutated next
        found = [(content, None), *places(content)]
        node, key = found[number % len(found)]
        other, its = found[number * 7 % len(found)]
        inner = node if key is None else node[key]
        if how == "insert" and isinstance(inner, (dict, list)):
            inner.update({str(value)[:9]: value}) if isinstance(inner, dict) else inner.append(value)
        elif how == "delete" and key is not None:
            del node[key]
        elif key is not None:
            node[key] = json.loads(json.dumps(other[its])) if how == "swap" and its is not None else value


@fuzz
@given(MUTATIONS)
def test_any_config(scene, mutations):
    scene.tolerate(forged(scene.light, lambda content: mutate(content, mutations)), "load", "base", "inspect")


@pytest.mark.slow
@fuzz
@given(MUTATIONS)
def test_any_config_of_timm(scene, mutations):
    content = json.loads(scene.full[TIMM])
    mutate(content, mutations)
    scene.tolerate(forged(scene.full, timm=dumped(content)), "load")


@fuzz
@given(FLIPS, MUTATIONS)
def test_any_tensors(scene, flips, mutations):
    header, body = split(scene.light[TENSORS])
    mutate(header, mutations)
    scene.tolerate(forged(scene.light, tensors=joined(header, body)), "base")
    for name, files, call in (("tensors", scene.light, "base"), ("weights", scene.full, "load")):
        content = bytearray(files[globals()[name.upper()]])
        for i, (where, flip) in enumerate(flips):
            end = 8 + struct.unpack("<Q", files[globals()[name.upper()]][:8])[0] if i % 2 == 0 else len(content)
            content[int(where * end) : int(where * end) + 1] = flip
        scene.tolerate(forged(files, **{name: bytes(content)}), call)
