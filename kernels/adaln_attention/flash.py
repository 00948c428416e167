"""Flash attention without a mask: the forward pass and the op that PyTorch sees.

A program keeps a tile of queries and walks over all keys with a running maximum and sum (online
softmax, Milakov and Gimelshein 2018; Dao 2023, "FlashAttention-2", algorithm 1). Softmax is in
float32 with exp2; the log-sum-exp of every row is an output, from which the backward pass rebuilds
the probabilities.

Letters: B batch, L queries, M keys, N heads, K head size.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import check_device, target_of
from ..registry import FLOATS
from .attention_gradients import register_attention_gradients
from .flash_backward import attention_gradients
from .flash_configs import HEAD_SIZES, configs_for
from .flash_tiles import (
    LOG2_E,
    describe,
    launch_tiles,
    load_tile,
    store_tile,
    strides_of,
    usable,
    without_absent,
)

_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, L, M,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head, scale_log2,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head of one sample.

    With DESCRIPTORS the last keys, some of which may not be there, get code of their own, so that
    no other tile is masked; pointers need masks anyway, and one copy of the code fewer registers.
    AHEAD, of descriptors alone, multiplies the next tile of keys before this tile of values: on
    sm_90 those products run while the softmax is computed.
    """
    first = tl.program_id(0) * BLOCK_L
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    q_tiles = describe(q_ptr, q_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    k_tiles = describe(k_ptr, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
    v_tiles = describe(v_ptr, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)

    q = load_tile(q_tiles, first, q_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    maximum = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    out = tl.zeros([BLOCK_L, WIDTH], tl.float32)
    last = (M - 1) // BLOCK_M * BLOCK_M
    if AHEAD:
        k = load_tile(k_tiles, 0, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
        scores = tl.dot(q, k.T, input_precision="ieee")
    for start in tl.range(0, last if DESCRIPTORS else M, BLOCK_M, num_stages=STAGES):
        if not AHEAD:
            k = load_tile(k_tiles, start, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
            scores = tl.dot(q, k.T, input_precision="ieee")
        if not DESCRIPTORS:
            scores = without_absent(scores, start, M, BLOCK_M, float("-inf"))
        weights, factor, maximum = softmax_step(scores, maximum, scale_log2)
        if AHEAD:
            k = load_tile(k_tiles, start + BLOCK_M, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
            scores = tl.dot(q, k.T, input_precision="ieee")
        total = total * factor + tl.sum(weights, 1)
        out *= factor[:, None]
        v = load_tile(v_tiles, start, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
    if DESCRIPTORS:
        if not AHEAD:
            k = load_tile(k_tiles, last, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
            scores = tl.dot(q, k.T, input_precision="ieee")
        scores = without_absent(scores, last, M, BLOCK_M, float("-inf"))
        weights, factor, maximum = softmax_step(scores, maximum, scale_log2)
        total = total * factor + tl.sum(weights, 1)
        out *= factor[:, None]
        v = load_tile(v_tiles, last, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")

    out_ptr += sample * out_batch + head * out_head
    store_tile(out_ptr, first, out_row, L, out / total[:, None], K, BLOCK_L, WIDTH)
    rows = first + tl.arange(0, BLOCK_L)
    lse_ptr += (sample * tl.num_programs(1) + head) * L
    tl.store(lse_ptr + rows, (maximum + tl.log2(total)) * _LN_2, mask=rows < L)


@triton.jit
def softmax_step(scores, maximum, scale_log2):
    """Weights of these keys, the factor for what was summed before, and the new maximum (log2)."""
    raised = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - raised[:, None])
    return weights, tl.exp2(maximum - raised), raised


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """As `reference.attention`; the backward pass is deterministic.

    Raises:
        ValueError: shapes, dtypes or devices that the kernels do not take.
    """
    check_attention(q_BLNK, k_BMNK, v_BMNK)
    return attention_op(q_BLNK, k_BMNK, v_BMNK)[0]


def check_attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> None:
    """Raise ValueError for what the kernels do not take, with the way around."""
    remedy = "set kernels.attention=reference"
    for name, x in (("q", q_BLNK), ("k", k_BMNK), ("v", v_BMNK)):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} has shape {tuple(x.shape)}, but must have four axes: batch, "
                f"tokens, heads, head size; {remedy}"
            )
        if x.dtype not in FLOATS or x.dtype != q_BLNK.dtype:
            raise ValueError(
                f"attention: {name} is {x.dtype} and q is {q_BLNK.dtype}, but all must be the same "
                f"of {', '.join(map(str, FLOATS))}; {remedy}"
            )
        if x.device != q_BLNK.device:
            raise ValueError(
                f"attention: {name} is on {x.device}, but q is on {q_BLNK.device}; "
                "move them to one device"
            )
    B, _, N, K = q_BLNK.shape
    if K not in HEAD_SIZES:
        raise ValueError(
            f"attention: head size {K} of q {tuple(q_BLNK.shape)} is not one of "
            f"{', '.join(map(str, HEAD_SIZES))}; {remedy}"
        )
    M = k_BMNK.shape[1]
    if M < 1 or k_BMNK.shape != (B, M, N, K) or v_BMNK.shape != k_BMNK.shape:
        raise ValueError(
            f"attention: k has shape {tuple(k_BMNK.shape)} and v {tuple(v_BMNK.shape)}, but with q "
            f"{tuple(q_BLNK.shape)} both must have [{B}, M, {N}, {K}], M at least 1; {remedy}"
        )
    if max(B, N) > 65535:
        raise ValueError(
            f"attention: q has shape {tuple(q_BLNK.shape)}, but at most 65535 samples and heads "
            f"are taken; {remedy}"
        )
    check_device("attention", q_BLNK.device)


@torch.library.custom_op("transfer1::attention", mutates_args=())
def attention_op(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, L, N, K] and the log-sum-exp of the scaled scores, float32 [B, N, L]."""
    B, L, N, K = q_BLNK.shape
    M = k_BMNK.shape[1]
    q, k, v = usable(q_BLNK), usable(k_BMNK), usable(v_BMNK)
    out, lse = empty_results(q)
    configs = configs_for(target_of(q.device), q.dtype, K)
    launch_tiles(
        attention_kernel,
        (triton.cdiv(L, configs.forward.block_l), N, B),
        {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "out_ptr": out,
            "lse_ptr": lse,
            "L": L,
            "M": M,
            **strides_of("q", q),
            **strides_of("k", k),
            **strides_of("v", v),
            **strides_of("out", out),
            "scale_log2": K**-0.5 * LOG2_E,
            "K": K,
            "WIDTH": triton.next_power_of_2(K),
            "DESCRIPTORS": configs.descriptors,
            "AHEAD": configs.ahead,
        },
        configs.forward,
        q.device,
    )
    return out, lse


def empty_results(q_BLNK: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the output and the log-sum-exp."""
    B, L, N, K = q_BLNK.shape
    out_BLNK = q_BLNK.new_empty(B, L, N, K)
    return out_BLNK, q_BLNK.new_empty(B, N, L, dtype=torch.float32)


@attention_op.register_fake
def _(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> tuple[Tensor, Tensor]:
    return empty_results(q_BLNK)


@torch.library.custom_op("transfer1::attention_backward", mutates_args=())
def attention_backward_op(
    grad_BLNK: Tensor,
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    v_BMNK: Tensor,
    out_BLNK: Tensor,
    lse_BNL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return attention_gradients(grad_BLNK, q_BLNK, k_BMNK, v_BMNK, out_BLNK, lse_BNL)


@attention_backward_op.register_fake
def _(
    grad_BLNK: Tensor,
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    v_BMNK: Tensor,
    out_BLNK: Tensor,
    lse_BNL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in (q_BLNK, k_BMNK, v_BMNK))
    return q, k, v


register_attention_gradients(attention_op, attention_backward_op)
