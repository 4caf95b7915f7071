import copy

import pytest
import timm
import torch
import torch.nn as nn

from timm_nrpm import NRPMConfig, calibrate_, lambdas, plain_copy, reprogram_, restore_, save_pretrained
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.reprogramming import is_as_reprogrammed, reprogrammed_layers
from timm_nrpm.nn.layers import Reprogrammed

pytestmark = pytest.mark.filterwarnings("ignore::timm_nrpm.errors.ReprogrammingWarning")

MODELS = [
    "resnet18",
    "resnet50",
    "mixer_s32_224",
    "resmlp_12_224",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "nf_resnet26",
    "coat_tiny",
]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_lambda_one_is_the_plain_timm_model_bit_for_bit(name):
    model = timm.create_model(name).eval()
    for module in model.modules():  # statistics as after training, not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 224, 224)
    want, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    reprogram_(model, NRPMConfig(lam=1.0))
    assert len(lambdas(model)) > 10
    assert torch.equal(model(x), want)
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    assert [k for k in model.state_dict() if not k.endswith(".lam") and ".plain_" not in k] == list(state)
    restore_(model)
    assert torch.equal(model(x), want)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_model_changes_when_reprogrammed_and_trains(net, images):
    want = net(images)
    reprogram_(net, NRPMConfig(lam=0.5, learnable=True))
    out = net(images)
    assert not torch.allclose(out, want)
    out.square().sum().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if "unused" not in n)


def test_restore_is_exact(net, images):
    types = {n: type(m) for n, m in net.named_modules()}
    state = copy.deepcopy(net.state_dict())
    net.stem.register_forward_hook(lambda *_: None)
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    calibrate_(net, [images])
    assert not torch.equal(net.norm.running_mean, state["norm.running_mean"])
    restore_(net)
    assert {n: type(m) for n, m in net.named_modules()} == types
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert len(net.stem._forward_hooks) == 1
    assert set(vars(net.stem)) == set(vars(nn.Conv2d(3, 8, 3)))
    assert "nrpm" not in vars(net)
    restore_(net)  # again: nothing to do


def test_shared_modules_stay_shared(net, images):
    reprogram_(net, NRPMConfig(lam=0.5), example=images)
    assert net.alias is net.twice
    assert list(lambdas(net)) == ["stem", "twice", "head"]
    assert sum(n.endswith("lam") for n, _ in net.named_parameters()) == 3


def test_uncalled_layers_are_reported(net, images):
    with pytest.warns(ReprogrammingWarning, match="unused: the model never calls it"):
        reprogram_(net, NRPMConfig(lam=0.5), example=images)
    assert "unused" not in lambdas(net)
    assert type(net.unused) is nn.Linear
    assert list(net.nrpm.skipped) == ["unused"]
    with pytest.raises(ValueError, match="cannot be reprogrammed: unused: the model never calls it"):
        reprogram_(net, NRPMConfig(lam=0.5, layers="unused"), example=images)


def test_unknown_subclasses_are_reported_and_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4), nn.LSTM(4, 4))
    model[0] = nn.utils.parametrizations.weight_norm(model[0])
    model.append(nn.Linear(4, 4))
    with pytest.warns(ReprogrammingWarning, match="Doubled is not one whose arithmetic is known"):
        reprogram_(model)
    assert list(lambdas(model)) == ["3"]
    assert type(model[1]) is Doubled
    assert set(model.nrpm.skipped) == {"0", "1", "2"}
    assert "remove_parametrizations" in model.nrpm.skipped["0"]
    assert "inside a recurrence" in model.nrpm.skipped["2"]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, ["stem", "twice", "head"]),
        ("stem", ["stem"]),
        ("*e*", ["stem", "twice", "head"]),
        (["head", "t*"], ["twice", "head"]),
        ("first:1", ["stem"]),
        ("first:2", ["stem", "twice"]),
        ("first:99", ["stem", "twice", "head"]),
        (lambda name, module: isinstance(module, nn.Linear), ["head"]),
    ],
)
def test_selection(net, images, layers, chosen):
    reprogram_(net, NRPMConfig(lam=0.5, layers=layers), example=images)
    assert list(lambdas(net)) == chosen


