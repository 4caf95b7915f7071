"""How many instructions the kernels issue for each product and step: Triton's machine code, counted without a GPU.

A multiprocessor issues four instructions a clock, each for 32 numbers. A step needs five: two multiply-adds, two
additions and the reciprocal; what is above that are loads, addresses and masks.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from gpu.layers import K
from gpu.session import Session
from timm_nrpm.nn.kernels.cuda_kernels import Tile

# Kernel, whether it keeps a state, way to divide, tile; the first is the default.
VARIANTS: list[tuple[str, bool, str, Tile]] = [
    ("forward", False, "divide", (32, 128, 8, 1)),
    ("forward", False, "approximate", (32, 128, 8, 1)),
    ("forward", False, "approximate", (32, 128, 8, 4)),
    ("forward", False, "approximate", (64, 64, 4, 4)),
    ("forward", False, "pairs", (64, 64, 4, 4)),
    ("forward", True, "divide", (32, 128, 8, 1)),
    ("forward", True, "approximate", (32, 128, 8, 4)),
    ("backward_x", True, "divide", (32, 128, 8, 1)),
    ("backward_x", True, "approximate", (32, 128, 8, 1)),
    ("backward_x", True, "approximate", (32, 64, 4, 4)),
    ("backward_weight", True, "divide", (32, 64, 1, 8, 1)),
    ("backward_weight", True, "approximate", (32, 64, 1, 8, 1)),
]
CONSTANTS = {"STEPS": K, "KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1, "GENERAL": False}
FLAGS = {"SKIP": True}
POINTERS = {"x", "weight", "plain", "lam", "out", "state", "grad", "grad_x", "grad_weight"}
NUMBERS = {"eps", "scale", "shift", "low", "high"}


def instructions(session: Session) -> None:
    """Add a row for each variant, for a 3x3 convolution."""
    architecture = 90
    if session.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    for kernel, keep, reciprocal, tile in VARIANTS[: 2 if session.quick else None]:
        with session.attempt(f"instructions of {kernel}, {reciprocal}, {tile}"):
            session.need(3)
            body = steady_loop(machine_code(kernel, keep, reciprocal, tile, architecture))
            steps = body["MUFU"] * (2 if reciprocal == "pairs" else 1)
            session.add("instructions", **{
                "kernel": kernel, "with a state": keep, "1 / u": reciprocal, "tile": str(tile),
                "instructions a step": body.total() / steps, "loads": body["LDG"] / steps,
                "reciprocals": body["MUFU"] / steps, "sm": architecture,
            })  # fmt: skip


def machine_code(kernel: str, keep: bool, reciprocal: str, tile: Tile, architecture: int) -> str:
    """The assembly of a kernel in one variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timm_nrpm.nn.kernels import cuda_kernels

    function, config = getattr(cuda_kernels, kernel).fn, cuda_kernels.configs([tile])[0]
    names = function.arg_names
    fixed: dict[str, Any] = {**CONSTANTS, **FLAGS, "KEEP": keep, "RECIPROCAL": reciprocal, **config.kwargs}
    fixed = {name: value for name, value in fixed.items() if name in names}
    kinds = {name: "*fp32" if name in POINTERS else "fp32" if name in NUMBERS else "i32" for name in names}
    source = ASTSource(
        function,
        kinds | dict.fromkeys(fixed, "constexpr"),
        {(names.index(name),): value for name, value in fixed.items()},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": config.num_warps}
    )
    return str(compiled.asm["sass"])


def steady_loop(assembly: str) -> Counter[str]:
    """The instructions by name of the innermost loop that issues the fewest for each reciprocal: not an epilogue."""
    places: dict[str, int] = {}
    names: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\w+):$", line.strip()):
            places[label[1]] = len(names)
        elif found := re.search(r"\s(?:@!?U?P\w+ )?([A-Z][A-Z0-9]+)[. ;]", line):
            names.append(found[1])
            target = re.search(r"BRA\S* .*?(\w+);", line)
            if found[1] == "BRA" and target and target[1] in places:
                loops.append((places[target[1]], len(names)))
    innermost = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    bodies = [Counter(names[start:stop]) for start, stop in innermost]
    return min((body for body in bodies if body["MUFU"]), key=lambda body: body.total() / body["MUFU"])
