"""The op `gated_residual` in Triton, with its gradients.

x' = x + gate * y (+ addend) gives dx = daddend = dx', dy = gate * dx' and dgate = sum(dx' * y) over
the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import (
    backward_rows,
    check_rows,
    column_sum,
    forward_rows,
    launch_rows,
    load_row,
    row_vectors,
    store_row,
)

WARP_WIDTH = 512


@triton.jit
def gated_residual_forward_kernel(
    x_ptr, y_ptr, gate_ptr, addend_ptr, total_ptr, gate_stride, L, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of one sample; the addend may be missing."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    gate = load_row(gate_ptr + batch * gate_stride, columns, D, BLOCK_D)
    first = tl.program_id(0) * rows
    for index in tl.range(first, tl.minimum(first + rows, L), num_stages=STAGES):
        start = (batch * L + index) * D
        total = load_row(x_ptr + start, columns, D, BLOCK_D)
        total += gate * load_row(y_ptr + start, columns, D, BLOCK_D)
        if addend_ptr is not None:
            total += load_row(addend_ptr + start, columns, D, BLOCK_D)
        store_row(total_ptr + start, columns, total, D, BLOCK_D)


@triton.jit
def gated_residual_backward_kernel(
    dtotal_ptr, y_ptr, gate_ptr, dy_ptr, parts_ptr, gate_stride, L, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of one sample: dy and a partial sum of dgate; parts is [B, P, D]."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    gate = load_row(gate_ptr + batch * gate_stride, columns, D, BLOCK_D)
    gate_sum = tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0) * rows
    for index in tl.range(first, tl.minimum(first + rows, L), num_stages=STAGES):
        start = (batch * L + index) * D
        dtotal = load_row(dtotal_ptr + start, columns, D, BLOCK_D)
        gate_sum += dtotal * load_row(y_ptr + start, columns, D, BLOCK_D)
        store_row(dy_ptr + start, columns, dtotal * gate, D, BLOCK_D)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    store_row(parts_ptr + part * D, columns, gate_sum, D, BLOCK_D)


@torch.library.custom_op("transfer1::gated_residual", mutates_args=())
def _gated_residual(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, addend_BLD: Tensor | None
) -> Tensor:
    x_BLD, y_BLD, gate_BD = x_BLD.contiguous(), y_BLD.contiguous(), row_vectors(gate_BD)
    total_BLD = torch.empty_like(x_BLD)
    launch_rows(
        gated_residual_forward_kernel,
        x_BLD,
        forward_rows(x_BLD.shape[1]),
        {
            "x_ptr": x_BLD,
            "y_ptr": y_BLD,
            "gate_ptr": gate_BD,
            "addend_ptr": None if addend_BLD is None else addend_BLD.contiguous(),
            "total_ptr": total_BLD,
            "gate_stride": gate_BD.stride(0),
        },
        warp_width=WARP_WIDTH,
    )
    return total_BLD


@torch.library.custom_op("transfer1::gated_residual_backward", mutates_args=())
def _gated_residual_backward(
    dtotal_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """dy and dgate."""
    dtotal_BLD, y_BLD = dtotal_BLD.contiguous(), y_BLD.contiguous()
    gate_BD = row_vectors(gate_BD)
    B, L, D = y_BLD.shape
    rows = backward_rows(L)
    dy_BLD = torch.empty_like(y_BLD)
    parts = y_BLD.new_empty(B, triton.cdiv(L, rows), D, dtype=torch.float32)
    launch_rows(
        gated_residual_backward_kernel,
        y_BLD,
        rows,
        {
            "dtotal_ptr": dtotal_BLD,
            "y_ptr": y_BLD,
            "gate_ptr": gate_BD,
            "dy_ptr": dy_BLD,
            "parts_ptr": parts,
            "gate_stride": gate_BD.stride(0),
        },
        warp_width=WARP_WIDTH,
    )
    return dy_BLD, column_sum(parts, gate_BD.dtype)


@_gated_residual.register_fake
def _(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, addend_BLD: Tensor | None) -> Tensor:
    return x_BLD.new_empty(x_BLD.shape)


@_gated_residual_backward.register_fake
def _(dtotal_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
    return y_BLD.new_empty(y_BLD.shape), gate_BD.new_empty(gate_BD.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y_BLD, gate_BD, addend_BLD = inputs
    ctx.save_for_backward(y_BLD, gate_BD)
    ctx.addend_dtype = None if addend_BLD is None else addend_BLD.dtype


def _gradients(ctx: Any, dtotal_BLD: Tensor) -> tuple[Tensor | None, ...]:
    dy_BLD, dgate_BD = _gated_residual_backward(dtotal_BLD, *ctx.saved_tensors)
    daddend = None if ctx.addend_dtype is None else dtotal_BLD.to(ctx.addend_dtype)
    return dtotal_BLD, dy_BLD, dgate_BD, daddend


_gated_residual.register_autograd(_gradients, setup_context=_save)


def gated_residual(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, addend_BLD: Tensor | None = None
) -> Tensor:
    """As `reference.gated_residual`, in one launch, and two of the gradients."""
    check_rows(
        "gated_residual",
        x_BLD,
        y_BLD=(y_BLD, "BLD"),
        gate_BD=(gate_BD, "BD"),
        addend_BLD=(addend_BLD, "BLD"),
    )
    return _gated_residual(x_BLD, y_BLD, gate_BD, addend_BLD)
