"""How much of a model is covered, against closed forms; and what is said of timm's architectures and of one's own."""

import math

import pytest
import timm
import torch
from timm.models import register_model
from timm.models._registry import _model_entrypoints, _model_to_module, _module_to_models
from torch import nn

import timm_nrpm
from timm_nrpm import is_supported, list_models
from timm_nrpm.models.architectures import OF_NO_LAYER, READ_TOO, census, coverage_of, measured
from timm_nrpm.models.work import products

BATCH, TOKENS, WIDTH = 1, 5, 8
INPUT = torch.zeros(BATCH, TOKENS, WIDTH)


class Parts(nn.Module):
    """A layer that is called, one whose weight is read as well, torch's own attention, a table, and an unused layer."""

    def __init__(self):
        super().__init__()
        self.first, self.tied, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(2, 2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(WIDTH, 3))
        self.register_buffer("fixed", torch.ones(3, 4))

    def forward(self, x):
        x = self.tied(self.first(x)) @ self.tied.weight
        x = self.attention(x, x, x, need_weights=False)[0]
        return x @ self.table @ self.fixed


def test_coverage_has_its_closed_form():
    model = Parts().train()
    found = coverage_of(model, INPUT)
    square = TOKENS * WIDTH**2
    assert (found.layers, found.covered, found.unused) == (2, 2 * square, ("unused",))
    assert {(each.kind, each.names, each.times, each.products) for each in found.plain} == {
        ("Linear", ("tied",), 1, square),
        ("MultiheadAttention", ("attention",), 1, 3 * square),
        ("NonDynamicallyQuantizableLinear", ("attention.out_proj",), 1, square),
    }
    assert {each.why for each in found.plain if each.kind == "Linear"} == {READ_TOO}
    assert (found.loose.names, found.loose.products, found.loose.why) == (("table",), TOKENS * WIDTH * 3, OF_NO_LAYER)
    assert found.fixed == TOKENS * 3 * 4
    assert found.share == pytest.approx(2 * square / (7 * square + TOKENS * WIDTH * 3))
    assert not found.whole
    assert "attention (weights read once): its type MultiheadAttention" in found.why
    assert type(model.first) is nn.Linear
    assert model.training


def test_a_model_without_linear_maps_has_no_share():
    found = coverage_of(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), torch.zeros(1, 3, 2, 2))
    assert (found.layers, found.whole) == (0, True)
    assert math.isnan(found.share)


@pytest.mark.parametrize("name", ["swiftformer_xs", "test_efficientnet_evos", "test_vit"])
def test_the_meta_device_gives_what_the_cpu_gives(name):
    model = timm.create_model(name).eval()
    assert measured(name) == coverage_of(model, torch.zeros(1, *model.pretrained_cfg["input_size"]))


def test_a_weight_of_no_layer_counts_in_the_share():
    found = measured("swiftformer_xs")
    assert {name.rpartition(".")[2] for name in found.loose.names} == {"w_g"}
    assert 0.999 < found.share < 1


def test_the_census_has_every_architecture_and_the_list_is_that_of_the_whole_ones():
    names = timm.list_models(exclude_filters="nrpm_*")
    assert set(census()) == set(names)
    assert len(list_models()) >= 1375
    assert [name for name in names[::20] if is_supported(name)] == [n for n in list_models() if n in names[::20]]
    for name in set(names) - set(list_models()):
        assert len(is_supported(name).why) > 40


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "nrpm_resnet18", "nrpm_resnet18.a1_in1k"])
def test_tags_and_prefixes_name_the_architecture(name):
    found = timm_nrpm.is_supported(name)
    assert (found.architecture, found.whole, found.why) == ("resnet18", True, "")
    assert str(found) == "resnet18 is covered whole."


def test_a_recurrence_is_said_to_stay_plain():
    found = is_supported("sequencer2d_s")
    assert not found
    assert "LSTM stages.0.blocks.0.rnn_tokens.rnn_v and 35 more" in str(found)
    assert "recurrence" in found.why


@pytest.fixture
def registered():
    """Architectures of one's own, and none of them left behind."""
    before = [dict(_model_entrypoints), dict(_model_to_module), {k: set(v) for k, v in _module_to_models.items()}]

    @register_model
    def own_whole(pretrained=False, **kwargs):
        return timm.create_model("resnet8_digits", **kwargs)

    @register_model
    def own_part(pretrained=False, **kwargs):
        model = timm.create_model("resnet8_digits", **kwargs)
        model.fc = nn.Sequential(nn.Unflatten(1, (1, -1)), nn.LSTM(32, 4))
        model.forward_head = lambda x, pre_logits=False: model.fc(model.global_pool(x))[0]
        return model

    @register_model
    def own_broken(pretrained=False, **kwargs):
        raise RuntimeError("it needs a file")

    yield
    for now, then in zip((_model_entrypoints, _model_to_module, _module_to_models), before, strict=True):
        now.clear()
        now.update(then)


def test_an_architecture_that_the_census_does_not_have_is_measured(registered):
    assert is_supported("own_whole")
    found = is_supported("own_part")
    assert not found
    assert "LSTM fc.1" in found.why
    with pytest.raises(ValueError, match=r"own_broken cannot be built and run .*it needs a file"):
        is_supported("own_broken")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "Unknown model 'resnt18'. Near names: resnet18"),
        ("resnet18.nope", "Unknown tag 'nope' for resnet18"),
        ("hf-hub:timm/resnet18", "names a repository or a folder: give the architecture"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ValueError, match=message):
        is_supported(name)


def test_a_convolution_of_several_experts_is_covered():
    name = "tf_efficientnet_cc_b0_4e"
    found = measured(name)
    with torch.device("meta"):
        counted = products(timm.create_model(name).eval(), torch.zeros(1, 3, 224, 224))
    assert (found.whole, found.share) == (True, 1.0)
    assert found.covered == sum(counted.values())