def test_first_follows_the_order_of_the_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.last(self.first(x))

    model = reprogram_(Backwards(), NRPMConfig(layers="first:1"), example=torch.randn(1, 3))
    assert list(lambdas(model)) == ["first"]
    model = reprogram_(Backwards(), NRPMConfig(lam=[0.1, 0.9]), example=torch.randn(1, 3))
    assert lambdas(model) == {"last": 0.9, "first": 0.1}


@pytest.mark.parametrize(
    ("lam", "want"),
    [
        (0.25, [0.25, 0.25, 0.25]),
        ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        ({"*": 0.1, "head": 0.9}, [0.1, 0.1, 0.9]),
        ({"head": 0.9, "*": 0.1, "s*": 0.2}, [0.2, 0.1, 0.9]),
    ],
)
def test_lambdas(net, images, lam, want):
    reprogram_(net, NRPMConfig(lam=lam), example=images)
    assert list(lambdas(net).values()) == want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "stm"}, r"layers='stm' matches none of the 3 layers .* Near names: stem"),
        ({"layers": ["stem", "nope*"]}, "matches none"),
        ({"layers": "first:0"}, 'write "first:4"'),
        ({"layers": "first:x"}, 'write "first:4"'),
        ({"layers": lambda *_: False}, "selects none of the 3 layers"),
        ({"lam": [0.5, 0.5]}, "lam has 2 numbers and 3 layers are chosen: stem, twice, head"),
        ({"lam": {"stem": 0.5}}, "names no value for 2 of the chosen layers: twice, head"),
        ({"lam": {"*": 0.5, "stm": 0.5}}, r"lam\['stm'\] matches none"),
    ],
)
def test_bad_requests_leave_the_model_untouched(net, images, settings, message):
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        reprogram_(net, NRPMConfig(**settings), example=images)
    assert not reprogrammed_layers(net)
    assert list(net.state_dict()) == list(state)


def test_a_failed_change_keeps_the_old_reprogramming(net, images):
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    calibrate_(net, [images])
    want = net(images)
    with pytest.raises(ValueError, match="matches none"):
        reprogram_(net, NRPMConfig(lam=0.5, layers="nope"), example=images)
    assert torch.equal(net(images), want)
    assert set(lambdas(net).values()) == {0.3}


def test_a_prefix_gets_the_right_hint():
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match=r"write 'layer1\.\*' for the layers inside"):
        reprogram_(model, NRPMConfig(layers="layer1"))
    with pytest.raises(ValueError, match="is no NRPMConfig"):
        reprogram_(model, {"lam": 0.5})


def test_an_example_that_does_not_fit(net):
    with pytest.raises(ValueError, match=r"does not run on the example given, \[1, 4, 8, 8\]"):
        reprogram_(net, example=torch.randn(1, 4, 8, 8))
    assert not reprogrammed_layers(net)


def test_looking_leaves_no_trace(net, images):
    net.train()
    net.norm.eval()
    state = copy.deepcopy(net.state_dict())
    reprogram_(net, NRPMConfig(lam=0.5), example=images)
    assert net.training
    assert not net.norm.training
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_reprogramming_again_starts_over(net, images):
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    calibrate_(net, [images])
    reprogram_(net, NRPMConfig(lam=1.0, layers="head"), example=images)
    assert lambdas(net) == {"head": 1.0}
    fresh = copy.deepcopy(net)
    assert torch.equal(restore_(fresh)(images), net(images))


def test_plain_copy_shares_weights_and_nothing_else(net, images):
    want = net(images)
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    calibrate_(net, [images])
    ours, plain = net(images), plain_copy(net)
    assert torch.equal(plain(images), want)
    assert torch.equal(net(images), ours)
    assert plain.stem.weight is net.stem.weight
    assert plain.norm.running_mean is not net.norm.running_mean


def test_a_part_of_a_model_and_a_single_layer(net, images):
    reprogram_(net.stem, NRPMConfig(lam=0.5))
    assert lambdas(net) == {"stem": 0.5}
    assert lambdas(reprogram_(nn.Linear(3, 3))) == {"": 0.8}
    reprogram_(net, NRPMConfig(lam=0.7, layers="head"), example=images)  # one config a model
    assert lambdas(net) == {"head": 0.7}


