"""Which layers can be reprogrammed, and what is said of the others: parametrized, pruned, of torch's own attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from timm_nrpm import NRPMConfig, lambdas, plain_copy, reprogram_, restore_
from timm_nrpm.errors import ReprogrammingWarning
from timm_nrpm.models.support import UNCALLED, layers_of
from timm_nrpm.nn.layers import NRPMConv2d, NRPMLinear

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


class ReadsPast(nn.Module):
    """It calls one layer, reads the weight of another, a number of times, and leaves a third alone."""

    def __init__(self, times):
        super().__init__()
        self.called, self.read, self.unused, self.times = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), times

    def forward(self, x):
        x = self.called(x)
        for _ in range(self.times):
            x = F.linear(x, self.read.weight)
        return x


@pytest.mark.parametrize(("times", "said"), [(1, "once"), (3, "3 times")])
def test_a_weight_that_is_read_past_its_layer_is_named_with_the_count(times, said):
    with pytest.warns(ReprogrammingWarning, match=f"read: the model never calls it.*reads its weight past it {said}"):
        model = reprogram_(ReadsPast(times), example=torch.randn(2, 4))
    assert list(lambdas(model)) == ["called"]
    assert model.nrpm.skipped["unused"] == UNCALLED


@torch.no_grad()
def test_pruned_layers_work_through_their_computed_weight():
    model = network()
    for layer in (model[0], model[3]):
        prune.l1_unstructured(layer, "weight", 0.5)
    before = model(IMAGES)
    assert torch.equal(reprogram_(model, NRPMConfig(lam=1.0), example=IMAGES)(IMAGES), before)
    assert not model.nrpm.skipped
    after = reprogram_(model, NRPMConfig(lam=0.5), example=IMAGES)(IMAGES)
    dense = network()  # the same weights for good
    for layer, pruned in ((dense[0], model[0]), (dense[3], model[3])):
        layer.weight.copy_(pruned.weight_orig * pruned.weight_mask)
        layer.bias.copy_(pruned.bias)
    assert torch.equal(reprogram_(dense, NRPMConfig(lam=0.5), example=IMAGES)(IMAGES), after)
    assert not torch.allclose(after, before)
    model[3].weight_mask.zero_()  # the weight is computed anew in every forward
    assert torch.equal(model(IMAGES), model[3].bias.expand(2, -1))
    assert torch.equal(restore_(model)(IMAGES), model[3].bias.expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_layers_are_refused_by_name_until_the_parametrization_is_removed(kind):
    model = network()
    getattr(parametrizations, kind)(model[3])
    before = model(IMAGES)
    with pytest.warns(ReprogrammingWarning, match=r"3: its type ParametrizedLinear .*remove_parametrizations"):
        reprogram_(model, NRPMConfig(lam=0.5), example=IMAGES)
    assert list(lambdas(model)) == ["0"]
    assert torch.equal(plain_copy(model)(IMAGES), before)
    parametrize.remove_parametrizations(model[3], "weight")  # as the message says
    reprogram_(model, NRPMConfig(lam=1.0), example=IMAGES)
    assert [type(model[i]) for i in (0, 3)] == [NRPMConv2d, NRPMLinear]
    assert torch.equal(model(IMAGES), before)


class TorchsAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x, x, x, need_weights=False)[0].mean(1))


def test_torchs_attention_is_refused_by_name_with_its_projection():
    supported, skipped = layers_of(TorchsAttention(), NRPMConfig(), torch.randn(2, 5, 8))
    assert list(supported) == ["head"]
    assert set(skipped) == {"inner", "inner.out_proj"}
    assert "reads its weights itself" in skipped["inner"]
    assert "belongs to an nn.MultiheadAttention" in skipped["inner.out_proj"]


@pytest.mark.parametrize("made", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrences_are_refused_by_name(made):
    _, skipped = layers_of(nn.Sequential(made(4, 4)), NRPMConfig())
    assert "inside a recurrence" in skipped["0"]
