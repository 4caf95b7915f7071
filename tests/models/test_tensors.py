"""Whatever the layout of tensors in memory, they are written, read the same, and left as they are."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import timm_nrpm
from timm_nrpm.data.loaders import digits
from timm_nrpm.models.tensors import write_tensors
from timm_nrpm.tuning.checkpoints import Checkpoints


def bundled(change=lambda _: None):
    """The bundled model, reprogrammed once something was changed in its plain self."""
    plain = timm.create_model("resnet8_digits", pretrained=True).eval()
    change(plain)
    return timm_nrpm.reprogram_(plain, timm_nrpm.NRPMConfig(lam=0.5, iterations=1))


def transposed(model):
    model.fc.weight.data = model.fc.weight.data.t().contiguous().t()


def expanded(model):
    model.bn1.weight.data = torch.full((1,), 0.5).expand(8)


def strided(model):
    model.bn1.weight.data = torch.stack([model.bn1.weight.data] * 2, 1)[:, 0]


def sliced(model):
    model.bn1.weight.data = torch.cat([torch.zeros(3), model.bn1.weight.data, torch.zeros(3)])[3:11]


def shared(model):
    """As a flattened optimizer or FSDP leaves them: all in one storage, here and there the same place."""
    model.bn1.bias.data = model.layer1[0].bn1.bias.data
    both = torch.cat([model.layer2[0].bn1.weight.data, model.layer2[0].bn1.bias.data])
    model.layer2[0].bn1.weight.data, model.layer2[0].bn1.bias.data = both[:16], both[16:]


def channels_last(model):
    model.to(memory_format=torch.channels_last)


LAYOUTS = (transposed, expanded, strided, sliced, shared, channels_last)


def form(model):
    return {name: (value.stride(), value.data_ptr()) for name, value in model.state_dict().items()}


def test_tensors_of_any_layout_are_written(tmp_path):
    whole = torch.arange(24.0)
    tensors = {
        "transposed": whole.view(4, 6).t(),
        "expanded": whole[:1].expand(3, 5),
        "strided": whole[::5],
        "sliced": whole[3:9],
        "shared": whole,
        "the same": whole,
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "learned": torch.nn.Parameter(whole.half()),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(True),
    }
    strides = {name: value.stride() for name, value in tensors.items()}
    write_tensors(tensors, tmp_path / "t.safetensors")
    again = load_file(tmp_path / "t.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (again[name].dtype, again[name].shape) == (value.dtype, value.shape)
        assert torch.equal(again[name], value.detach()), name
        assert value.stride() == strides[name]


@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("full", [False, True])
def test_a_model_of_any_layout_is_saved(tmp_path, full, change):
    model = bundled(change)
    plain = {name: value.clone() for name, value in timm_nrpm.plain_copy(model).state_dict().items()}
    before = form(model)
    folder = timm_nrpm.save_pretrained(model, tmp_path / "v", full=full)
    assert form(model) == before
    base = None
    if not full:
        base = timm.create_model("resnet8_digits")
        base.load_state_dict(plain)
    again = timm_nrpm.from_pretrained(folder, base=base)
    for name, value in timm_nrpm.plain_copy(again).state_dict().items():
        assert torch.equal(value, plain[name]), name
    with torch.no_grad():
        images = torch.randn(4, 1, 8, 8)
        assert torch.allclose(again(images), model(images), atol=1e-5)


def test_a_channels_last_model_is_pushed(tmp_path):
    model = bundled(channels_last)
    done = timm_nrpm.push_to_hub(model, "me/v", full=True, dry_run=True, folder=tmp_path / "v")
    assert "model.safetensors" in done.files
    assert timm_nrpm.lambdas(timm_nrpm.from_pretrained(tmp_path / "v")) == timm_nrpm.lambdas(model)


@pytest.mark.parametrize("change", [channels_last, transposed, shared])
def test_a_run_of_a_model_of_any_layout_ends_well(tmp_path, change):
    """The weights of a tuned model are written at the very end."""
    model = bundled(change)
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    pixels, labels = digits("train")
    loader = DataLoader(TensorDataset(pixels[:32], labels[:32]), batch_size=16)
    settings = {"eps": 0.1, "steps": 1, "epochs": 1, "output": str(tmp_path / "run")}
    timm_nrpm.tune(model, loader, timm_nrpm.TuneConfig(paradigm="all", **settings))
    assert {name: value.stride() for name, value in model.state_dict().items()} == strides
    again = timm_nrpm.from_pretrained(tmp_path / "run" / "variant")
    assert {k: v for k, v in again.named_parameters() if not torch.equal(v, model.get_parameter(k))} == {}
    assert Checkpoints(tmp_path / "run" / "checkpoints").last() is not None
