import fnmatch
import sys

import forked
import pytest
import timm
import torch
from hub_cache import hub_cache
from safetensors.torch import save_file

import timm_nrpm
from timm_nrpm.models.base import weights_sha256
from timm_nrpm.models.registry import DIGITS


def test_create_model_takes_what_timm_takes():
    model = timm_nrpm.create_model(
        "resnet18", lam=0.5, iterations=1, eps=0.01, penalty="huber", layers="layer1.*", num_classes=7, in_chans=1
    )
    assert set(timm_nrpm.lambdas(model).values()) == {0.5}
    assert all(name.startswith("layer1.") for name in timm_nrpm.lambdas(model))
    assert model.layer1[0].conv1.config.penalty == "huber"
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_pretrained_weights_come_from_the_hub_cache_and_the_variant_pins_their_commit(tmp_path):
    weights = timm.create_model("resnet18").state_dict()
    commit = hub_cache(tmp_path, "timm/resnet18.a1_in1k", {"model.safetensors": weights})
    model = timm_nrpm.create_model("resnet18", pretrained=True, lam=0.8, cache_dir=str(tmp_path))
    assert torch.equal(model.fc.weight, weights["fc.weight"])
    base = model.nrpm.base
    assert (base.name, base.tag, base.hub_id) == ("resnet18.a1_in1k", "a1_in1k", "timm/resnet18.a1_in1k")
    assert base.revision == commit
    assert base.sha256 == weights_sha256(weights)
    folder = timm_nrpm.save_pretrained(model, tmp_path / "variant")
    again = timm_nrpm.from_pretrained(folder, cache_dir=str(tmp_path))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    # The branch moves on: the variant still finds the commit it was made for.
    (tmp_path / "models--timm--resnet18.a1_in1k" / "refs" / "main").write_text("f" * 40)
    assert timm_nrpm.from_pretrained(folder, cache_dir=str(tmp_path)).nrpm.base.revision == commit


def test_a_new_classifier_has_no_public_name(tmp_path):
    hub_cache(tmp_path, "timm/resnet18.a1_in1k", {"model.safetensors": timm.create_model("resnet18").state_dict()})
    model = timm_nrpm.create_model("resnet18", pretrained=True, num_classes=3, cache_dir=str(tmp_path))
    assert model.nrpm.base.name is None
    assert model.nrpm.base.hub_id is None


def test_other_sources_of_weights(tmp_path):
    plain = timm.create_model("resnet18", num_classes=3)
    file = tmp_path / "weights.safetensors"
    save_file(plain.state_dict(), file)
    timm.models.save_for_hf(plain, str(tmp_path / "local"), safe_serialization=True)
    hub_cache(
        tmp_path / "cache",
        "somebody/model",
        {"model.safetensors": plain.state_dict(), "config.json": (tmp_path / "local" / "config.json").read_text()},
    )
    sources = [
        ("resnet18", {"checkpoint_path": str(file), "num_classes": 3}),
        (
            "resnet18",
            {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 3}, "num_classes": 3},
        ),
        (f"local-dir:{tmp_path / 'local'}", {"pretrained": True}),
        ("hf-hub:somebody/model", {"pretrained": True, "cache_dir": str(tmp_path / "cache")}),
    ]
    for name, kwargs in sources:
        model = timm_nrpm.create_model(name, lam=0.9, **kwargs)
        assert torch.equal(model.fc.weight, plain.fc.weight), name
        assert model.nrpm.base.name == (name if name.startswith("hf-hub:") else None)


def test_entrypoints_for_timms_own_tools(tmp_path):
    model = timm.create_model("nrpm_resnet18", lam=0.3, layers="layer1.*", num_classes=5)
    assert set(timm_nrpm.lambdas(model).values()) == {0.3}
    assert timm.is_model("nrpm_vit_tiny_patch16_224")
    assert "nrpm_resnet18.a1_in1k" in timm.list_models("nrpm_resnet18", pretrained=True)
    ours, theirs = (timm.models.get_pretrained_cfg(n).hf_hub_id for n in ("nrpm_resnet18", "resnet18"))
    assert ours == theirs == "timm/resnet18.a1_in1k"
    file = tmp_path / "plain.safetensors"
    plain = timm.create_model("resnet18")
    save_file(plain.state_dict(), file)  # of the plain model, loaded after the swap
    model = timm.create_model("nrpm_resnet18", checkpoint_path=str(file))
    assert torch.equal(model.fc.weight, plain.fc.weight)
    assert set(timm_nrpm.lambdas(model).values()) == {0.8}
    assert set(timm_nrpm.lambdas(timm_nrpm.create_model("nrpm_resnet18", lam=0.1)).values()) == {0.1}


