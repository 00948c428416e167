"""Tiles of one head in memory: rows of tokens, columns of the head, zero outside both.

A tile moves through a tensor descriptor (the copy engine of sm_90 and newer, which fills with zeros
by itself) or through pointers. Heads of 96 lie in tiles 128 wide.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .flash_configs import Config

LOG2_E = 1.4426950408889634


@triton.jit
def describe(
    pointer, stride, length,
    K: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Where `load_tile` and `store_tile` find the rows that start at `pointer`, `stride` apart."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(pointer, [length, K], [stride, 1], [BLOCK, WIDTH])
    else:
        return pointer


@triton.jit
def tile_pointers(pointer, first, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to BLOCK rows from `first` on; in int64, as tensors may exceed 2^31 elements."""
    rows = tl.arange(0, BLOCK).to(tl.int64)
    stride = tl.cast(stride, tl.int64)
    return pointer + first * stride + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def tile_mask(first, length, K: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """What of a tile lies inside the tensor."""
    mask = (first + tl.arange(0, BLOCK) < length)[:, None]
    if WIDTH != K:
        mask = mask & (tl.arange(0, WIDTH) < K)[None, :]
    return mask


@triton.jit
def load_tile(
    source, first, stride, length,
    K: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK, WIDTH] from row `first` on."""
    if DESCRIPTORS:
        return source.load([first, 0])
    else:
        pointers = tile_pointers(source, first, stride, BLOCK, WIDTH)
        return tl.load(pointers, mask=tile_mask(first, length, K, BLOCK, WIDTH), other=0.0)


@triton.jit
def store_tile(
    pointer, first, stride, length, value,
    K: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Round `value` [BLOCK, WIDTH] to the tensor's dtype and write what lies inside it."""
    pointers = tile_pointers(pointer, first, stride, BLOCK, WIDTH)
    mask = tile_mask(first, length, K, BLOCK, WIDTH)
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def without_absent(values, first, length, BLOCK: tl.constexpr, other: tl.constexpr):
    """`values` [rows, BLOCK] with `other` in the columns of keys that are not there."""
    return tl.where((first + tl.arange(0, BLOCK) < length)[None, :], values, other)


def usable(x_BLNK: Tensor) -> Tensor:
    """The tensor itself where kernels can read it as it lies, else a contiguous copy.

    The copy engine wants the last axis dense and every row to start at a multiple of 16 bytes.
    """
    steps = [stride * x_BLNK.element_size() for stride in x_BLNK.stride()[:-1]]
    aligned = all(step > 0 and step % 16 == 0 for step in (*steps, x_BLNK.data_ptr() or 16))
    if x_BLNK.stride(-1) == 1 and aligned:
        return x_BLNK
    return x_BLNK.clone(memory_format=torch.contiguous_format)


def strides_of(name: str, x_BLNK: Tensor) -> dict[str, int]:
    """Kernel arguments: steps in elements between samples, rows and heads of one tensor."""
    batch, row, head, _ = x_BLNK.stride()
    return {f"{name}_batch": batch, f"{name}_row": row, f"{name}_head": head}


def launch_tiles(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    config: Config,
    device: torch.device,
) -> None:
    """Launch a kernel in tiles of `config`; its tensor descriptors need memory on the device."""
    if device.type == "cuda":
        # At each launch: Triton remembers it per thread, and backward passes run in their own.
        triton.set_allocator(allocate_scratch)
    launch(
        kernel,
        grid,
        {
            **arguments,
            "BLOCK_L": config.block_l,
            "BLOCK_M": config.block_m,
            "STAGES": config.num_stages,
        },
        device=device,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
        fused_multiply_add=True,
    )


def allocate_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of one launch, from PyTorch's allocator.

    It is free for what comes later on this stream alone, and what a graph captures lives as long as
    the graph: no block is shared between launches, outgrown, or left dangling.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")
