"""docs/format.md, by a second implementation: NumPy, json, hashlib and safetensors, and nothing of this package."""

import hashlib
import json
import math

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
import torch.nn as nn

import timm_nrpm
from timm_nrpm import NRPMConfig, calibrate_, from_pretrained, reprogram_, save_pretrained
from timm_nrpm.errors import BrokenVariant, WrongBase

STEP = {"kind", "how", "images", "prior"}
HOW = {"calibration": ["relative", "scratch"], "adaptation": ["mean", "l1", "median"]}
KEYS = {"format", "base", "settings", "layers", "model", "files", "sha256"}
BASE = {"architecture", "name", "tag", "hub_id", "revision", "kwargs", "sha256", "dtype", "tuned"}
ESTIMATE = {"iterations", "eps", "penalty", "delta", "gamma"}
FILES = {"nrpm.safetensors", "config.json", "model.safetensors"}
PARTS = {"correction": ("gain", "offset"), "units": ("centre", "distance")}
PAIRS = {a: b for pair in (*PARTS.values(), ("running_mean", "running_var")) for a, b in (pair, pair[::-1])}
GROUPS = {"1": 2}  # of `network`


class Refused(Exception):
    pass


def check(fits, what):
    if not fits:
        raise Refused(what)


def hash_of_bytes(data):
    return hashlib.sha256(data).hexdigest()


def hash_of_object(content):
    return hash_of_bytes(json.dumps(content, sort_keys=True).encode())


def hash_of_state(state):
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name]
        digest.update(json.dumps([name, f"torch.{values.dtype}", list(values.shape)]).encode())
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def hash_of_model(config, state):
    estimates = {layer: {key: config["settings"][key] for key in ESTIMATE} for layer in config["layers"]}
    return hash_of_object({"estimates": estimates, "state": hash_of_state(state)})


def form_of(name, layers, base):
    """Type and shape that a tensor of nrpm.safetensors must have; `None` if there is no place for it."""
    owner, _, what = name.rpartition(".")
    layer, _, part = owner.rpartition(".")
    if what == "lam" and owner in layers:
        return np.float32, ()
    if what in PARTS.get(part, ()) and layer in layers:
        weight = base[f"{layer}.weight"]
        outputs, inputs = weight.shape[:2]
        return weight.dtype, (inputs * GROUPS.get(layer, 1) if what == "centre" else outputs,)
    if what in ("running_mean", "running_var") and name in base:
        return base[name].dtype, base[name].shape
    return None


def check_tensors(tensors, layers, base):
    check({f"{layer}.lam" for layer in layers} <= set(tensors), "lambdas")
    for name, values in tensors.items():
        owner, _, what = name.rpartition(".")
        check((values.dtype, values.shape) == form_of(name, layers, base), f"form of {name}")
        check(what == "lam" or f"{owner}.{PAIRS[what]}" in tensors, f"half of {name}")
        check(np.isfinite(values).all(), f"values of {name}")
        check(what != "lam" or 0 <= values <= 1, f"values of {name}")
        check(what != "running_var" or (values >= 0).all(), f"values of {name}")
        check(what != "distance" or (values > 0).all(), f"values of {name}")


def no_number(constant):
    raise Refused(constant)


def read(folder, base=None):
    """What "Loading" says, but that the state of the base comes from the caller. -> config, state of the model"""
    config = json.loads((folder / "nrpm_config.json").read_text("utf-8"), parse_constant=no_number)
    check(type(config["format"]) is int and config["format"] == 1, "format")
    check(hash_of_object({k: v for k, v in config.items() if k != "sha256"}) == config["sha256"], "config")
    layers, names = config["layers"], set(config["files"])
    check(set(config) - {"statistics"} == KEYS and set(config["base"]) == BASE, "keys")
    steps = config.get("statistics", [])
    check(all(set(step) == STEP and HOW[step["kind"]].count(step["how"]) == 1 for step in steps), "statistics")
    check(set(config["settings"]) - {"standardize"} == ESTIMATE | {"learnable"}, "settings")
    check(config["settings"].get("standardize", True) is True, "settings")
    standardize = "standardize" in config["settings"]
    check(
        standardize
        or not any(".units." in name for name in safetensors.numpy.load((folder / "nrpm.safetensors").read_bytes())),
        "units that were not asked for",
    )
    check({"nrpm.safetensors"} <= names <= FILES, "files")
    check(0 < len(set(layers)) == len(layers), "layers")
    files = {name: (folder / name).read_bytes() for name in names}
    for name, data in files.items():
        check(hash_of_bytes(data) == config["files"][name], name)
    tensors = safetensors.numpy.load(files["nrpm.safetensors"])
    if "model.safetensors" in files:
        base = safetensors.numpy.load(files["model.safetensors"])
    check(hash_of_state(base) == config["base"]["sha256"], "base")
    check_tensors(tensors, layers, base)
    state = {**base, **tensors}
    check(hash_of_model(config, state) == config["model"], "model")
    return config, state


