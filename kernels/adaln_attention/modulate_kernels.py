"""Residual, LayerNorm and modulation in one pass over the tokens, forward and backward.

With x' = x + gate * y as it is stored (or x + position, or x itself) and, per token,

    n = (x' - mean) * rstd,    h = n * (1 + scale) + shift,

the gradients of h and of x' itself give, with w = dh * (1 + scale) and means over the width,

    dx = rstd * (w - mean(w) - n * mean(w * n)) + dx',    dy = gate * dx,
    dshift = sum(dh),    dscale = sum(dh * n),    dgate = sum(dx * y)    over the tokens

(Ba et al., Layer Normalization, 2016; Peebles and Xie, Scalable Diffusion Models with Transformers,
2023). Kept for the backward pass: x', mean and rstd; n is made again from them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import target_of
from .rows import (
    WIDE,
    backward_rows,
    column_sum,
    forward_rows,
    launch_rows,
    load_row,
    row_vectors,
    store_row,
)

FORWARD_REGISTERS = 80  # per lane: three programs of 8 warps share a multiprocessor
BACKWARD_REGISTERS = 104  # without a limit, prefetching takes all 128 that 16 warps may have


@triton.jit
def modulate_forward_kernel(
    x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, total_ptr, h_ptr, mean_ptr, rstd_ptr,
    gate_stride, shift_stride, scale_stride, L, y_L, rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of one sample. Without y, x' is x; without a gate, the gate is 1.

    y has `y_L` rows per sample: L, or 0 where all samples share them.
    """
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    shift = load_row(shift_ptr + batch * shift_stride, columns, D, BLOCK_D)
    scale = load_row(scale_ptr + batch * scale_stride, columns, D, BLOCK_D) + 1.0
    if gate_ptr is not None:
        gate = load_row(gate_ptr + batch * gate_stride, columns, D, BLOCK_D)

    first = tl.program_id(0) * rows
    for index in tl.range(first, tl.minimum(first + rows, L), num_stages=STAGES):
        row = batch * L + index
        x = load_row(x_ptr + row * D, columns, D, BLOCK_D)
        if y_ptr is not None:
            y = load_row(y_ptr + (batch * y_L + index) * D, columns, D, BLOCK_D)
            if gate_ptr is not None:
                y *= gate
            stored = (x + y).to(total_ptr.dtype.element_ty)
            store_row(total_ptr + row * D, columns, stored, D, BLOCK_D)
            x = stored.to(tl.float32)
        mean = tl.sum(x) * (1.0 / D)
        centred = x - mean
        if D != BLOCK_D:
            centred = tl.where(columns < D, centred, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred) * (1.0 / D) + eps)
        store_row(h_ptr + row * D, columns, centred * rstd * scale + shift, D, BLOCK_D)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def modulate_backward_kernel(
    dh_ptr, dtotal_ptr, total_ptr, mean_ptr, rstd_ptr, scale_ptr, y_ptr, gate_ptr,
    dx_ptr, dy_ptr, parts_ptr,
    gate_stride, scale_stride, L, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Some rows of one sample: dx, dy and partial sums [2 or 3, B, P, D] of the vectors' gradients.

    Without y there is no dy and no gate; dtotal, the gradient of x' itself, may be missing too.
    With RELOAD scale and gate come from the cache for every row: beside the sums, wide rows leave
    no registers for them.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    scale_ptr += batch * scale_stride
    if not RELOAD:
        scale = load_row(scale_ptr, columns, D, BLOCK_D) + 1.0
    shift_sum = tl.zeros([BLOCK_D], tl.float32)
    scale_sum = tl.zeros([BLOCK_D], tl.float32)
    if y_ptr is not None:
        gate_ptr += batch * gate_stride
        if not RELOAD:
            gate = load_row(gate_ptr, columns, D, BLOCK_D)
        gate_sum = tl.zeros([BLOCK_D], tl.float32)

    first = program * rows
    for index in tl.range(first, tl.minimum(first + rows, L), num_stages=STAGES):
        row = batch * L + index
        rstd = tl.load(rstd_ptr + row)
        x = load_row(total_ptr + row * D, columns, D, BLOCK_D)
        normed = (x - tl.load(mean_ptr + row)) * rstd
        dh = load_row(dh_ptr + row * D, columns, D, BLOCK_D)
        shift_sum += dh
        scale_sum += dh * normed
        if RELOAD:
            scale = load_row(scale_ptr, columns, D, BLOCK_D) + 1.0
        dnormed = dh * scale
        mean = tl.sum(dnormed) * (1.0 / D)
        slope = tl.sum(dnormed * normed) * (1.0 / D)
        dx = dnormed * rstd - (normed * (slope * rstd) + mean * rstd)
        if dtotal_ptr is not None:
            dx += load_row(dtotal_ptr + row * D, columns, D, BLOCK_D)
        store_row(dx_ptr + row * D, columns, dx, D, BLOCK_D)
        if y_ptr is not None:
            gate_sum += dx * load_row(y_ptr + row * D, columns, D, BLOCK_D)
            if RELOAD:
                gate = load_row(gate_ptr, columns, D, BLOCK_D)
            store_row(dy_ptr + row * D, columns, dx * gate, D, BLOCK_D)

    samples = tl.num_programs(1)
    part = batch * tl.num_programs(0) + program
    stride = samples * tl.num_programs(0)
    store_row(parts_ptr + part * D, columns, shift_sum, D, BLOCK_D)
    store_row(parts_ptr + (part + stride) * D, columns, scale_sum, D, BLOCK_D)
    if y_ptr is not None:
        store_row(parts_ptr + (part + 2 * stride) * D, columns, gate_sum, D, BLOCK_D)


def modulate_forward(
    x_BLD: Tensor,
    y: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' (empty without y), h, and float32 mean and rstd [B, L]; y is [B, L, D] or [L, D]."""
    x_BLD = x_BLD.contiguous()
    y = None if y is None else y.contiguous()
    gate_BD = None if gate_BD is None else row_vectors(gate_BD)
    shift_BD, scale_BD = row_vectors(shift_BD), row_vectors(scale_BD)
    L = x_BLD.shape[1]
    total = torch.empty_like(x_BLD) if y is not None else x_BLD.new_empty(0)
    h_BLD = torch.empty_like(x_BLD)
    mean_BL = x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32)
    rstd_BL = torch.empty_like(mean_BL)
    launch_rows(
        modulate_forward_kernel,
        x_BLD,
        forward_rows(L),
        {
            "x_ptr": x_BLD,
            "y_ptr": y,
            "gate_ptr": gate_BD,
            "shift_ptr": shift_BD,
            "scale_ptr": scale_BD,
            "total_ptr": total,
            "h_ptr": h_BLD,
            "mean_ptr": mean_BL,
            "rstd_ptr": rstd_BL,
            "gate_stride": 0 if gate_BD is None else gate_BD.stride(0),
            "shift_stride": shift_BD.stride(0),
            "scale_stride": scale_BD.stride(0),
            "y_L": L if y is not None and y.dim() == 3 else 0,
            "eps": eps,
        },
        warp_width=512 if x_BLD.shape[2] <= WIDE else 256,
        max_registers=FORWARD_REGISTERS if x_BLD.itemsize == 2 else None,
    )
    return total, h_BLD, mean_BL, rstd_BL


def modulate_backward(
    dh_BLD: Tensor,
    dtotal_BLD: Tensor | None,
    total_BLD: Tensor,
    mean_BL: Tensor,
    rstd_BL: Tensor,
    scale_BD: Tensor,
    y_BLD: Tensor | None,
    gate_BD: Tensor | None,
    vector_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy (empty without y) and [2 or 3, B, D] of dshift, dscale, dgate in `vector_dtype`."""
    dh_BLD, total_BLD = dh_BLD.contiguous(), total_BLD.contiguous()
    dtotal_BLD = None if dtotal_BLD is None else dtotal_BLD.contiguous()
    y_BLD = None if y_BLD is None else y_BLD.contiguous()
    gate_BD = None if gate_BD is None else row_vectors(gate_BD)
    scale_BD = row_vectors(scale_BD)
    B, L, D = total_BLD.shape
    wide_float32 = D > WIDE and total_BLD.dtype == torch.float32
    if wide_float32:  # vectors of 16 bits would lie in other lanes than the rows
        scale_BD = scale_BD.float()
        gate_BD = None if gate_BD is None else gate_BD.float()
    # Found by compiling: such rows leave registers enough if the next one lies in shared memory.
    target = target_of(total_BLD.device)
    ahead = wide_float32 and D % 4 == 0 and target.startswith(("sm_9", "sm_10"))
    rows = backward_rows(L)
    dx_BLD = torch.empty_like(total_BLD)
    dy = torch.empty_like(y_BLD) if y_BLD is not None else total_BLD.new_empty(0)
    parts = mean_BL.new_empty(2 if y_BLD is None else 3, B, triton.cdiv(L, rows), D)
    launch_rows(
        modulate_backward_kernel,
        total_BLD,
        rows,
        {
            "dh_ptr": dh_BLD,
            "dtotal_ptr": dtotal_BLD,
            "total_ptr": total_BLD,
            "mean_ptr": mean_BL,
            "rstd_ptr": rstd_BL,
            "scale_ptr": scale_BD,
            "y_ptr": y_BLD,
            "gate_ptr": gate_BD,
            "dx_ptr": dx_BLD,
            "dy_ptr": dy,
            "parts_ptr": parts,
            "gate_stride": 0 if gate_BD is None else gate_BD.stride(0),
            "scale_stride": scale_BD.stride(0),
            "RELOAD": D > WIDE,
        },
        warp_width=512 if ahead else 256,
        ahead=ahead,
        max_registers=BACKWARD_REGISTERS,
    )
    return dx_BLD, dy, column_sum(parts, vector_dtype)
