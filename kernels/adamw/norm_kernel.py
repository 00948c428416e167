"""The gradient norm in two stages: a partial sum per chunk, then their sum in a fixed order.

No atomics, so the result is the same bits every time and for every order of the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch
from kernels.multi_tensor import DenseRows, tables_of
from kernels.table_launch import CHUNK, TYPES, find_chunk, launch_table, load_pointer

from .reference import check_grad_norm

BLOCK = 2048  # 8 per lane: one 128-bit access in bfloat16
SUM_BLOCK = 1024


@triton.jit
def grad_norm_kernel(
    addresses, sizes, chunks, partials,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of squares of one chunk, float32, to the place of this program in `partials`."""
    row, first, remaining = find_chunk(sizes, chunks, CHUNK)
    grad_ptr = load_pointer(addresses + row, first, GRAD, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if remaining >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            grad = tl.load(grad_ptr + start + lanes).to(tl.float32)
            total += grad * grad
    else:
        count = remaining.to(tl.int32)
        for start in range(0, count, BLOCK):
            offsets = start + lanes
            grad = tl.load(grad_ptr + offsets, mask=offsets < count, other=0.0).to(tl.float32)
            total += grad * grad
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit
def finalize_norm_kernel(partials, norm, count, BLOCK: tl.constexpr):
    """The root of the sum of `count` partial sums, added up in float64; one program."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        offsets = start + lanes
        total += tl.load(partials + offsets, mask=offsets < count, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(total)).to(tl.float32))


@torch.no_grad()
def grad_norm(grads: list[Tensor]) -> Tensor:
    """As `reference.grad_norm`; squares are added up in float32 within 65,536 elements."""
    check_grad_norm(grads)
    return norm_op(grads) if grads else torch.zeros(())


@torch.library.custom_op("transfer1::grad_norm", mutates_args=())
def norm_op(grads: list[Tensor]) -> Tensor:
    """The launches, as one op to whatever traces or captures a program."""
    device = grads[0].device
    tables = tables_of(DenseRows((grads,), written=(False,)).rows, CHUNK)
    count = sum(len(table.chunks) for table in tables)
    partials = torch.empty(count, dtype=torch.float32, device=device)
    start = 0
    for table in tables:
        arguments: dict[str, Any] = {"partials": partials[start:], "GRAD": TYPES[table.dtypes[0]]}
        launch_table(grad_norm_kernel, table, arguments, BLOCK)
        start += len(table.chunks)
    norm = torch.zeros(1, dtype=torch.float32, device=device)
    launch(
        finalize_norm_kernel,
        (1,),
        {"partials": partials, "norm": norm, "count": count, "BLOCK": SUM_BLOCK},
        device=device,
        num_warps=8,
    )
    return norm.reshape(())


@norm_op.register_fake
def _(grads: list[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=grads[0].device)
