"""Triton kernels of the estimator over an implicit convolution; `cuda.py` launches them.

`bucket` is the number of bits of the size that varies with the batch, so that not every batch size is tuned for anew.
`x0` ... `x3` are the strides of the input, `z0` ... `z3` those of everything shaped like the output, which has `whole`
elements. KH, SH, PH and DH are kernel, stride, padding and dilation along the height. Offsets are 64 bits wide.
`operator.py` describes what is computed, and the state.

The tiles are data, and RECIPROCAL says how 1 / u is computed, so that `scripts/gpu_check.py` can time what is not the
default: no tile, reciprocal or unrolling here was chosen by a measurement on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

Tile = tuple[int, ...]

# Rows, columns and warps of the tiles of products to try, and how often the loop is unrolled; from depthwise layers to
# wide ones. A thread holds two products at least, which the reciprocal in pairs needs.
TILES: list[Tile] = [
    (1, 64, 1, 1), (1, 256, 4, 1), (4, 64, 2, 1), (4, 256, 4, 1),
    (16, 64, 4, 1), (32, 64, 4, 1), (32, 128, 8, 1), (64, 64, 8, 1),
]  # fmt: skip
# The same for the gradient of the weight, whose tiles may also span several positions, the third number.
DEEP_TILES: list[Tile] = [(1, 16, 64, 4, 1), (1, 64, 16, 4, 1), (16, 16, 4, 4, 1), (16, 64, 1, 4, 1), (32, 64, 1, 8, 1)]

RECIPROCALS = ("divide", "approximate", "newton", "pairs")
"""How 1 / u can be computed: by Triton's division; by the special function unit, to one unit in the last place and
without denormal numbers; by that with a Newton step; or as v / (u v) and u / (u v), which takes one reciprocal for two
numbers, of which a multiprocessor computes 16 a clock and eight times as many multiply-adds."""

# Number of summands added up before they join the total, so that rounding errors do not grow with the depth.
STRETCH = tl.constexpr(64)


def _fitting(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """The tiles that the layer fills, or the largest of them if there is no GPU to time them on."""
    rows, columns = max(1, arguments["rows"]), max(64, 2 * arguments["columns"])
    fitting = [c for c in configs if c.kwargs["ROWS"] <= rows and c.kwargs["COLUMNS"] <= columns]
    return fitting if torch.cuda.is_available() else fitting[-1:]


def configs(tiles: Sequence[Tile]) -> list[triton.Config]:
    """Triton's form of tiles: rows, columns, perhaps positions, warps, and how often the loop is unrolled."""
    return [
        triton.Config(dict(zip(("ROWS", "COLUMNS", "DEEP"), sizes, strict=False)) | {"UNROLL": unroll}, num_warps=warps)
        for *sizes, warps, unroll in tiles
    ]


def use_tiles(kernel: Any, tiles: Sequence[Tile]) -> None:
    """Let one of the kernels choose among these tiles from now on."""
    kernel.configs = configs(tiles)
    kernel.cache.clear()


def _tuned(tiles: list[Tile]) -> Any:
    keys = ["rows", "bucket", "depth", "STEPS", "GENERAL", "KEEP", "RECIPROCAL"]
    return triton.autotune(configs(tiles), key=keys, prune_configs_by={"early_config_prune": _fitting})


