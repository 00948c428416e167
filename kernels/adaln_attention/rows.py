"""What the kernels over rows of tokens share: checks, the split into programs, sums over tokens.

A program owns consecutive rows of one sample and walks through them, so that it reads the vectors
of its sample (shift, scale, gate) once. Gradients of those vectors are sums over tokens, made in
two stages whose order depends on the shape alone: every program writes a float32 partial sum of its
rows, then `column_sum` adds these up. No atomics: the result is the same bits every time, on every
GPU and for every order of the programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import is_amd, launch, target_of
from kernels.registry import FLOATS

WIDE = 4096  # elements of a row from which on the registers of 16 warps are too few
MAX_WIDTH = 8192  # a row is held in the registers of one program
FORWARD_ROWS = 64  # reads of shift, scale, gate are then below 1/20 of all bytes
BACKWARD_ROWS = 8  # at least: partial sums of fewer rows would cost more than they save
PROGRAMS = 256  # per sample at most; a constant, so that sums are alike on all GPUs
SUM_TILE = 2048  # elements: 16 per lane of 4 warps


def check_rows(op: str, x_BLD: Tensor, **others: tuple[Tensor | None, str]) -> None:
    """Check the tensors of a row op; `others` maps a name to the tensor and its shape's letters.

    Raises:
        ValueError: a shape, dtype or device that the kernels do not take.
    """
    instead = f"set kernels.{op}=reference to run it in PyTorch"
    if x_BLD.dim() != 3 or not 1 <= x_BLD.shape[2] <= MAX_WIDTH:
        raise ValueError(
            f"{op}: x_BLD has shape {tuple(x_BLD.shape)}, but must be [B, L, D] with D from 1 to "
            f"{MAX_WIDTH}; {instead}"
        )
    sizes = dict(zip("BLD", x_BLD.shape, strict=True))
    for name, (tensor, letters) in {"x_BLD": (x_BLD, "BLD"), **others}.items():
        if tensor is None:
            continue
        allowed = [tuple(sizes[letter] for letter in shape) for shape in letters.split("|")]
        if tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, but beside x_BLD of shape "
                f"{tuple(x_BLD.shape)} it must be {' or '.join(map(str, allowed))}; {instead}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype}, but must be one of "
                f"{', '.join(map(str, FLOATS))}; {instead}"
            )
        if tensor.device != x_BLD.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but x_BLD is on {x_BLD.device}")


def row_vectors(vector_BD: Tensor) -> Tensor:
    """The same vectors with neighbouring columns; rows keep whatever stride they have."""
    return vector_BD if vector_BD.stride(1) == 1 else vector_BD.contiguous()


def forward_rows(L: int) -> int:
    """Rows per program of a forward pass."""
    return max(1, min(FORWARD_ROWS, triton.cdiv(L, PROGRAMS)))


def backward_rows(L: int) -> int:
    """Rows per program of a backward pass, which writes a partial sum per program."""
    return max(BACKWARD_ROWS, triton.cdiv(L, PROGRAMS))


def launch_rows(
    kernel: Any,
    x_BLD: Tensor,
    rows: int,
    arguments: Mapping[str, Any],
    *,
    warp_width: int,
    max_registers: int | None = None,
    ahead: bool = False,
) -> None:
    """Launch a kernel over blocks of `rows` rows of every sample.

    On NVIDIA GPUs the next row is copied to shared memory while the present one is worked on, but
    not where rows are wide: then it would take more shared memory than some have.

    Args:
        kernel: takes L, rows, D, BLOCK_D, STAGES and further arguments.
        x_BLD: a tensor of the shape and on the device of the tokens.
        rows: per program.
        arguments: the further arguments.
        warp_width: elements of a row per warp; 512 at least where a warp has 64 lanes.
        max_registers: see `launch`; wider rows than 4096 and rows with a mask need more.
        ahead: copy the next row ahead though rows are wide.
    """
    B, L, D = x_BLD.shape
    amd = is_amd(target_of(x_BLD.device))
    block = triton.next_power_of_2(D)
    most = 16 if amd else 32
    warps = min(max(block // (max(warp_width, 512) if amd else warp_width), 1), most)
    most_registers = min(255, 2048 // warps)  # as many as there are: without a word, ptxas spills
    if max_registers and D == block <= WIDE:
        most_registers = max_registers
    launch(
        kernel,
        (triton.cdiv(L, rows), B),
        {
            **arguments,
            "L": L,
            "rows": rows,
            "D": D,
            "BLOCK_D": block,
            "STAGES": 2 if (ahead or D <= WIDE) and not amd else 1,
        },
        device=x_BLD.device,
        num_warps=warps,
        max_registers=most_registers,
    )


@triton.jit
def load_row(pointer, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row as float32, 0 beyond its end."""
    if D == BLOCK_D:
        row = tl.load(pointer + columns)
    else:
        row = tl.load(pointer + columns, mask=columns < D, other=0.0)
    return row.to(tl.float32)


@triton.jit
def store_row(pointer, columns, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Round a row to the dtype of the pointer and store it."""
    row = row.to(pointer.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(pointer + columns, row)
    else:
        tl.store(pointer + columns, row, mask=columns < D)


@triton.jit
def column_sum_kernel(
    parts_ptr, sums_ptr, count, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of columns of sums[n] = parts[n].sum(0); parts is [N, count, width]."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < width
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, count, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        offsets = (batch * count + rows)[:, None] * width + columns[None, :]
        mask = (rows < count)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    column = tl.sum(total, 0)
    tl.store(sums_ptr + batch * width + columns, column.to(sums_ptr.dtype.element_ty), mask=inside)


def column_sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the second to last axis, contiguous [..., P, width] -> [..., width], in float32."""
    *batch, count, width = parts.shape
    sums = torch.empty(*batch, width, dtype=dtype, device=parts.device)
    block_rows = min(triton.next_power_of_2(max(count, 1)), 32)
    block_columns = SUM_TILE // block_rows
    launch(
        column_sum_kernel,
        (triton.cdiv(width, block_columns), sums.numel() // max(width, 1)),
        {
            "parts_ptr": parts,
            "sums_ptr": sums,
            "count": count,
            "width": width,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
        },
        device=parts.device,
        num_warps=4,
    )
    return sums
