"""Moving averages of all tensors of a class in one launch; several averages read a source once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import Scalar
from kernels.multi_tensor import DenseRows, scalar
from kernels.table_launch import TYPES, find_chunk, launch_tables, load_pointer

from .reference import check_ema_update


@triton.jit
def average_block(
    address, betas, param_ptr, first, offsets, mask,
    PROFILES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Average the elements at `offsets` into every profile; arithmetic of `average_lists`."""
    param = tl.load(param_ptr + offsets, mask=mask).to(tl.float32)
    for profile in tl.static_range(PROFILES):
        shadow_ptr = load_pointer(address + 1 + profile, first, tl.float32, ALIGNED)
        beta = tl.load(betas + profile)
        shadow = tl.load(shadow_ptr + offsets, mask=mask)
        shadow = beta.to(tl.float32) * shadow + (1.0 - beta).to(tl.float32) * param
        tl.store(shadow_ptr + offsets, shadow, mask=mask)


@triton.jit
def ema_update_kernel(
    addresses, sizes, chunks, betas,
    PARAM: tl.constexpr, PROFILES: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one parameter and all its averages; `betas` is float64 [PROFILES]."""
    row, first, remaining = find_chunk(sizes, chunks, CHUNK)
    address = addresses + (PROFILES + 1) * row
    param_ptr = load_pointer(address, first, PARAM, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    if remaining >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            offsets = start + lanes
            average_block(address, betas, param_ptr, first, offsets, None, PROFILES, ALIGNED)
    else:
        count = remaining.to(tl.int32)
        for start in range(0, count, BLOCK):
            offsets = start + lanes
            mask = offsets < count
            average_block(address, betas, param_ptr, first, offsets, mask, PROFILES, ALIGNED)


@torch.no_grad()
def ema_update(shadows: list[Tensor], params: list[Tensor], beta: Scalar) -> None:
    """As `reference.ema_update`, in one launch per class of dtypes and alignment."""
    profiles = check_ema_update(shadows, params, beta)
    if not params:
        return
    ema_op(shadows, params, scalar(beta, torch.float64, params[0].device, count=profiles))


@torch.library.custom_op("transfer1::ema_update", mutates_args=("shadows",))
def ema_op(shadows: list[Tensor], params: list[Tensor], betas: Tensor) -> None:
    """The launches, as one op to whatever traces or captures a program."""
    profiles, count = len(betas), len(params)
    averages = [shadows[start : start + count] for start in range(0, len(shadows), count)]
    dense = DenseRows((params, *averages), written=(False,) + (True,) * profiles)
    launch_tables(
        ema_update_kernel,
        dense.rows,
        lambda dtypes: {"betas": betas, "PARAM": TYPES[dtypes[0]], "PROFILES": profiles},
    )
    dense.write_back()