# The interpreter has no assembly: there a division without its last 8 bits stands for the special function unit.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _approximate_reciprocal(u):
    if _INTERPRETED:
        return ((1.0 / u).to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _paired_reciprocal(u):
    """1 / u for two products of a thread at once: v / (u v) and u / (u v)."""
    if _INTERPRETED:
        return 1.0 / u
    return tl.inline_asm_elementwise(
        "{ .reg .f32 p; mul.ftz.f32 p, $2, $3; rcp.approx.ftz.f32 p, p; "
        "mul.ftz.f32 $0, p, $3; mul.ftz.f32 $1, p, $2; }",
        "=&f,=&f,f,f", [u], dtype=tl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _reciprocal(u, RECIPROCAL: tl.constexpr):
    """1 / u in one of the ways of RECIPROCALS."""
    if RECIPROCAL == "divide":
        return 1.0 / u
    if RECIPROCAL == "pairs":
        return _paired_reciprocal(u)
    r = _approximate_reciprocal(u)
    if RECIPROCAL == "newton":
        r = tl.fma(r, tl.fma(-u, r, 1.0), r)
    return r


@triton.jit
def weight_and_slope(t, eps, scale, shift, low, high, GENERAL: tl.constexpr, RECIPROCAL: tl.constexpr):
    """omega(t), and -omega'(t) sign(t), which is 0 where omega is clamped."""
    w = _reciprocal(tl.abs(t) + eps, RECIPROCAL)
    slope = w * w
    if GENERAL:
        slope *= scale
        w = w * scale - shift
        slope = tl.where((w > low) & (w < high), slope, 0.0)
        w = tl.where(w < low, low, w)  # a comparison with NaN is false, so NaN passes
        w = tl.where(w > high, high, w)
    return w, slope


@triton.jit
def with_sign(value, t):
    return tl.where(t > 0, value, tl.where(t < 0, -value, 0.0))


@triton.jit
def _place(index, height, width):
    """Image, row and column of an index that counts positions or pixels over all images."""
    rest = index // width
    return rest // height, rest % height, index % width


@triton.jit
def _block(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's block of columns and its group, both of 64 bits, and the first of its rows."""
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    block, rest = tl.program_id(0) % across, tl.program_id(0) // across
    return block.to(tl.int64), (rest // down).to(tl.int64), rest % down * ROWS


@triton.jit
def _keep_step(state, whole, valid, k, m, c, inverse, STEPS: tl.constexpr):
    """Keep what the backward pass needs of step k: the mean `m` and `inverse` = 1 / S. The factors of earlier steps are
    multiplied by `c`, the derivative of this step with respect to the mean before it."""
    tl.store(state + (k + 1) * whole, m, mask=valid)
    for earlier in range(k):
        r = state + (STEPS + 1 + earlier) * whole
        tl.store(r, tl.load(r, mask=valid) * c, mask=valid)
    tl.store(state + (STEPS + 1 + k) * whole, inverse, mask=valid)


@triton.jit
def slope_of_step(
    t, G, move, eps, scale, shift, low, high, GENERAL: tl.constexpr, RECIPROCAL: tl.constexpr
):  # fmt: skip
    """`G (omega(t) + (p - m_{k+1}) omega'(t))`, where `t = p - m_k` and `move = m_{k+1} - m_k`."""
    omega, slope = weight_and_slope(t, eps, scale, shift, low, high, GENERAL, RECIPROCAL)
    if GENERAL:
        return G * omega - slope * (G * tl.abs(t) - with_sign(G * move, t))
    return slope * (G * eps + with_sign(G * move, t))  # since omega - |t| omega^2 is eps omega^2


@triton.jit
def _mixed(plain, robust, share, SKIP: tl.constexpr):
    """`share * plain + (1 - share) * robust`; with SKIP, and at a share of 1, the plain sums bit for bit."""
    total = tl.fma(share.broadcast_to(plain.shape), plain - robust, robust)
    if SKIP:
        total = tl.where(share >= 1, plain, total)
    return total


@_tuned(TILES)
@triton.jit
def forward(
    x, weight, plain, lam, out, state, rows, columns, bucket, depth, channels, height, width, out_height, out_width,
    x0, x1, x2, x3, z0, z1, z2, z3, whole, eps, scale, shift, low, high,
    STEPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, GENERAL: tl.constexpr, KEEP: tl.constexpr,
    SKIP: tl.constexpr, RECIPROCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Mixed sums and the state, for `rows` outputs of a group and `columns` positions.

    With SKIP nothing is estimated where lambda is 1.
    """
    block, group, first_row = _block(rows, columns, ROWS, COLUMNS)
    whole = tl.cast(whole, tl.int64)
    o = first_row + tl.arange(0, ROWS)
    p = block * COLUMNS + tl.arange(0, COLUMNS)
    valid_o, valid_p = o < rows, p < columns
    valid = valid_o[:, None] & valid_p[None, :]
    image, row, column = _place(p, out_height, out_width)
    z = (group * rows + o)[:, None] * z1 + (image * z0 + row * z2 + column * z3)[None, :]
    top, left = row * SH - PH, column * SW - PW
    x += image * x0 + top * x2 + left * x3
    top, left = top.to(tl.int32), left.to(tl.int32)  # in an image 32 bits are enough
    weight += (group * rows + o) * depth
    start = tl.load(plain + z, mask=valid, other=0.0)
    share = tl.load(lam)
    steps = STEPS
    if SKIP:
        steps = tl.where(share >= 1, 0, STEPS)
    m = start / depth
    if KEEP:
        tl.store(state + z, m, mask=valid)
    zero = tl.zeros([ROWS, COLUMNS], tl.float32)
    chain = zero + 1.0
    for k in range(steps):
        S, T, A, B = zero, zero, zero, zero
        for first in range(0, depth, STRETCH):
            s, v = zero, zero
            for d in tl.range(first, tl.minimum(first + STRETCH, depth), loop_unroll_factor=UNROLL):
                i, j = d // KW % KH * DH, d % KW * DW
                inside = valid_p & (top + i >= 0) & (top + i < height) & (left + j >= 0) & (left + j < width)
                channel = group * channels + d // (KH * KW)  # 64 bits wide, as the group is
                value = tl.load(x + (channel * x1 + i * x2 + j * x3), mask=inside, other=0.0)
                a = tl.load(weight + d, mask=valid_o, other=0.0)
                t = tl.fma(a[:, None].broadcast_to(m.shape), value[None, :].broadcast_to(m.shape), -m)
                omega, slope = weight_and_slope(t, eps, scale, shift, low, high, GENERAL, RECIPROCAL)
                s += omega
                v = tl.fma(omega, t, v)
                if KEEP:
                    A += tl.abs(t) * slope
                    B += with_sign(slope, t)
            S += s
            T += v
        move = T / S
        m += move
        if KEEP:
            c = (A - move * B) / S
            _keep_step(state + z, whole, valid, k, m, c, 1.0 / S, STEPS)
            chain *= c
    tl.store(out + z, _mixed(start, m * depth, share, SKIP), mask=valid)
    if KEEP:
        tl.store(state + (2 * STEPS + 1) * whole + z, chain, mask=valid)


@_tuned(TILES)
@triton.jit
def backward_x(
    x, weight, lam, state, grad, grad_x, rows, columns, bucket, depth, outputs, height, width, out_height, out_width,
    x0, x1, x2, x3, z0, z1, z2, z3, whole, eps, scale, shift, low, high,
    STEPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, GENERAL: tl.constexpr, KEEP: tl.constexpr,
    SKIP: tl.constexpr, RECIPROCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradient of the input through the estimate's steps, for `rows` channels of a group and `columns` pixels."""
    block, group, first_row = _block(rows, columns, ROWS, COLUMNS)
    whole = tl.cast(whole, tl.int64)
    c = first_row + tl.arange(0, ROWS)
    q = block * COLUMNS + tl.arange(0, COLUMNS)
    valid_c, valid_q = c < rows, q < columns
    valid = valid_c[:, None] & valid_q[None, :]
    image, row, column = _place(q, height, width)
    place = (group * rows + c)[:, None] * x1 + (image * x0 + row * x2 + column * x3)[None, :]
    value = tl.load(x + place, mask=valid, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = outputs * KH * KW
    robust = 1 - tl.load(lam)
    if SKIP:
        sums = tl.where(robust <= 0, 0, sums)
    for n in tl.range(0, sums, loop_unroll_factor=UNROLL):
        tap = n % (KH * KW)
        channel = group * outputs + n // (KH * KW)
        h, w = row + PH - tap // KW * DH, column + PW - tap % KW * DW
        inside = valid_q & (h >= 0) & (w >= 0) & (h % SH == 0) & (w % SW == 0)
        inside &= (h // SH < out_height) & (w // SW < out_width)
        z = channel * z1 + image * z0 + h // SH * z2 + w // SW * z3
        a = tl.load(weight + channel * depth + c * (KH * KW) + tap, mask=valid_c, other=0.0)
        g = tl.load(grad + z, mask=inside, other=0.0) * (robust * depth)
        m = tl.load(state + z, mask=inside, other=0.0)
        share = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.static_range(STEPS):
            end = tl.load(state + (k + 1) * whole + z, mask=inside, other=0.0)
            G = g * tl.load(state + (STEPS + 1 + k) * whole + z, mask=inside, other=0.0)
            t = tl.fma(a[:, None].broadcast_to(value.shape), value, -m[None, :].broadcast_to(value.shape))
            share += slope_of_step(t, G[None, :], (end - m)[None, :], eps, scale, shift, low, high, GENERAL, RECIPROCAL)
            m = end
        total += tl.where(inside[None, :], share * a[:, None], 0.0)
    tl.store(grad_x + place, total, mask=valid)


@_tuned(DEEP_TILES)
@triton.jit
def backward_weight(
    x, weight, lam, state, grad, grad_weight, rows, columns, bucket, depth, channels, height, width, out_height,
    out_width, x0, x1, x2, x3, z0, z1, z2, z3, whole, weights, positions, length,
    eps, scale, shift, low, high,
    STEPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, GENERAL: tl.constexpr, KEEP: tl.constexpr,
    SKIP: tl.constexpr, RECIPROCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEEP: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Gradient of the weight through the estimate's steps, for `rows` outputs of a group and `columns` summands, over
    `length` of the `positions`, DEEP at a time."""
    block, group, first_row = _block(rows, columns, ROWS, COLUMNS)
    whole = tl.cast(whole, tl.int64)
    o = first_row + tl.arange(0, ROWS)
    d = block * COLUMNS + tl.arange(0, COLUMNS)
    valid_o, valid_d = o < rows, d < columns
    valid = valid_o[:, None] & valid_d[None, :]
    place = (group * rows + o)[:, None] * depth + d[None, :]
    a = tl.load(weight + place, mask=valid, other=0.0)
    i, j = d // KW % KH * DH - PH, d % KW * DW - PW
    x += (group * channels + d // (KH * KW)) * x1 + i * x2 + j * x3
    first = tl.program_id(1).to(tl.int64) * length
    stop = tl.minimum(first + length, positions)
    total = tl.zeros([ROWS, COLUMNS, DEEP], tl.float32)
    sums = tl.cdiv(length, DEEP)
    robust = 1 - tl.load(lam)
    if SKIP:
        sums = tl.where(robust <= 0, 0, sums)
    for n in tl.range(0, sums, loop_unroll_factor=UNROLL):
        p = first + n * DEEP + tl.arange(0, DEEP)
        valid_p = p < stop
        image, row, column = _place(p, out_height, out_width)
        h, w = i[:, None] + (row * SH)[None, :], j[:, None] + (column * SW)[None, :]
        inside = valid_d[:, None] & valid_p[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        value = tl.load(
            x[:, None] + (image * x0 + row * SH * x2 + column * SW * x3)[None, :], mask=inside, other=0.0
        )  # [COLUMNS, DEEP]
        z = (group * rows + o)[:, None] * z1 + (image * z0 + row * z2 + column * z3)[None, :]
        kept = valid_o[:, None] & valid_p[None, :]  # [ROWS, DEEP]
        g = tl.load(grad + z, mask=kept, other=0.0) * (robust * depth)
        m = tl.load(state + z, mask=kept, other=0.0)
        share = tl.zeros([ROWS, COLUMNS, DEEP], tl.float32)
        for k in tl.static_range(STEPS):
            end = tl.load(state + (k + 1) * whole + z, mask=kept, other=0.0)
            G = g * tl.load(state + (STEPS + 1 + k) * whole + z, mask=kept, other=0.0)
            t = tl.fma(
                a[:, :, None].broadcast_to(total.shape),
                value[None, :, :].broadcast_to(total.shape),
                -m[:, None, :].broadcast_to(total.shape),
            )
            move = (end - m)[:, None, :]
            share += slope_of_step(t, G[:, None, :], move, eps, scale, shift, low, high, GENERAL, RECIPROCAL)
            m = end
        total += tl.where(valid_p[None, None, :], share * value[None, :, :], 0.0)
    grad_weight += tl.program_id(1).to(tl.int64) * weights
    tl.store(grad_weight + place, tl.sum(total, 2), mask=valid)