def test_a_part_of_a_reprogrammed_model_is_refused(net, images):
    reprogram_(net, NRPMConfig(lam=0.5), example=images)
    for call in (reprogram_, restore_):
        with pytest.raises(ValueError, match="part of a reprogrammed model"):
            call(net.stem)
    assert set(lambdas(net).values()) == {0.5}


def test_parts_with_their_own_settings_are_not_taken_for_a_whole(net, images, tmp_path):
    reprogram_(net, NRPMConfig(lam=0.5, layers="head"), example=images)
    reprogram_(net.stem, NRPMConfig(lam=0.1, iterations=1))
    for call in (lambda: calibrate_(net, [images]), lambda: save_pretrained(net, tmp_path / "v")):
        with pytest.raises(ValueError, match="reprogrammed on their own"):
            call()
    assert not any(isinstance(m, Reprogrammed) for m in restore_(net).modules())


def test_the_plain_model_is_the_one_that_was_reprogrammed_whatever_moves_statistics(net, images):
    want, state = net(images), copy.deepcopy(net.state_dict())
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    moves = {
        "calibrate_": lambda m: calibrate_(m, [images]),
        "a forward in training mode": lambda m: m.train()(images),
        "update_bn": lambda m: torch.optim.swa_utils.update_bn([images], m),
        "a calibrated state": lambda m: m.load_state_dict(calibrate_(copy.deepcopy(m), [images]).state_dict()),
        "a plain state": lambda m: calibrate_(m, [images]).load_state_dict(state),
        "an average": lambda m: torch.optim.swa_utils.AveragedModel(m, use_buffers=True).update_parameters(m.train()),
        "a cast and back": lambda m: calibrate_(m, [images]).double().float(),
    }
    for name, move in moves.items():
        model = copy.deepcopy(net)
        move(model)
        model.eval()
        for plain in (plain_copy(model), restore_(model)):
            assert torch.equal(plain(images), want), name
            assert list(plain.state_dict()) == list(state), name


def test_a_calibrated_state_carries_what_is_needed(net, images):
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    fresh = copy.deepcopy(net)
    calibrate_(net, [images])
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(images), net(images))
    mixed = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    reprogram_(mixed, NRPMConfig(lam=0.3))
    fresh = copy.deepcopy(mixed)
    bare = copy.deepcopy(fresh.state_dict())
    calibrate_(mixed, [images])
    fresh.load_state_dict(mixed.state_dict())
    assert torch.equal(fresh(images), mixed(images))
    fresh.load_state_dict(bare)
    assert fresh[1].correction is None


def test_trained_weights_and_statistics_of_other_weights_are_told(net, images):
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    assert is_as_reprogrammed(net)
    assert is_as_reprogrammed(copy.deepcopy(net).half())
    with torch.no_grad():
        net.stem.weight.add_(0.1)
    assert not is_as_reprogrammed(net)
    net.train()(images)
    mean = net.norm.running_mean.clone()
    with pytest.warns(ReprogrammingWarning, match="weights changed since"):
        restore_(net)
    assert torch.equal(net.norm.running_mean, mean)


def test_what_no_switch_covers_is_named():
    with pytest.warns(ReprogrammingWarning, match="LSTM is not one whose arithmetic is known: its gates are sums"):
        reprogram_(timm.create_model("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(24, 48, 48, 48)))


def test_deepcopy_is_independent(net, images):
    reprogram_(net, NRPMConfig(lam=0.3), example=images)
    twin = copy.deepcopy(net)
    restore_(net)
    assert set(lambdas(twin).values()) == {0.3}
    assert lambdas(net) == {}


def test_fusing_is_refused():
    model = reprogram_(timm.create_model("repvit_m0_9").eval(), NRPMConfig(layers="stages.0.*"))
    with pytest.raises(RuntimeError, match=r"restore_\(model\) first"):
        timm.utils.reparameterize_model(model)
    assert lambdas(model)
    restore_(model)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(timm.utils.reparameterize_model(model)(x), model(x), atol=1e-3, rtol=1e-3)


def test_a_model_without_linear_maps():
    with pytest.raises(ValueError, match="it has no linear map"):
        reprogram_(nn.Sequential(nn.ReLU()))
    assert lambdas(nn.ReLU()) == {}
