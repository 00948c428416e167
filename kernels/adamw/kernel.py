"""AdamW with its moving average over all tensors of a class in one launch.

A program updates one chunk of one tensor; a table on the device says where it lies. Full chunks
run without a mask and, where all addresses are multiples of 16 bytes, in 128-bit accesses. Division
and square root are those of the hardware (2 ulp each on NVIDIA GPUs): the exact ones need registers
that spill, and an error of 4 ulp of the update is far below one of the parameter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import Scalar
from kernels.multi_tensor import DenseRows, Dtypes, scalar
from kernels.table_launch import TYPES, find_chunk, launch_tables, load_pointer

from .bfloat16 import QUIET_NAN
from .reference import check_adamw_step

COLUMNS = 6  # of the table: param, grad, exp_avg, exp_avg_sq, master, ema

_QUIET_NAN = tl.constexpr(QUIET_NAN)
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def hash_kernel(word):
    """The hash of `bfloat16.py` on uint32."""
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    word ^= word >> 16
    return word


@triton.jit
def complement_of_power(log_base, exponent):
    """1 - base^exponent in float64, exact to the float32 rounding of log(base)."""
    return 1.0 - tl.exp(exponent.to(tl.float64) * log_base)


@triton.jit
def update_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, ema_ptr, offsets, mask,
    grad_factor, beta1, beta1_complement, beta2, beta2_complement, eps, weight_decay,
    root_factor, step_size, decay, ema_beta, ema_complement, rounding_key, first,
    MASTER: tl.constexpr, EMA: tl.constexpr, ADAM_W_MODE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Update the elements at `offsets`; the arithmetic of `reference.update_lists`."""
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32) * grad_factor
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
    if MASTER is None:
        weight = tl.load(param_ptr + offsets, mask=mask).to(tl.float32)
    elif tl.int16 == MASTER:
        high = tl.load(param_ptr + offsets, mask=mask).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(master_ptr + offsets, mask=mask).to(tl.int32)
        high -= (low < 0).to(tl.int32)
        weight = ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
    else:
        weight = tl.load(master_ptr + offsets, mask=mask)
    if not ADAM_W_MODE:
        grad += weight_decay * weight
    exp_avg = beta1 * exp_avg + beta1_complement * grad
    exp_avg_sq = beta2 * exp_avg_sq + beta2_complement * (grad * grad)
    denominator = tl.sqrt(exp_avg_sq) * root_factor + eps
    weight -= step_size * (exp_avg / denominator) + decay * weight

    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    if tl.int16 == MASTER:
        bits = tl.where(weight == weight, weight.to(tl.int32, bitcast=True), _QUIET_NAN)
        low = (bits & 0xFFFF).to(tl.int16)
        high = ((bits >> 16) + (low < 0).to(tl.int32)).to(tl.int16)
        tl.store(master_ptr + offsets, low, mask=mask)
        tl.store(param_ptr + offsets, high.to(tl.bfloat16, bitcast=True), mask=mask)
    elif ROUND:
        place = (first + offsets).to(tl.uint32)
        draw = hash_kernel((place * 0x9E3779B1) ^ rounding_key)
        bits = weight.to(tl.uint32, bitcast=True) + (draw & 0xFFFF)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        finite = tl.abs(weight) < float("inf")
        tl.store(param_ptr + offsets, tl.where(finite, rounded, weight.to(tl.bfloat16)), mask=mask)
    else:
        if MASTER is not None:
            tl.store(master_ptr + offsets, weight, mask=mask)
        tl.store(param_ptr + offsets, weight.to(param_ptr.dtype.element_ty), mask=mask)
    if EMA:
        average = tl.load(ema_ptr + offsets, mask=mask)
        tl.store(ema_ptr + offsets, ema_beta * average + ema_complement * weight, mask=mask)


