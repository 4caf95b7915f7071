"""`timm-nrpm export`: a model as a file that runs without this package."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from timm_nrpm.choices import FORMATS
from timm_nrpm.cli import options
from timm_nrpm.cli.terminal import Terminal


def add_export(commands: Any) -> None:
    """Add `timm-nrpm export`."""
    useless = (*options.USELESS_FOR_MODELS, *options.USELESS_FOR_PLAIN)
    names = {**options.NAMES, "path": "--output", "format": "--format"}
    parser = options.add_command(
        commands,
        "export",
        options.Command(_export, useless, names),
        "write a model to a file for onnxruntime, PyTorch or OpenVINO",
        "Write a model to a file that runs without this package, and check that it computes the same. The file holds "
        "what the model is as JSON.",
        "timm-nrpm export --lam 0.8 --layers first:2 --output model.onnx --pixels",
    )
    options.add_model(parser, 0.8, plain=True)
    file = parser.add_argument_group("file")
    file.add_argument("--format", choices=FORMATS, help="format of the file (default: what its ending says)")
    file.add_argument("--pixels", action="store_true", help="take pixels in [0, 1], and normalise them in the file")
    file.add_argument("--fixed-batch", action="store_true", help="take one image at a time, and no other number")
    options.add_output(parser, "file to write, which ends in .onnx, .pt2, .ts or .xml", "model.onnx")


def _export(args: argparse.Namespace, terminal: Terminal) -> None:
    from pathlib import Path

    from timm_nrpm.cli.inputs import model_of
    from timm_nrpm.deployment.export import export
    from timm_nrpm.hub.templates import read_reports

    model = model_of(args).eval()
    folder = Path(args.variant) if args.variant else None
    reports = read_reports(folder) if folder is not None and folder.is_dir() else []
    if folder is not None and not folder.is_dir():
        terminal.note(f"The file holds no reports of {args.variant}: timm-nrpm pull it first, and export the folder.")
    done = export(model, args.output, args.format, any_batch=not args.fixed_batch, pixels=args.pixels, reports=reports)
    terminal.show(str(done))
    terminal.give({"path": str(done.path), "format": done.format, "difference": done.difference, "bytes": done.bytes,
                   "facts": asdict(done.facts)})  # fmt: skip
