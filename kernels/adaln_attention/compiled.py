"""Attention on CPUs with bfloat16 products but no matrix tiles (AVX512-BF16, not AMX).

There the library's attention multiplies bfloat16 at a quarter of the rate of the library's matrix
product. Here scores are matrix products of a block of rows with all columns, and everything between
two products is one pass of compiled code. A bfloat16 product also rounds its result to bfloat16,
which is too coarse where softmax is sharp:

- scores: a second product subtracts the rounded result before it rounds what is left, so that the
  difference of both has 16 bits;
- dP - delta of the backward pass (Dao 2023, "FlashAttention-2", algorithm 2), two nearly equal
  numbers then: delta, as the sum of two bfloat16 numbers, enters as two more columns of the product
  and is gone before it rounds.

Letters: B batch, L queries, M keys, N heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .attention_gradients import register_attention_gradients

BLOCK = 2**20  # scores at a time: what is between two products stays in the caches
LEAST = 2**18  # scores of a head; with fewer, the calls cost more than they save
LEAST_ROWS = 128  # of a block; fewer make a slow product
PADDING = 32  # columns added to a head for delta: two are used, products want a multiple of 32
SAMPLE = (512, 2048)  # rows and columns that the compiler plans loops and threads for


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """As `reference.attention`, which it calls where the library's attention is the faster one."""
    if not faster_by_products(q_BLNK) or q_BLNK.shape[1] * k_BMNK.shape[1] < LEAST:
        return reference.attention(q_BLNK, k_BMNK, v_BMNK)
    out_BNLK, _ = product_attention(*(_by_head(x) for x in (q_BLNK, k_BMNK, v_BMNK)))
    return out_BNLK.transpose(1, 2).contiguous()


def faster_by_products(x: Tensor) -> bool:
    """Whether these are bfloat16 numbers of a CPU that multiplies them, but not by tiles."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


@torch.library.custom_op("transfer1::product_attention", mutates_args=())
def product_attention(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, N, L, K] and the log-sum-exp of the scaled scores, float32 [B, N, L]."""
    B, N, L, K = q_BNLK.shape
    out_BNLK, lse_BNL = _results(q_BNLK)
    step = planned(softmax, 2, 0, torch.get_num_threads())
    for b in range(B):
        for n in range(N):
            keys_KM, values_MK = k_BNMK[b, n].T, v_BNMK[b, n]
            for rows in _blocks(L, keys_KM.shape[1]):
                scores = _scores(q_BNLK[b, n, rows], keys_KM)
                weights, lse_BNL[b, n, rows] = step(*scores, K**-0.5)
                torch.mm(weights, values_MK, out=out_BNLK[b, n, rows])
    return out_BNLK, lse_BNL


@torch.library.custom_op("transfer1::product_attention_backward", mutates_args=())
def product_attention_backward(
    grad_BNLK: Tensor,
    q_BNLK: Tensor,
    k_BNMK: Tensor,
    v_BNMK: Tensor,
    out_BNLK: Tensor,
    lse_BNL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in blocks of keys: theirs need no sums over blocks."""
    B, N, L, K = q_BNLK.shape
    grad_BNLK = grad_BNLK.contiguous()
    delta_BNL = (grad_BNLK.float() * out_BNLK.float()).sum(-1)
    high_BNL = delta_BNL.to(grad_BNLK.dtype)
    low_BNL = (delta_BNL - high_BNL.float()).to(grad_BNLK.dtype)
    minus_one = v_BNMK.new_full(v_BNMK.shape[:-1], -1.0)
    grad_and_delta, value_and_ones = (
        _with_columns(grad_BNLK, high_BNL, low_BNL),
        _with_columns(v_BNMK, minus_one, minus_one),
    )
    dq_BNLK = torch.zeros(B, N, L, K)
    dk_BNMK, dv_BNMK = torch.empty_like(k_BNMK), torch.empty_like(v_BNMK)
    step = planned(softmax_gradient, 3, 1, torch.get_num_threads())
    for b in range(B):
        for n in range(N):
            q_LK, grad_LK = q_BNLK[b, n], grad_BNLK[b, n]
            for keys in _blocks(k_BNMK.shape[2], L):
                k_XK = k_BNMK[b, n, keys]
                scores = _scores(k_XK, q_LK.T)
                dweights = value_and_ones[b, n, keys] @ grad_and_delta[b, n].T
                weights, dscores = step(*scores, dweights, lse_BNL[b, n], K**-0.5)
                torch.mm(weights, grad_LK, out=dv_BNMK[b, n, keys])
                torch.mm(dscores, q_LK, out=dk_BNMK[b, n, keys])
                dq_BNLK[b, n] += dscores.T @ k_XK
    return dq_BNLK.to(q_BNLK.dtype), dk_BNMK, dv_BNMK


def softmax(high: Tensor, low: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the columns of (high - low) * scale, and its log-sum-exp, float32 [rows]."""
    scores = (high.float() - low.float()) * scale
    maximum = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    return (weights / total).to(high.dtype), (maximum + total.log()).squeeze(-1)


def softmax_gradient(
    high: Tensor, low: Tensor, dweights: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights again, and gradients of the products of q and k.

    Args:
        high: products of keys (rows) and queries (columns).
        low: what is subtracted from them.
        dweights: gradients of the weights, less delta of their query.
        lse: log-sum-exp of every query.
        scale: of the scores.
    """
    weights = torch.exp((high.float() - low.float()) * scale - lse)
    return weights.to(high.dtype), (weights * dweights.float() * scale).to(high.dtype)


def _scores(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices whose difference is left @ right."""
    high = left @ right
    return high, torch.addmm(high, left, right, alpha=-1)


def _with_columns(x: Tensor, *columns: Tensor) -> Tensor:
    wider = x.new_zeros(*x.shape[:-1], x.shape[-1] + PADDING)
    wider[..., : x.shape[-1]] = x
    for index, column in enumerate(columns, start=x.shape[-1]):
        wider[..., index] = column
    return wider


def _blocks(rows: int, columns: int) -> list[slice]:
    size = max(BLOCK // columns, LEAST_ROWS)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _by_head(x_BLNK: Tensor) -> Tensor:
    return x_BLNK.transpose(1, 2).contiguous()


@cache
def planned(
    function: Callable[..., Any], matrices: int, vectors: int, threads: int
) -> Callable[..., Any]:
    """Compile for any size, after a first call on a sample: code is planned for its sizes."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    rows, columns = SAMPLE
    sample = [torch.zeros(rows, columns, dtype=torch.bfloat16) for _ in range(matrices)]
    compiled(*sample, *(torch.zeros(columns) for _ in range(vectors)), 1.0)
    return compiled


def _results(q_BNLK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BNLK), q_BNLK.new_empty(q_BNLK.shape[:-1], dtype=torch.float32)


@product_attention.register_fake
def _(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> tuple[Tensor, Tensor]:
    return _results(q_BNLK)


@product_attention_backward.register_fake
def _(
    grad_BNLK: Tensor,
    q_BNLK: Tensor,
    k_BNMK: Tensor,
    v_BNMK: Tensor,
    out_BNLK: Tensor,
    lse_BNL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BNLK), torch.empty_like(k_BNMK), torch.empty_like(v_BNMK)


register_attention_gradients(product_attention, product_attention_backward)