@triton.jit
def adamw_step_kernel(
    addresses, sizes, chunks,
    lr, step, grad_scale, clip_coef, found_inf, ema_beta_ptr, rounding_seed,
    beta1, beta1_complement, log_beta1, beta2, beta2_complement, log_beta2, eps, weight_decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, EMA: tl.constexpr,
    ADAM_W_MODE: tl.constexpr, BIAS_CORRECTION: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor; see `reference.adamw_step` for the arguments."""
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    if not skipped:
        row, first, remaining = find_chunk(sizes, chunks, CHUNK)
        address = addresses + _COLUMNS * row
        param_ptr = load_pointer(address, first, PARAM, ALIGNED)
        grad_ptr = load_pointer(address + 1, first, GRAD, ALIGNED)
        exp_avg_ptr = load_pointer(address + 2, first, tl.float32, ALIGNED)
        exp_avg_sq_ptr = load_pointer(address + 3, first, tl.float32, ALIGNED)
        if MASTER is None:
            master_ptr = param_ptr
        else:
            master_ptr = load_pointer(address + 4, first, MASTER, ALIGNED)
        ema_ptr = load_pointer(address + 5, first, tl.float32, ALIGNED)

        grad_factor = 1.0
        if grad_scale is not None:
            grad_factor *= tl.load(grad_scale)
        if clip_coef is not None:
            grad_factor *= tl.load(clip_coef)
        rate = tl.load(lr)
        step_size = rate
        root_factor = 1.0
        if BIAS_CORRECTION:
            number = tl.load(step)
            step_size = (rate / complement_of_power(log_beta1, number)).to(tl.float32)
            root_factor = (1.0 / tl.sqrt(complement_of_power(log_beta2, number))).to(tl.float32)
        decay = 0.0
        if ADAM_W_MODE:
            decay = rate * weight_decay
        ema_beta = 0.0
        ema_complement = 1.0
        if EMA:
            beta = tl.load(ema_beta_ptr)
            ema_beta = beta.to(tl.float32)
            ema_complement = (1.0 - beta).to(tl.float32)
        ROUND: tl.constexpr = rounding_seed is not None
        rounding_key = 0
        if ROUND:
            index = tl.load(sizes + 2 * row + 1).to(tl.uint32)
            mixed = tl.load(step).to(tl.uint32) * 0x85EBCA6B + index * 0xC2B2AE35
            rounding_key = hash_kernel(mixed + tl.load(rounding_seed).to(tl.uint32))

        lanes = tl.arange(0, BLOCK)
        if remaining >= CHUNK:
            for start in range(0, CHUNK, BLOCK):
                update_block(
                    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, ema_ptr,
                    start + lanes, None,
                    grad_factor, beta1, beta1_complement, beta2, beta2_complement, eps,
                    weight_decay, root_factor, step_size, decay, ema_beta, ema_complement,
                    rounding_key, first, MASTER, EMA, ADAM_W_MODE, ROUND,
                )  # fmt: skip
        else:
            count = remaining.to(tl.int32)
            for start in range(0, count, BLOCK):
                offsets = start + lanes
                update_block(
                    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, ema_ptr,
                    offsets, offsets < count,
                    grad_factor, beta1, beta1_complement, beta2, beta2_complement, eps,
                    weight_decay, root_factor, step_size, decay, ema_beta, ema_complement,
                    rounding_key, first, MASTER, EMA, ADAM_W_MODE, ROUND,
                )  # fmt: skip


@torch.no_grad()
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    ema: list[Tensor | None] | None,
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Scalar,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    ema_beta: Scalar | None = None,
    adam_w_mode: bool = True,
    bias_correction: bool = True,
    rounding_seed: int | Tensor | None = None,
) -> None:
    """As `reference.adamw_step`, in one launch per class of dtypes and alignment."""
    check_adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, masters, ema,
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_beta=ema_beta,
        rounding_seed=rounding_seed,
    )  # fmt: skip
    if not params:
        return
    device = params[0].device

    def on_device(value: Scalar | None, dtype: torch.dtype) -> Tensor | None:
        return None if value is None else scalar(value, dtype, device)

    step_op(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        *_without_gaps(masters),
        *_without_gaps(ema or [None] * len(params)),
        scalar(lr, torch.float32, device),
        scalar(step, torch.int32, device),
        on_device(grad_scale, torch.float32),
        on_device(clip_coef, torch.float32),
        on_device(found_inf, getattr(found_inf, "dtype", torch.float32)),
        on_device(ema_beta, torch.float64),
        on_device(rounding_seed, torch.int64),
        list(betas),
        eps,
        weight_decay,
        adam_w_mode,
        bias_correction,
    )


@torch.library.custom_op(
    "transfer1::adamw_step",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters", "ema"),
)
def step_op(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    master_of: list[int],
    ema: list[Tensor],
    ema_of: list[int],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
    ema_beta: Tensor | None,
    rounding_seed: Tensor | None,
    betas: list[float],
    eps: float,
    weight_decay: float,
    adam_w_mode: bool,
    bias_correction: bool,
) -> None:
    """The launches, as one op to whatever traces or captures a program.

    Lists of an op have no gaps: `master_of` and `ema_of` say which entry belongs to a parameter.
    """
    columns = (
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [None if place < 0 else masters[place] for place in master_of],
        [None if place < 0 else ema[place] for place in ema_of],
    )
    dense = DenseRows(columns, written=(True, False, True, True, True, True))
    beta1, beta2 = betas

    def of_class(dtypes: Dtypes) -> dict[str, Any]:
        param, grad, _, _, master, shadow = dtypes
        rounds = param == torch.bfloat16 and master is None
        return {
            "lr": lr,
            "step": step,
            "grad_scale": grad_scale,
            "clip_coef": clip_coef,
            "found_inf": found_inf,
            "ema_beta_ptr": None if shadow is None else ema_beta,
            "rounding_seed": rounding_seed if rounds else None,
            "beta1": beta1,
            "beta1_complement": 1 - beta1,
            "log_beta1": _log(beta1),
            "beta2": beta2,
            "beta2_complement": 1 - beta2,
            "log_beta2": _log(beta2),
            "eps": eps,
            "weight_decay": weight_decay,
            "PARAM": TYPES[param],
            "GRAD": TYPES[grad],
            "MASTER": TYPES[master],
            "EMA": shadow is not None,
            "ADAM_W_MODE": adam_w_mode,
            "BIAS_CORRECTION": bias_correction,
        }

    launch_tables(adamw_step_kernel, dense.rows, of_class)
    dense.write_back()


def _without_gaps(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and per entry the place of its tensor among them, -1 for none."""
    present = [tensor for tensor in tensors if tensor is not None]
    count = itertools.count()
    return present, [-1 if tensor is None else next(count) for tensor in tensors]


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