def test_a_tag_through_timms_entrypoint_keeps_its_name(tmp_path):
    hub_cache(tmp_path, "timm/resnet18.a2_in1k", {"model.safetensors": timm.create_model("resnet18").state_dict()})
    model = timm.create_model("nrpm_resnet18.a2_in1k", pretrained=True, layers="layer1.*", cache_dir=str(tmp_path))
    assert model.nrpm.base.name == "resnet18.a2_in1k"
    folder = timm_nrpm.save_pretrained(model, tmp_path / "v")
    assert timm_nrpm.lambdas(timm_nrpm.from_pretrained(folder, cache_dir=str(tmp_path))) == timm_nrpm.lambdas(model)


def test_a_missing_checkpoint():
    with pytest.raises(FileNotFoundError, match=r"checkpoint_path='nope\.safetensors' is no file"):
        timm_nrpm.create_model("resnet18", checkpoint_path="nope.safetensors")


def test_every_default_is_timms_own():
    for name in ("resnet50", "vit_base_patch16_224", "convnext_base", "efficientnet_b0", "mixer_b16_224"):
        ours, theirs = timm.models.get_pretrained_cfg(f"nrpm_{name}"), timm.models.get_pretrained_cfg(name)
        assert (ours.tag, ours.hf_hub_id, ours.url) == (theirs.tag, theirs.hf_hub_id, theirs.url)


def test_list_models():
    names = timm_nrpm.list_models()
    assert len(names) > 1200
    assert {"resnet18", "mixer_s32_224", "tf_efficientnet_b0", DIGITS} <= set(names)
    assert {"beit_base_patch16_224", "coat_tiny", "tf_efficientnet_cc_b0_4e", "lowformer_b0"} <= set(names)
    assert "sequencer2d_s" not in names  # whose LSTMs stay plain
    assert timm_nrpm.list_models("resnet1?") == fnmatch.filter(timm_nrpm.list_models(), "resnet1?")
    assert not fnmatch.filter(names, "nrpm_*")
    assert f"{DIGITS}" in timm_nrpm.list_models(f"{DIGITS}*", pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "Unknown model 'resnt18'. Near names: resnet18"),
        ("resnet18.nope", "Unknown tag 'nope' for resnet18. It has: a1_in1k"),
        ("timm/resnet18", "hf-hub:timm/resnet18"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        timm_nrpm.create_model(name)


def test_bad_settings_come_before_any_download():
    with pytest.raises(ValueError, match=r"lam=1\.5"):
        timm_nrpm.create_model("resnet18", pretrained=True, lam=1.5)


OFFLINE = """
import timm_nrpm
try:
    timm_nrpm.create_model("{name}", pretrained=True)
except timm_nrpm.errors.WeightsUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("resnet18", {"HF_HUB_OFFLINE": "1"}),
        ("hf-hub:somebody/model", {"HF_HUB_OFFLINE": "1"}),
        ("hf-hub:somebody/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
    ],
)
def test_no_network_and_nothing_cached(tmp_path, name, environment):
    """Offline by choice, and a refused connection, for which the client retries before it gives up."""
    clean = {"PATH": "", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", **environment}
    done = forked.run(
        [sys.executable, "-c", OFFLINE.format(name=name)], env=clean, capture_output=True, text=True, timeout=300
    )
    assert len(done.stdout.strip().splitlines()) == 1, done.stderr
    assert f"weights of {name} can be neither downloaded nor found in the cache" in done.stdout
    assert "Connect to the network once" in done.stdout
    assert "HF_HUB_OFFLINE=1 in the environment reads the cache alone" in done.stdout
