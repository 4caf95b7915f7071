"""Measure what deployment costs: `results/deployment.md` and `.json`.

    python scripts/deployment.py                      # about a quarter of an hour on an idle machine
    python scripts/deployment.py --models resnet18    # some of the models; the rows of the others stay

Latency of one image of 224 pixels on one thread, plain and reprogrammed at lambda 0.8: for several K and layers, under
bfloat16 autocast, and exported to each format. What other processes take of the machine does not count: with one
thread, times are those for which the processor was at work, and of runtimes with threads of their own those of the
process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from bench import ROOT, machine
from torch import Tensor, nn

import timm_nrpm
from timm_nrpm.choices import FORMATS
from timm_nrpm.deployment import formats
from timm_nrpm.deployment.export import export

MODELS = ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "mixer_s32_224",
          "tf_efficientnet_lite0")  # fmt: skip
SETTINGS: dict[str, tuple[int, str | None]] = {
    "K = 3": (3, None), "K = 1": (1, None), "K = 3, first:4": (3, "first:4"), "K = 1, first:4": (1, "first:4"),
}  # fmt: skip
EXPORTED = ("plain", "K = 1, first:4", "K = 3")
SLOW = 5.0
"""Seconds after which one run is enough."""


def seconds_of(run: Callable[[], Any]) -> float:
    """Median of the seconds of work of up to five runs after a first one."""
    times: list[float] = []
    while len(times) < 6:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
        if times[0] > SLOW and len(times) == 2:
            break
    return statistics.median(times[1:])


def eager(model: nn.Module, x: Tensor, half: bool) -> float:
    """Seconds of a forward of the model, also under bfloat16 autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        return seconds_of(lambda: model(x))


def single_threaded(name: str) -> formats.Runner:
    """A runner of a file by one thread."""
    path = Path(name)
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    if path.suffix == ".xml":
        import openvino

        given = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(name, "CPU", given)
        return lambda x: torch.from_numpy(next(iter(compiled(x.numpy()).values())))
    return next(each for each in formats.FORMATS.values() if each.suffix == path.suffix).read(path)


def row_of(name: str, skipped: set[str]) -> dict[str, Any]:
    """All measurements of one model, in ms, and of its files."""
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    x = torch.randn(1, 3, 224, 224)
    nets = {"plain": timm.create_model(name).eval()}
    nets |= {key: timm_nrpm.create_model(name, lam=0.8, iterations=k, layers=layers).eval()
             for key, (k, layers) in SETTINGS.items()}  # fmt: skip
    for net in nets.values():
        net.load_state_dict(state, strict=False)
    row: dict[str, Any] = {"model": name, "float32": {}, "bfloat16": {}, "files": []}
    for key, net in nets.items():
        row["float32"][key] = 1000 * eager(net, x, half=False)
        if key in ("plain", "K = 3"):
            row["bfloat16"][key] = 1000 * eager(net, x, half=True)
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            for key in EXPORTED if format == "onnx" else EXPORTED[1:2]:
                if format not in skipped:
                    row["files"].append(file_of(nets[key], key, format, Path(folder), x))
    return row


def file_of(net: nn.Module, key: str, format: str, folder: Path, x: Tensor) -> dict[str, Any]:
    """Export a model, and measure its file."""
    start = time.process_time()
    try:
        done = export(net, folder / f"m{formats.FORMATS[format].suffix}", example=x)
    except RuntimeError as error:
        return {"format": format, "setting": key, "error": str(error)}
    taken, run = time.process_time() - start, single_threaded(str(done.path))
    with torch.no_grad():
        seconds = seconds_of(lambda: run(x))
    return {"format": format, "setting": key, "ms": 1000 * seconds, "MiB": done.bytes / 2**20,
            "difference": done.difference, "seconds to export": taken}  # fmt: skip


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page of results."""
    heads = ["plain", *SETTINGS]
    lines = ["# What `scripts/deployment.py` measured", ""]
    versions = f"torch {about['torch']}, timm {about['timm']}, {about['cpu']} ({about['instructions']})"
    lines += [f"{versions}. One image of 224x224, one thread; ms of work, and in brackets times plain.", ""]
    lines += [
        "## In PyTorch, by this package's kernels",
        "",
        f"| model | {' | '.join(heads)} | plain, bfloat16 | K = 3, bfloat16 |",
    ]
    lines += ["|---" * (len(heads) + 3) + "|"]
    for row in rows:
        plain, half = row["float32"]["plain"], row["bfloat16"]
        cells = [f"{row['float32'][h]:.1f} ({row['float32'][h] / plain:.1f})" for h in heads]
        cells += [f"{half[h]:.1f} ({half[h] / plain:.1f})" for h in ("plain", "K = 3")]
        lines += [f"| {row['model']} | {' | '.join(cells)} |"]
    lines += [
        "",
        "## Exported",
        "",
        "| model | format | setting | ms | times plain in PyTorch | MiB | largest difference | s to export |",
    ]
    lines += ["|---" * 8 + "|"]
    for row in rows:
        for file in row["files"]:
            start = f"| {row['model']} | {file['format']} | {file['setting']} |"
            if "error" in file:
                lines += [f"{start} {file['error']} | | | | |"]
                continue
            times = file["ms"] / row["float32"]["plain"]
            lines += [f"{start} {file['ms']:.1f} | {times:.1f} | {file['MiB']:.1f} | {file['difference']:.0e} | "
                      f"{file['seconds to export']:.0f} |"]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="models (default: all)")
    parser.add_argument("--skip", nargs="+", default=[], choices=FORMATS, help="formats that are not measured")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.out / "deployment.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    about = machine("cpu")
    for name in args.models:
        row = row_of(name, set(args.skip))
        known = [*(each for each in known if each["model"] != name), row]
        known.sort(key=lambda each: MODELS.index(each["model"]))
        file.write_text(json.dumps({"machine": about, "rows": known}, indent=1) + "\n")
        (args.out / "deployment.md").write_text(markdown(known, about))
        print(markdown([row], about), flush=True)


if __name__ == "__main__":
    main()
