"""The formats of exported models: how each is written, and how a file of it is run."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_nrpm import choices
from timm_nrpm.deployment.facts import FILE, KEY

OPSET = 18
"""Version of ONNX's operators, the one that `torch.onnx` writes without a conversion."""

Runner = Callable[[Tensor], Tensor]
"""A function that runs a file on images `[B, C, H, W]`."""


@dataclass(frozen=True)
class Given:
    """What a format writes.

    Attributes:
        model: The model, in evaluation mode, whose layers compute by standard operators.
        example: Images, `[B, C, H, W]`.
        any_batch: Whether the file is to take any number of images.
        facts: What the file says of its model, as JSON.
    """

    model: nn.Module
    example: Tensor
    any_batch: bool
    facts: str

    def program(self) -> torch.export.ExportedProgram:
        """The model as a program of `torch.export`."""
        shapes = ({0: torch.export.Dim("batch", min=1)},) if self.any_batch else None
        program = torch.export.export(self.model, (self.example,), dynamic_shapes=shapes)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # it names files of this machine
        return program


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        suffix: Ending of its files.
        write: Writes a file.
        read: Loads a file, in the program that is to run it.
        packages: Packages that it needs beside PyTorch.
        runs_on: What a machine needs that runs the file.
    """

    suffix: str
    write: Callable[[Given, Path], None]
    read: Callable[[Path], Runner]
    packages: tuple[str, ...]
    runs_on: str

    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(name for name in self.packages if find_spec(name) is None)


def _write_onnx(given: Given, path: Path) -> None:
    written: Any = torch.onnx.export(
        given.program(), (given.example,), dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"],
        output_names=["logits"], dynamic_shapes=({0: "batch"},) if given.any_batch else None,
    )  # fmt: skip
    for node in chain(written.model.graph.all_nodes(), *(f.all_nodes() for f in written.model.functions.values())):
        node.metadata_props.clear()  # PyTorch's notes, which are larger than most models
    written.model.metadata_props[KEY] = given.facts
    written.save(str(path))


def _read_onnx(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _write_pt2(given: Given, path: Path) -> None:
    log = logging.getLogger("torch._export.serde.serialize")
    level = log.level
    log.setLevel(logging.ERROR)  # a loop without further inputs is warned of, and is right
    try:
        torch.export.save(given.program(), path, extra_files={FILE: given.facts})
    finally:
        log.setLevel(level)


def _read_pt2(path: Path) -> Runner:
    runner: Runner = torch.export.load(path).module()
    return runner


def _write_torchscript(given: Given, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace fixes the size of the image, as the other formats do
        traced = torch.jit.trace(given.model, given.example, check_trace=False)
        draft = path.with_suffix(".traced")
        torch.jit.save(traced, str(draft), _extra_files={FILE: given.facts})
    with zipfile.ZipFile(draft) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as kept:
        for name in archive.namelist():
            if not name.endswith(".debug_pkl"):  # which name files of this machine
                kept.writestr(name, archive.read(name))
    draft.unlink()


def _read_torchscript(path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the format is deprecated, and users of it know
        runner: Runner = torch.jit.load(str(path))
    return runner


def _write_openvino(given: Given, path: Path) -> None:
    import openvino

    draft = path.with_suffix(".onnx")
    try:
        _write_onnx(given, draft)
        model = openvino.convert_model(str(draft))
        model.set_rt_info(given.facts, [KEY])
        openvino.save_model(model, str(path), compress_to_fp16=False)
    finally:
        draft.unlink(missing_ok=True)


def _read_openvino(path: Path) -> Runner:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(next(iter(compiled(images.numpy()).values())))


_FORMATS = (
    Format(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime"), "onnxruntime"),
    Format(".pt2", _write_pt2, _read_pt2, (), "PyTorch"),
    Format(".ts", _write_torchscript, _read_torchscript, (), "PyTorch, or LibTorch from C++"),
    Format(
        ".xml", _write_openvino, _read_openvino, ("onnx", "onnxscript", "openvino"), "OpenVINO; weights are in a .bin"
    ),
)

FORMATS = dict(zip(choices.FORMATS, _FORMATS, strict=True))
"""All formats by name."""