def write(folder, base, settings, layers, tensors):
    """A lambda-only variant of a model that is not timm's."""
    folder.mkdir()
    data = safetensors.numpy.save(tensors)
    (folder / "nrpm.safetensors").write_bytes(data)
    origin = {**dict.fromkeys(BASE), "architecture": "Sequential", "kwargs": {}, "dtype": "float32", "tuned": False}
    config = {"format": 1, "base": {**origin, "sha256": hash_of_state(base)}, "settings": settings, "layers": layers}
    config["model"] = hash_of_model(config, {**base, **tensors})
    config["files"] = {"nrpm.safetensors": hash_of_bytes(data)}
    (folder / "nrpm_config.json").write_text(json.dumps({**config, "sha256": hash_of_object(config)}))


def omega(t, penalty, eps, delta, gamma):
    scale, shift, low, high = {
        "l1": (1, 0, 0, math.inf),
        "huber": (delta, 0, 0, 1),
        "mcp": (1, 1 / gamma, eps, math.inf),
        "huber-mcp": (gamma * delta / (gamma - delta), delta / (gamma - delta), eps, 1),
        "l2": (0, -1, 0, math.inf),
    }[penalty]
    return np.clip(scale / (np.abs(t) + eps) - shift, low, high)


def products(x, weight, stride, padding, groups):
    """The D products of each output, last. The outputs come second in a convolution, else second to last."""
    if weight.ndim == 2:
        return x[..., None, :] * weight
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    results = []
    for inputs, rows in zip(np.split(windows, groups, 1), np.split(weight, groups), strict=True):
        inputs = np.moveaxis(inputs, 1, 3).reshape(len(x), 1, *inputs.shape[2:4], -1)
        results.append(inputs * rows.reshape(1, len(rows), 1, 1, -1))
    return np.concatenate(results, 1)


def compute(x, config, state, layer, stride=1, padding=0, groups=1):
    """One layer in float64, from its input."""
    settings = {key: config["settings"][key] for key in ESTIMATE}
    iterations, lam = settings.pop("iterations"), float(state[f"{layer}.lam"])
    weight = state[f"{layer}.weight"].astype(np.float64)

    def each_output(name, default):
        values = np.asarray(state.get(f"{layer}.{name}", default), np.float64)
        return values.reshape(-1, 1, 1) if weight.ndim == 4 else values

    x = x.astype(np.float64)
    if lam == 1 or iterations == 0 or settings["penalty"] == "l2":
        return products(x, weight, stride, padding, groups).sum(-1) + each_output("bias", 0)
    centre = np.asarray(state.get(f"{layer}.units.centre", 0.0), np.float64)
    centre = np.broadcast_to(centre.reshape(-1, 1, 1) if weight.ndim == 4 else centre, x.shape)
    rest = products(centre, weight, stride, padding, groups).sum(-1)
    distance = each_output("units.distance", 1)
    p = products(x - centre, weight, stride, padding, groups) / distance[..., None]
    mean = p.mean(-1)
    for _ in range(iterations):
        w = omega(p - mean[..., None], **settings)
        mean = (w * p).sum(-1) / w.sum(-1)
    z = rest + distance * (lam * p.sum(-1) + (1 - lam) * p.shape[-1] * mean)
    return each_output("correction.gain", 1) * z + each_output("correction.offset", 0) + each_output("bias", 0)


# From here on: beside the package.
HALVES = {"stride": 2, "padding": 1}
NETWORK = {"0": HALVES, "1": {"groups": 2}, "3": {}}
SETTINGS = {"iterations": 2, "eps": 0.01, "penalty": "l1", "delta": 0.05, "gamma": 0.2, "learnable": False}
SETTINGS |= {"standardize": True}


def state_of(model):
    """What decides what a model computes, so of the plain model's statistics only how many batches were counted."""
    state = {name: values.numpy().copy() for name, values in model.state_dict().items()}
    beside = {name: state.pop(name) for name in list(state) if name.rpartition(".")[2].startswith("plain_")}
    counts = {k.replace("plain_", ""): v for k, v in beside.items() if k.endswith("num_batches_tracked")}
    return {**state, **counts}


def digits(**kwargs):
    settings = {"lam": 0.6, "iterations": 2, "eps": 0.01, "penalty": "l1", "layers": "layer*"}
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, **settings, **kwargs)
    calibrate_(model, [torch.rand(32, 1, 8, 8, **kwargs)])
    return model, timm.create_model("resnet8_digits", pretrained=True, **kwargs)


