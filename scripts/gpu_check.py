"""Check and measure everything on a CUDA machine, in less than ten minutes, from a checkout without a network.

    python scripts/gpu_check.py                                  # everything
    python scripts/gpu_check.py --only operator models           # these parts, and the limits they need
    python scripts/gpu_check.py --device cpu --quick             # tiny sizes on the CPU: tries the script itself

It needs PyTorch with Triton, and timm; nothing need be installed, not even this package. Parts whose packages are
missing are left out, and the last lines say which and why. Every part is a process of its own with a time limit, so
that a crash loses that part alone. After each part, `bench-GPU.json` and `bench-GPU.md` in the folder `--out` hold all
that was measured so far.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.page import markdown

ROOT = Path(__file__).parents[1]

PARTS = {
    "machine": ("gpu.machine", 15),
    "warmup": ("gpu.warmup", 75),
    "limits": ("gpu.limits", 25),
    "checks": ("gpu.checks", 90),
    "operator": ("gpu.products", 95),
    "models": ("gpu.models", 90),
    "tiles": ("gpu.tiles", 60),
    "instructions": ("gpu.instructions", 15),
    "evaluation": ("gpu.learning", 55),
    "tuning": ("gpu.learning", 30),
}
"""Module of each part, whose function has the part's name, and its share of the time. What is left over, others get."""

ALWAYS = {"machine"}
NEEDED = {"operator": {"limits"}}
OF_TRITON = {"warmup", "limits", "tiles"}


def run_part(args: argparse.Namespace) -> None:
    """Run one part in this process; the rows go to the file `args.rows`."""
    import torch
    from gpu.session import Session
    from gpu.warmup import briefly, time_tiles_by

    torch.manual_seed(0)
    earlier = json.loads(args.earlier.read_text())["tables"] if args.earlier else {}
    session = Session(args.rows, args.device, args.quick, time.time() + args.seconds, tuple(args.share))
    session.write()
    if args.device == "cuda" and args.part != "warmup":
        time_tiles_by(briefly)
    function = getattr(import_module(PARTS[args.part][0]), args.part)
    function(session, earlier) if args.part == "operator" else function(session)


def environment(folder: Path) -> dict[str, str]:
    """The variables of the parts' processes, which find the package in this checkout."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["TRITON_CACHE_DIR"] = str(folder / "triton")  # of this run alone, and shared by its parts
    if not find_spec("platformdirs"):  # by which the package finds its own folder
        quiet["TIMM_NRPM_CACHE"] = str(folder / "kernels")
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(part: str, seconds: float, folder: Path, args: argparse.Namespace, shares: int = 1) -> dict[str, Any]:
    """Run a part in processes of its own, and return its rows, what was left out, and how it ended."""
    files = [folder / f"{part}-{index}.json" for index in range(shares)]
    running = []
    for index, file in enumerate(files):
        command = [sys.executable, "-W", "ignore", __file__, "--part", part, "--rows", str(file)]
        command += ["--device", args.device, "--seconds", str(seconds), "--share", str(index), str(shares)]
        command += [*(["--quick"] if args.quick else []), "--earlier", str(folder / "all.json")]
        log = (folder / f"{part}-{index}.log").open("w+")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(folder), start_new_session=True
        )
        running.append((process, log))
    result: dict[str, Any] = {"tables": {}, "left_out": []}
    last = time.time() + seconds + 2
    for (process, log), file in zip(running, files, strict=True):
        ended = _end(process, max(0.1, last - time.time()))
        log.seek(0)
        output = log.read()
        log.close()
        if file.exists():
            rows = json.loads(file.read_text())
            result["left_out"] += rows["left_out"]
            for name, added in rows["tables"].items():
                result["tables"].setdefault(name, []).extend(added)
        if ended:
            result["left_out"].append(f"{part}: {ended}, with the output: {' '.join(output.split())[-500:]}")
        print(output, end="", flush=True)
    return result


def _end(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for a process, kill it and its children after so many seconds, and return what went wrong, if anything."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "it was ended when its time was over; the rows above were measured before"
    if status < 0:
        return f"its process died of signal {signal.Signals(-status).name}"
    return f"its process ended with status {status}" if status else ""


def chosen(only: list[str]) -> list[str]:
    """The parts to run, in order: all of them, or those named and what they need."""
    wanted = set(only) | ALWAYS | {need for part in only for need in NEEDED.get(part, set())}
    return [part for part in PARTS if not only or part in wanted]


def save(result: dict[str, Any], folder: Path, out: Path) -> Path:
    """Write the JSON and the page, and return the path of the page."""
    name = (result["tables"].get("machine") or [{"gpu": "unknown"}])[0]["gpu"]
    stem = "bench-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-quick" if result["quick"] else "")
    text = json.dumps(result, indent=1) + "\n"
    (folder / "all.json").write_text(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(text)
    (out / f"{stem}.md").write_text(markdown(result))
    return out / f"{stem}.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    names = [part for part in PARTS if part not in ALWAYS]
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"parts to run: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder for the JSON and the page")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="device to measure (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script itself")
    for name, kind in (("--part", str), ("--rows", Path), ("--earlier", Path), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    only = [name for names in args.only for name in names.split(",") if name]
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    measure(args, chosen(only))


def measure(args: argparse.Namespace, parts: list[str]) -> None:
    """Run the parts one after another and print the page."""
    end = time.time() + 60 * args.minutes
    result: dict[str, Any] = {"quick": args.quick, "device": args.device, "tables": {}, "left_out": [], "seconds": {}}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        (folder / "all.json").write_text(json.dumps(result))
        for index, part in enumerate(parts):
            left = end - time.time() - 4
            seconds = left * PARTS[part][1] / sum(PARTS[later][1] for later in parts[index:])
            print(f"{part}: at most {seconds:.0f} s", flush=True)
            began = time.time()
            if part in OF_TRITON and args.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                result["left_out"].append(f"{part}: Triton's kernels need a GPU, or TRITON_INTERPRET=1")
                continue
            shares = max(1, min(8, (os.cpu_count() or 2) - 1)) if part == "warmup" and args.device == "cuda" else 1
            done = run(part, seconds, folder, args, shares)
            result["seconds"][part] = time.time() - began
            result["left_out"] += done["left_out"]
            result["tables"] |= done["tables"]
            save(result, folder, args.out)
            if part == "machine" and not done["tables"]:
                sys.exit(f"The device {args.device} does not work: {' '.join(done['left_out'])}")
        page = save(result, folder, args.out)
    print(page.read_text())
    print(f"Written: {page.with_suffix('.json')}, {page}")
    print("Left out: " + ("; ".join(result["left_out"]) or "nothing"))


if __name__ == "__main__":
    main()
