"""Gradients of flash attention in three launches without atomics, so the bits never change.

With P = softmax(scale Q K^T), O = P V and delta = rowsum(O * dO) (Dao 2023, "FlashAttention-2",
algorithm 2): dV = P^T dO, dS = P * (dO V^T - delta), dK = scale dS^T Q, dQ = scale dS K. P is
rebuilt from the log-sum-exp. dK and dV are summed over queries by one kernel, dQ over keys by
another: two products more than a single kernel with atomic sums would need.

Letters: B batch, L queries, M keys, N heads, K head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, target_of
from .flash_configs import configs_for
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

DELTA_ELEMENTS = {2: 4096, 4: 8192}  # per program, by bytes of an element; found by compiling
DELTA_WARPS = 4

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr, L,
    out_batch, out_row, out_head, grad_batch, grad_row, grad_head,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Row sums of output * gradient, float32 [B, N, L]."""
    first = tl.program_id(0) * BLOCK_L
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    out_ptr += sample * out_batch + head * out_head
    grad_ptr += sample * grad_batch + head * grad_head
    out = load_tile(out_ptr, first, out_row, L, K, BLOCK_L, WIDTH, False)
    grad = load_tile(grad_ptr, first, grad_row, L, K, BLOCK_L, WIDTH, False)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_L)
    delta_ptr += (sample * tl.num_programs(1) + head) * L
    tl.store(delta_ptr + rows, delta, mask=rows < L)


@triton.jit
def load_statistics(lse_ptr, delta_ptr, rows, L):
    """Log-sum-exp in base 2 and delta of some queries; the weights of absent ones become 0."""
    lse = tl.load(lse_ptr + rows, mask=rows < L, other=float("inf")) * _LOG2_E
    return lse, tl.load(delta_ptr + rows, mask=rows < L, other=0.0)