def vit():
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 3}
    model = timm_nrpm.create_model("vit_tiny_patch16_224", lam=0.7, eps=0.01, iterations=1, penalty="mcp", **kwargs)
    return calibrate_(model, [torch.rand(8, 3, 32, 32)]), timm_nrpm.plain_copy(model)


def network():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 5))


def reprogrammed_network(standardize=False):
    base = network()
    model = network()
    model.load_state_dict(base.state_dict())
    reprogram_(model, NRPMConfig(lam={"0": 0.0, "1": 0.5, "3": 1.0}, eps=0.01, standardize=standardize))
    return calibrate_(model, [torch.rand(32, 3, 8, 8)]), base


def written(folder, lam=0.3, drop=(), add=None, **settings):
    """By the second implementation, with corrections and units that no calibration would give."""
    base, tensors = network().append(nn.BatchNorm1d(5)).eval(), {}
    for name in NETWORK:
        outputs = len(base.get_submodule(name).weight)
        tensors[f"{name}.lam"] = np.array(lam, np.float32)
        tensors[f"{name}.correction.gain"] = torch.empty(outputs).uniform_(0.5, 2).numpy()
        tensors[f"{name}.correction.offset"] = torch.randn(outputs).numpy()
        if "standardize" in {**SETTINGS, **settings}:
            inputs = base.get_submodule(name).weight.shape[1] * GROUPS.get(name, 1)
            tensors[f"{name}.units.centre"] = torch.randn(inputs).numpy()
            tensors[f"{name}.units.distance"] = torch.empty(outputs).uniform_(0.5, 2).numpy()
    tensors = {name: values for name, values in {**tensors, **(add or {})}.items() if name not in drop}
    write(folder, state_of(base), {**SETTINGS, **settings}, list(NETWORK), tensors)
    return base


def tolerance(out):
    """The package computes in float32, where a product near 1 is off by 2^-24, and its weight by 2^-24 / eps = 6e-6 of
    itself. Measured over 30 seeds: 3e-7 of the largest output; with another penalty or one step less, 4e-2."""
    return 1e-5 * np.abs(out).max()


def compare(model, config, state, x, layers):
    """Each layer, from the input that it has in the package. -> input and output of each"""
    seen = {}
    for name in layers:
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0].numpy(), output.numpy())})
        )
    with torch.no_grad():
        model(x)
    for name, geometry in layers.items():
        x, out = seen[name]
        np.testing.assert_allclose(compute(x, config, state, name, **geometry), out, rtol=0, atol=tolerance(out))
    return seen


@pytest.mark.parametrize(
    ("make", "full", "what", "shape", "layers"),
    [
        (digits, False, "layer3.0.bn1.running_mean", (1, 8, 8), {"layer2.0.conv1": HALVES}),
        (digits, True, "layer3.0.bn1.running_mean", (1, 8, 8), {"layer3.0.downsample.0": {"stride": 2}}),
        (vit, False, "head.correction.gain", (3, 32, 32), {"patch_embed.proj": {"stride": 8}, "head": {}}),
        (vit, True, "head.correction.gain", (3, 32, 32), {"blocks.0.attn.qkv": {}}),
        (reprogrammed_network, False, "0.correction.gain", (3, 8, 8), NETWORK),
        (lambda: reprogrammed_network(standardize=True), False, "1.units.distance", (3, 8, 8), NETWORK),
        (lambda: digits(dtype=torch.float16), False, "layer3.0.bn1.running_mean", None, {}),
        (lambda: digits(dtype=torch.float16), True, "layer3.0.bn1.running_mean", None, {}),
    ],
)
def test_what_the_package_writes(tmp_path, make, full, what, shape, layers):
    model, base = make()
    folder = save_pretrained(model, tmp_path / "v", full=full)
    plain = state_of(base)
    config, state = read(folder, None if full else plain)
    assert not np.array_equal(state[what], plain.get(what))  # what calibration gave is there
    again = from_pretrained(folder, base=None if full else base)
    theirs = state_of(again)
    assert set(state) == set(theirs)
    assert all(np.array_equal(state[name], theirs[name]) for name in state)
    if layers:
        compare(again, config, state, torch.randn(4, *shape), layers)


@pytest.mark.parametrize("penalty", ["l1", "huber", "mcp", "huber-mcp"])
def test_the_arithmetic(tmp_path, penalty):
    base = written(tmp_path / "v", penalty=penalty)
    config, state = read(tmp_path / "v", state_of(base))
    model = from_pretrained(tmp_path / "v", base=base)
    x, out = compare(model, config, state, torch.randn(4, 3, 8, 8), NETWORK)["0"]
    for change in [{"penalty": p} for p in ("l1", "huber", "mcp", "huber-mcp") if p != penalty] + [{"iterations": 1}]:
        other = compute(x, {**config, "settings": {**config["settings"], **change}}, state, "0", **HALVES)
        assert np.abs(other - out).max() > 100 * tolerance(out)


