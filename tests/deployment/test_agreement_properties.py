"""What an exported file computes, whatever images it is given and however many, and what is let pass as the same."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import timm_nrpm
from timm_nrpm import NRPMConfig
from timm_nrpm.deployment.agreement import AGREEMENT, MOST, Agreement, _compared
from timm_nrpm.deployment.export import export
from timm_nrpm.deployment.formats import FORMATS, Given
from timm_nrpm.nn.kernels import standard

SIDE = 4


def tiny():
    """A convolution and a linear layer, both reprogrammed; without ReLU, so that any image gives any logits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4)).eval()
    return timm_nrpm.reprogram_(model, NRPMConfig(lam=0.5, eps=0.1), example=torch.rand(1, 1, SIDE, SIDE))


@pytest.fixture(scope="module", params=["pt2", "torchscript"])
def files(request, tmp_path_factory):
    """The model, and the file that a program runs in its place, in which the linear layer is a loop over tiles."""
    model = tiny()
    path = tmp_path_factory.mktemp("files") / f"m{FORMATS[request.param].suffix}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard, "TILE", 2 * 12)
        export(model, path, example=torch.rand(2, 1, SIDE, SIDE))
    return model, FORMATS[request.param].read(path)


@settings(max_examples=60)
@given(
    count=st.integers(1, 9),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 100.0, 1e4]),
    equal=st.floats(0, 1),
)
def test_a_file_computes_what_its_model_does_on_any_number_of_any_images(files, count, seed, scale, equal):
    """Also where some or all pixels are equal, so that many products have no distance to their mean."""
    model, run = files
    noise, chance = torch.rand(2, count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    batch = scale * (2 * noise - 1).where(chance >= equal, 0.0)
    with torch.no_grad():
        want, got = model(batch), run(batch)
        alone = torch.cat([run(image.unsqueeze(0)) for image in batch])
    bound = AGREEMENT * max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=bound)
    torch.testing.assert_close(alone, want, rtol=0, atol=bound)  # no image counts for another


class Table(nn.Module):
    """A model that gives its images as logits, which float32 holds exactly."""

    def forward(self, x):
        return x.flatten(1)


logits = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


@settings(max_examples=80)
@given(values=logits, place=st.integers(0, 3), share=st.floats(0, 3), sign=st.sampled_from([1, -1]))
def test_an_error_of_one_logit_is_let_pass_up_to_the_bound_and_no_further(values, place, share, sign):
    """The model's own logits are exact, so there is no rounding that would excuse more."""
    want = torch.tensor([values, [0.0] * 4])
    got = want.clone()
    got[0, place] += sign * share * AGREEMENT * max(1.0, float(want.abs().max()))
    off = float((got.double() - want.double()).abs().max())
    given_model = Given(Table(), want, True, "")
    if off <= AGREEMENT * max(1.0, float(want.abs().max())):
        assert _compared(given_model, want, got) == Agreement(off, 0.0)
    else:
        with pytest.raises(RuntimeError, match="differ from the model's"):
            _compared(given_model, want, got)


class Rough(nn.Module):
    """A model whose float32 is far from its float64, so that a file may differ from it."""

    def forward(self, x):
        return x.flatten(1) + (0.5 if x.dtype == torch.float32 else 0.0)


@settings(max_examples=80)
@given(values=logits, share=st.floats(0, 3), wrong=st.sampled_from([0.0, math.nan, math.inf, -math.inf]))
@example(values=[0.0] * 4, share=0.9, wrong=0.0)
@example(values=[0.0] * 4, share=0.0, wrong=math.nan)
def test_however_rough_a_model_is_a_file_that_is_far_off_is_refused(values, share, wrong):
    want = Rough()(torch.tensor([values]))
    got = want + share * MOST * max(1.0, float(want.abs().max())) + wrong
    off = float((got.double() - want.double()).abs().max())
    given_model = Given(Rough(), want, True, "")
    if off <= MOST * max(1.0, float(want.abs().max())):
        assert _compared(given_model, torch.tensor([values]), got).difference == off
    else:
        with pytest.raises(RuntimeError, match="differ from the model's"):
            _compared(given_model, torch.tensor([values]), got)
