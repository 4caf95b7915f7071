"""Exported files compute what the model computes, in programs without this package, and say what they are."""

import json
import subprocess
import sys
import textwrap
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import Normalize

import timm_nrpm
from timm_nrpm import NRPMConfig, Threat
from timm_nrpm.data.loaders import digits
from timm_nrpm.deployment.export import export
from timm_nrpm.deployment.facts import KEY
from timm_nrpm.deployment.formats import FORMATS
from timm_nrpm.nn.pixel_model import PixelModel

SIX = {
    "resnet18": (64, {}),
    "mixer_s32_224": (224, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
    "convnext_atto": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "tf_efficientnet_lite0": (64, {}),
}
"""The architectures of `docs/deployment.md`, and smaller images than theirs, so that they take seconds."""


QUICK = [pytest.param(name, marks=pytest.mark.slow) if name == "openvino" else name for name in FORMATS]
"""All formats, of which those that need no other package than the test's are tried each time."""


@pytest.fixture(scope="module")
def model():
    model = timm_nrpm.create_model("resnet8_digits", pretrained=True, lam=0.5).eval()
    return timm_nrpm.calibrate_(model, [digits("train")[0][:64]])


@pytest.fixture(scope="module")
def pixels():
    return digits("test")[0][:8]


def needed(format):
    if missing := FORMATS[format].missing():
        pytest.skip(f"{', '.join(missing)} is not installed: pip install 'timm_nrpm[openvino]'")


@pytest.mark.parametrize("format", QUICK)
def test_a_file_computes_what_the_model_computes(format, model, pixels, tmp_path):
    needed(format)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = export(model, tmp_path / f"m{FORMATS[format].suffix}", pixels=True)
    net = PixelModel(model).eval()
    run = FORMATS[format].read(done.path)
    for count in (1, 3, 8):
        with torch.no_grad():
            assert torch.allclose(run(pixels[:count]), net(pixels[:count]), atol=1e-4)
    assert done.difference <= 1e-4
    assert done.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(name.startswith(".") for name in map(str, tmp_path.iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("name", SIX)
def test_six_architectures(name, format, tmp_path):
    size, build = SIX[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **build).eval()
    timm_nrpm.reprogram_(model, NRPMConfig(lam=0.8))
    timm_nrpm.calibrate_(model, [torch.rand(8, 3, size, size)])
    done = export(model, tmp_path / f"m.{format}", example=torch.randn(2, 3, size, size))  # which tries 1, 2 and 8
    assert done.rounding == 0  # which says that they agree to 1e-4 of the largest logit
    assert set(done.facts.lam.values()) == {0.8}


@pytest.mark.parametrize(
    "config",
    [
        NRPMConfig(lam=0.5, layers="first:2"),
        pytest.param(NRPMConfig(lam=0.5, iterations=1, penalty="huber-mcp"), marks=pytest.mark.slow),
        pytest.param(NRPMConfig(lam=0.0, eps=2.0, standardize=True), marks=pytest.mark.slow),
        NRPMConfig(lam=1.0),
    ],
    ids=["some layers", "another penalty", "standard units", "plain"],
)
def test_settings(config, pixels, tmp_path):
    model = timm_nrpm.reprogram_(timm.create_model("resnet8_digits", pretrained=True).eval(), config)
    if config.lam < 1:
        timm_nrpm.calibrate_(model, [pixels])
    done = export(model, tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.allclose(FORMATS["pt2"].read(done.path)(pixels), model(pixels), atol=1e-4)
    graphs = [
        m.graph for m in torch.export.load(done.path).graph_module.modules() if isinstance(m, torch.fx.GraphModule)
    ]
    estimates = [node for graph in graphs for node in graph.nodes if "reciprocal" in str(node.target)]
    assert (not estimates) == (config.lam == 1)  # what is plain has no estimate


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: nn.DataParallel(PixelModel(m, (0.3,), (0.4,))),
        lambda m: nn.Sequential(Normalize((0.3,), (0.4,)), m),
    ],
    ids=["PixelModel in DataParallel", "Normalize"],
)
def test_what_normalises_around_a_model_is_in_the_file(wrapped, model, pixels, tmp_path):
    model = wrapped(timm_nrpm.plain_copy(model)).eval()
    done = export(model, tmp_path / "m.pt2")
    assert done.facts.pixels
    assert done.facts.mean == pytest.approx((0.3,))
    assert done.facts.std == pytest.approx((0.4,))
    with torch.no_grad():
        assert torch.allclose(FORMATS["pt2"].read(done.path)(pixels), model(pixels), atol=1e-4)


class Several(nn.Module):
    """Convolutions of one and three dimensions, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.up, self.volume, self.line = nn.ConvTranspose2d(1, 3, 2, 2), nn.Conv3d(1, 2, 3), nn.Conv1d(28, 3, 3)

    def forward(self, x):
        volume = self.volume(self.up(x).unsqueeze(1))  # [B, 2, 1, 14, 14]
        return self.line(volume.flatten(1, 3)).mean(2)


@pytest.mark.parametrize("ending", ["pt2", "ts"])
def test_other_convolutions(ending, tmp_path):
    model = timm_nrpm.reprogram_(Several().eval(), NRPMConfig(lam=0.5), example=IMAGES)
    assert len(timm_nrpm.lambdas(model)) == 3
    assert export(model, tmp_path / f"m.{ending}", example=IMAGES).difference < 1e-4


def test_an_attention_whose_layer_is_plain_in_the_file(tmp_path):
    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    timm_nrpm.reprogram_(model.eval(), NRPMConfig(lam={"blocks.0.*": 0.8, "*": 1.0}))
    done = export(model, tmp_path / "m.pt2", example=torch.randn(2, 3, 32, 32))
    assert done.difference < 1e-4


def test_parts_of_a_model_are_named(model, tmp_path):
    net = nn.Sequential(
        nn.Identity(), timm_nrpm.reprogram_(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), NRPMConfig(lam=0.5))
    )
    facts = export(net.eval(), tmp_path / "m.pt2", example=IMAGES).facts
    assert facts.lam == {"1.1": 0.5}
    assert facts.settings["penalty"] == "l1"


@pytest.mark.parametrize("format", QUICK)
def test_no_file_names_a_place_on_this_machine(format, model, tmp_path):
    needed(format)
    export(model, tmp_path / f"m{FORMATS[format].suffix}")
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        for place in (Path(timm_nrpm.__file__).parents[1], Path(torch.__file__).parents[1], tmp_path):
            assert str(place).encode() not in content


@pytest.mark.slow
def test_an_ensemble(model, pixels, tmp_path):
    plain = timm.create_model("resnet8_digits", pretrained=True).eval()
    mixture = timm_nrpm.adaptive_smoothing.AdaptiveSmoothing(plain, model, share=0.7).eval()
    done = export(mixture, tmp_path / "m.pt2", example=pixels)
    assert done.facts.pixels
    with torch.no_grad():
        assert torch.allclose(FORMATS["pt2"].read(done.path)(pixels[:3]), mixture(pixels[:3]), atol=1e-4)


ELSEWHERE = {
    "onnx": """
        import sys, numpy, onnxruntime
        session = onnxruntime.InferenceSession(sys.argv[1])
        images = numpy.load(sys.argv[2])
        assert session.get_inputs()[0].shape[0] == session.get_outputs()[0].shape[0] == "batch"
        (logits,) = session.run(None, {session.get_inputs()[0].name: images})
        facts = session.get_modelmeta().custom_metadata_map["timm_nrpm"]
        known = sys.modules
    """,
    "pt2": """
        import sys, numpy, torch
        files = {"timm_nrpm_facts.json": ""}
        program = torch.export.load(sys.argv[1], extra_files=files)
        with torch.no_grad():
            logits = program.module()(torch.from_numpy(numpy.load(sys.argv[2]))).numpy()
        facts = files["timm_nrpm_facts.json"]
        known = {name for name in sys.modules if name.startswith("timm")}
    """,
    "torchscript": """
        import sys, numpy, torch
        files = {"timm_nrpm_facts.json": ""}
        program = torch.jit.load(sys.argv[1], _extra_files=files)
        with torch.no_grad():
            logits = program(torch.from_numpy(numpy.load(sys.argv[2]))).numpy()
        facts = files["timm_nrpm_facts.json"].decode()
        known = {name for name in sys.modules if name.startswith("timm")}
    """,
}
"""Programs that run a file by what it needs alone; those of PyTorch would find timm, if they asked for it."""


@pytest.mark.parametrize("format", ELSEWHERE)
def test_a_program_without_this_package(format, model, pixels, tmp_path):
    needed(format)
    import numpy as np

    done = export(model, tmp_path / f"m{FORMATS[format].suffix}", pixels=True)
    np.save(tmp_path / "images.npy", pixels.numpy())
    end = """
        assert not {"timm", "timm_nrpm"} & set(known), known
        assert "torch" not in sys.modules or sys.argv[1].endswith(("pt2", "ts"))
        print(facts)
        numpy.save(sys.argv[2], logits)
    """
    program = textwrap.dedent(ELSEWHERE[format]) + textwrap.dedent(end)
    command = [sys.executable, "-W", "ignore", "-c", program, str(done.path), str(tmp_path / "images.npy")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts == json.loads(done.facts.to_json())
    with torch.no_grad():
        want = PixelModel(model).eval()(pixels)
    assert np.abs(np.load(tmp_path / "images.npy") - want.numpy()).max() <= 1e-4


def test_the_facts(model, tmp_path):
    report = timm_nrpm.evaluate(model, [_first(20)], Threat("Linf", 0.1), "quick")
    facts = export(model, tmp_path / "m.pt2", pixels=True, reports=[report]).facts
    assert (facts.architecture, facts.base) == ("resnet8_digits", "resnet8_digits")
    assert facts.input_size == (1, 8, 8)
    assert facts.outputs == (10,)
    assert facts.lam == timm_nrpm.lambdas(model)
    assert facts.settings["iterations"] == 3
    assert facts.statistics == "calibrated on 64 images"
    assert facts.verdicts == (str(report),)
    assert KEY == "timm_nrpm"


def test_reports_are_on_this_model(model, tmp_path):
    plain = timm.create_model("resnet8_digits", pretrained=True).eval()
    report = timm_nrpm.evaluate(plain, [_first(20)], Threat("Linf", 0.1), "quick")
    with pytest.raises(ValueError, match="another model"):
        export(model, tmp_path / "m.pt2", reports=[report])
    assert not list(tmp_path.iterdir())


def _first(count):
    images, labels = digits("test")
    return images[:count], labels[:count]


class Noisy(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :2] + torch.rand(len(x), 2)


class Fixed(nn.Module):
    """A model that takes two images and no other number."""

    def forward(self, x):
        return x.flatten(1).reshape(2, -1)[:, :3]


class Branching(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :2] * (2 if x.sum() > 0 else 3)


class Undefined(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :2] / 0 * 0


def trained_inside():
    model = timm.create_model("resnet8_digits").eval()
    model.bn1.train()
    return model


IMAGES = torch.rand(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("build", "path", "options", "said"),
    [
        (lambda m: m, "m.bin", {}, "The ending of m.bin names no format: give format=, or a path that ends in .onnx"),
        (lambda m: m, "m.pt2", {"format": "tflite"}, "format='tflite' is not known: choose one of onnx"),
        (lambda m: m, "m.onnx", {"format": "pt2"}, "m.onnx is to hold pt2, whose files end in .pt2: rename it."),
        (lambda m: nn.Flatten().eval(), "m.pt2", {}, "Flatten is no timm model, so the size of its images is unknown"),
        (lambda m: m, "m.pt2", {"example": torch.rand(8, 8)}, "give images of .B, C, H, W."),
        (lambda m: timm.create_model("resnet8_digits"), "m.pt2", {}, "The model is in training mode: call model.eval"),
        (lambda m: timm.create_model("resnet8_digits").eval().half(), "m.pt2", {}, "call model.float.. first"),
        (lambda m: Noisy().eval(), "m.pt2", {"example": IMAGES}, "The model's forward is random: two runs"),
        (lambda m: Fixed().eval(), "m.pt2", {"example": IMAGES}, "Its number of images may be fixed: try any_batch="),
        (lambda m: Branching().eval(), "m.pt2", {"example": IMAGES, "any_batch": False}, "cannot be exported to pt2"),
        (lambda m: Branching().eval(), "m.ts", {"example": IMAGES}, "The file's logits differ from the model's by"),
        (lambda m: Undefined().eval(), "m.pt2", {"example": IMAGES}, "logits that are not finite on the example"),
        (lambda m: trained_inside(), "m.pt2", {}, "bn1 is in training mode"),
        (lambda m: timm.create_model("resnet8_digits").to("meta").eval(), "m.pt2", {}, "parameters without values"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said(build, path, options, said, model, tmp_path):
    (tmp_path / path).write_text("an earlier file")
    with pytest.raises((ValueError, RuntimeError), match=said):
        export(build(model), tmp_path / path, **options)
    assert [file.name for file in tmp_path.iterdir()] == [path]
    assert (tmp_path / path).read_text() == "an earlier file"


def test_a_fixed_number_of_images(tmp_path):
    done = export(Fixed().eval(), tmp_path / "m.pt2", example=IMAGES, any_batch=False)
    assert torch.equal(FORMATS["pt2"].read(done.path)(IMAGES), Fixed()(IMAGES))
    assert "takes normalised images [a fixed number, 1, 8, 8]" in str(done)


def test_a_format_that_is_not_installed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "timm_nrpm.deployment.formats.find_spec", lambda name: None if "onnx" in name else find_spec(name)
    )
    with pytest.raises(
        ValueError, match=r'onnx needs onnx, onnxscript, onnxruntime, not installed: pip install "timm_nrpm\[export\]"'
    ):
        export(model, tmp_path / "m.onnx")


class Steep(nn.Module):
    """A model in which the last digits of float32 count: its logits are differences of large numbers."""

    def forward(self, x):
        return ((x.flatten(1)[:, :3] * 1e5).sin() * 1e4 + 1e6) - 1e6


def test_a_file_may_differ_by_the_models_own_rounding(tmp_path, monkeypatch):
    read = FORMATS["pt2"].read

    def with_an_error_of(size):
        def read_it(path):
            run = read(path)
            return lambda x: run(x) + size

        monkeypatch.setitem(FORMATS, "pt2", FORMATS["pt2"].__class__(".pt2", FORMATS["pt2"].write, read_it, (), ""))

    model, example = Steep().eval(), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        rounding = (model(example).double() - model(example.double())).abs().amax(1)  # of each image
    with_an_error_of(float(rounding[0]) / 2)
    done = export(model, tmp_path / "m.pt2", example=example)
    assert done.rounding == pytest.approx(float(rounding.max()))
    assert "from those in float64" in str(done)
    with_an_error_of(10 * float(rounding.max()))
    with pytest.raises(RuntimeError, match=r"In float64 they are .* from the file's and .* Nothing was written"):
        export(model, tmp_path / "other.pt2", example=example)


def test_a_file_that_computes_something_else_is_not_kept(model, tmp_path, monkeypatch):
    wrong = FORMATS["pt2"].__class__(
        ".pt2", FORMATS["pt2"].write, lambda path: lambda x: torch.zeros(len(x), 10), (), ""
    )
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(RuntimeError, match=r"differ from the model's by .* Nothing was written"):
        export(model, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