@triton.jit
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, L, M,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dk_batch, dk_row, dk_head, scale,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV, of the same strides, of one tile of keys; all queries pass by, transposed."""
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    grad_ptr += sample * grad_batch + head * grad_head
    statistics = (sample * tl.num_programs(1) + head) * L
    lse_ptr += statistics
    delta_ptr += statistics
    q_tiles = describe(q_ptr, q_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    grad_tiles = describe(grad_ptr, grad_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    k_tiles = describe(k_ptr, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
    v_tiles = describe(v_ptr, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)

    k = load_tile(k_tiles, first, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
    v = load_tile(v_tiles, first, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
    dk = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in tl.range(0, L, BLOCK_L, num_stages=STAGES):
        q = load_tile(q_tiles, start, q_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
        grad = load_tile(grad_tiles, start, grad_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
        scores = tl.dot(k, q.T, input_precision="ieee")
        lse, delta = load_statistics(lse_ptr, delta_ptr, start + tl.arange(0, BLOCK_L), L)
        # Before the next product in the source: on sm_90 it then runs under the exponentials.
        weights = tl.exp2(scores * (scale * _LOG2_E) - lse[None, :])
        dweights = tl.dot(v, grad.T, input_precision="ieee")
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")

    offset = sample * dk_batch + head * dk_head
    store_tile(dk_ptr + offset, first, dk_row, M, dk * scale, K, BLOCK_M, WIDTH)
    store_tile(dv_ptr + offset, first, dk_row, M, dv, K, BLOCK_M, WIDTH)


@triton.jit
def query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, L, M,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dq_batch, dq_row, dq_head, scale,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; all keys pass by."""
    first = tl.program_id(0) * BLOCK_L
    head = tl.program_id(1).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
    grad_ptr += sample * grad_batch + head * grad_head
    statistics = (sample * tl.num_programs(1) + head) * L
    q_tiles = describe(q_ptr, q_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    grad_tiles = describe(grad_ptr, grad_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    k_tiles = describe(k_ptr, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
    v_tiles = describe(v_ptr, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)

    q = load_tile(q_tiles, first, q_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    grad = load_tile(grad_tiles, first, grad_row, L, K, BLOCK_L, WIDTH, DESCRIPTORS)
    rows = first + tl.arange(0, BLOCK_L)
    lse, delta = load_statistics(lse_ptr + statistics, delta_ptr + statistics, rows, L)
    dq = tl.zeros([BLOCK_L, WIDTH], tl.float32)
    last = (M - 1) // BLOCK_M * BLOCK_M  # with code of its own, as in the forward pass
    for start in tl.range(0, last if DESCRIPTORS else M, BLOCK_M, num_stages=STAGES):
        k = load_tile(k_tiles, start, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
        v = load_tile(v_tiles, start, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
        dscores = score_gradients(q, k, v, grad, lse, delta, scale)
        if not DESCRIPTORS:
            dscores = without_absent(dscores, start, M, BLOCK_M, 0.0)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    if DESCRIPTORS:
        # A loop of one round: as straight code, it makes ptxas wait after every single product.
        for start in tl.range(last, M, BLOCK_M, num_stages=1):
            k = load_tile(k_tiles, start, k_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
            v = load_tile(v_tiles, start, v_row, M, K, BLOCK_M, WIDTH, DESCRIPTORS)
            dscores = score_gradients(q, k, v, grad, lse, delta, scale)
            dscores = without_absent(dscores, start, M, BLOCK_M, 0.0)
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")

    dq_ptr += sample * dq_batch + head * dq_head
    store_tile(dq_ptr, first, dq_row, L, dq * scale, K, BLOCK_L, WIDTH)


@triton.jit
def score_gradients(q, k, v, grad, lse, delta, scale):
    """dS = P * (dO V^T - delta) of a tile of queries and one of keys.

    The weight of an absent key may be infinite: it is to be left out, not multiplied by zero.
    """
    scores = tl.dot(q, k.T, input_precision="ieee")
    weights = tl.exp2(scores * (scale * _LOG2_E) - lse[:, None])
    dweights = tl.dot(grad, v.T, input_precision="ieee")
    return weights * (dweights - delta[:, None])


def attention_gradients(
    grad_BLNK: Tensor,
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    v_BMNK: Tensor,
    out_BLNK: Tensor,
    lse_BNL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, from that of the output.

    Args:
        grad_BLNK: gradient of the output.
        q_BLNK: queries.
        k_BMNK: keys.
        v_BMNK: values.
        out_BLNK: the output.
        lse_BNL: log-sum-exp of the scaled scores, float32.
    """
    B, L, N, K = q_BLNK.shape
    M = k_BMNK.shape[1]
    grad, q, k, v, out = map(usable, (grad_BLNK, q_BLNK, k_BMNK, v_BMNK, out_BLNK))
    lse, delta = lse_BNL.contiguous(), lse_BNL.new_empty(B, N, L)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    width = triton.next_power_of_2(K)
    head = {"K": K, "WIDTH": width}
    rows = DELTA_ELEMENTS[q.element_size()] // width
    launch(
        delta_kernel,
        (triton.cdiv(L, rows), N, B),
        {
            "out_ptr": out,
            "grad_ptr": grad,
            "delta_ptr": delta,
            "L": L,
            **strides_of("out", out),
            **strides_of("grad", grad),
            **head,
            "BLOCK_L": rows,
        },
        device=q.device,
        num_warps=DELTA_WARPS,
    )
    configs = configs_for(target_of(q.device), q.dtype, K)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "grad_ptr": grad,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "L": L,
        "M": M,
        **strides_of("q", q),
        **strides_of("k", k),
        **strides_of("v", v),
        **strides_of("grad", grad),
        "scale": K**-0.5,
        **head,
        "DESCRIPTORS": configs.descriptors,
    }
    launch_tiles(
        key_gradients_kernel,
        (triton.cdiv(M, configs.keys.block_m), N, B),
        {**arguments, "dk_ptr": dk, "dv_ptr": dv, **strides_of("dk", dk)},
        configs.keys,
        q.device,
    )
    launch_tiles(
        query_gradients_kernel,
        (triton.cdiv(L, configs.queries.block_l), N, B),
        {**arguments, "dq_ptr": dq, **strides_of("dq", dq)},
        configs.queries,
        q.device,
    )
    return dq, dk, dv