@pytest.mark.parametrize("settings", [{"lam": 1.0}, {"iterations": 0}, {"penalty": "l2"}], ids=str)
def test_the_plain_layer(tmp_path, settings):
    base = written(tmp_path / "v", **settings)
    config, state = read(tmp_path / "v", state_of(base))
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = base(x)
        model = from_pretrained(tmp_path / "v", base=base)
        assert torch.equal(model(x), before)
    compare(model, config, state, x, NETWORK)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(folder, key, change, fits=True):
    """Of nrpm_config.json, and of its own hash if that shall fit."""
    path = folder / "nrpm_config.json"
    config = json.loads(path.read_text())
    config[key] = {**config[key], **change} if isinstance(change, dict) else change
    if fits:
        config["sha256"] = hash_of_object({k: v for k, v in config.items() if k != "sha256"})
    path.write_text(json.dumps(config))


CHANGES = {
    "tensors": (lambda f: flip(f / "nrpm.safetensors"), "^nrpm.safetensors"),
    "weights": (lambda f: flip(f / "model.safetensors"), "^model.safetensors"),
    "timm's config": (lambda f: flip(f / "config.json"), "^config.json"),
    "config": (lambda f: edit(f, "settings", {"iterations": 1}, fits=False), "^config$"),
    "format": (lambda f: edit(f, "format", 2), "^format"),
    "a setting": (lambda f: edit(f, "settings", {"iterations": 1}), "^model$"),
    "an integer for a float": (lambda f: edit(f, "settings", {"delta": 3}), "^model$"),
    "no number": (lambda f: edit(f, "settings", {"delta": math.nan}), "^NaN"),
    "a layer twice": (lambda f: edit(f, "layers", ["layer1.0.conv1"] * 2), "^layers"),
    "a key too many": (lambda f: edit(f, "base", {"more": 1}), "^keys"),
    "a setting too many": (lambda f: edit(f, "settings", {"more": 1}), "^settings"),
    "a file too many": (lambda f: edit(f, "files", {"README.md": "0" * 64}), "^files"),
    "the base's hash": (lambda f: edit(f, "base", {"sha256": "0" * 64}), "^base"),
    "the model's hash": (lambda f: edit(f, "model", "0" * 64), "^model$"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_both_refuse_what_was_changed(tmp_path, change, message):
    folder = save_pretrained(digits()[0], tmp_path / "v", full=True)
    read(folder)
    change(folder)
    with pytest.raises(Refused, match=message):
        read(folder)
    with pytest.raises((BrokenVariant, WrongBase)):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("made_up", "message"),
    [
        ({"add": {"0.lam": np.array(1.5, np.float32)}}, "values of 0.lam"),
        ({"add": {"0.lam": np.array(0.5)}}, "form of 0.lam"),
        ({"drop": ["0.lam"]}, "lambdas"),
        ({"drop": ["3.correction.gain"]}, "half of 3.correction.offset"),
        ({"add": {"0.correction.gain": np.ones(7, np.float32)}}, "form of 0.correction.gain"),
        ({"drop": ["3.units.centre"]}, "half of 3.units.distance"),
        ({"add": {"3.units.centre": np.ones(5, np.float32)}}, "form of 3.units.centre"),
        ({"add": {"1.units.distance": np.zeros(8, np.float32)}}, "values of 1.units.distance"),
        ({"add": {"0.correction.gain": np.full(6, np.inf, np.float32)}}, "values of 0.correction.gain"),
        (
            {"add": {f"4.running_{what}": -np.ones(5, np.float32) for what in ("mean", "var")}},
            "values of 4.running_var",
        ),
        ({"add": {"2.lam": np.array(0.5, np.float32)}}, "form of 2.lam"),
        ({"add": {"3.bias": np.zeros(5, np.float32)}}, "form of 3.bias"),
    ],
)
def test_both_refuse_what_was_made_up(tmp_path, made_up, message):
    """All hashes fit."""
    base = written(tmp_path / "v", **made_up)
    with pytest.raises(Refused, match=message):
        read(tmp_path / "v", state_of(base))
    with pytest.raises(BrokenVariant):
        from_pretrained(tmp_path / "v", base=base)


def test_both_refuse_another_base(tmp_path):
    base = written(tmp_path / "v")
    read(tmp_path / "v", state_of(base))
    with torch.no_grad():
        base[3].bias[0] += 1e-3
    with pytest.raises(Refused, match="base"):
        read(tmp_path / "v", state_of(base))
    with pytest.raises(WrongBase):
        from_pretrained(tmp_path / "v", base=base)
