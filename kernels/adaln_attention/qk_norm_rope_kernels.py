"""RMSNorm and rotation of the heads of queries and keys: what runs on the GPU.

A tile is BLOCK_T tokens x BLOCK_N heads x BLOCK_R rotary pairs of one tensor; the two components of
a pair lie R apart and are loaded separately, so that rotation moves no data between lanes and every
access is 128 bits wide. Arithmetic is float32.

With means over the K components of a head, rstd = (mean(x^2) + eps)^-1/2, y = weight * rstd * x and

    out1 = y1 * cos - y2 * sin,    out2 = y2 * cos + y1 * sin,

the gradients of y and x and that of the weight, summed over tokens and heads, follow from g of out:

    dy1 = g1 * cos + g2 * sin,     dy2 = g2 * cos - g1 * sin,     u = dy * weight,
    dx = rstd * (u - x * rstd^2 * mean(u * x)),                   dweight = sum(dy * rstd * x).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def side_of(program, rope, q_programs):
    """Whether a program works on keys, and its number among the programs of its side.

    Where queries and keys share positions, neighbours work on the same tokens of both, so that
    cosines and sines come from memory once.
    """
    if rope is not None:
        is_key = program % 2 == 1
        number = program // 2
    else:
        is_key = program >= q_programs
        number = tl.where(is_key, program - q_programs, program)
    return is_key, number


@triton.jit
def locate(
    tile, tokens,
    N: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Tokens, heads and pairs of a tile, along axes 0, 1, 2; masks with and without heads."""
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    token = tile // BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    head = tile % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    pair = tl.arange(0, BLOCK_R)[None, None, :]
    token_mask = (token < tokens) & (pair < R)
    return token, head, pair, token_mask & (head < N), token_mask


@triton.jit
def strided(token, head, pair, length, stride_b, stride_l, stride_n):
    """Offsets of first components in a tensor [B, length, N, K] whose last stride is 1."""
    sample = (token // length).to(tl.int64)
    position = (token % length).to(tl.int64)
    return sample * stride_b + position * stride_l + head.to(tl.int64) * stride_n + pair


@triton.jit
def contiguous(token, head, pair, N: tl.constexpr, R: tl.constexpr):
    """Offsets of first components in a contiguous tensor [B, length, N, K]."""
    return (token.to(tl.int64) * N + head) * (2 * R) + pair


@triton.jit
def load_pairs(x, offsets, mask, distance):
    """Both components of pairs, float32, 0 where masked; the second lies `distance` further on."""
    first = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + distance + offsets, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(x, offsets, mask, first, second, distance):
    """Store both components of pairs in the dtype of x."""
    tl.store(x + offsets, first.to(x.dtype.element_ty), mask=mask)
    tl.store(x + distance + offsets, second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_rope(rope, token, pair, mask, length, stride_c, stride_l):
    """Cosines and sines of a tile's tokens, broadcast over heads."""
    position = (token % length).to(tl.int64)
    return load_pairs(rope, position * stride_l + pair, mask, stride_c)


@triton.jit
def head_mean(sums, R: tl.constexpr):
    """Mean over the components of every head, of the sum of both components per pair."""
    return tl.sum(sums, axis=2, keep_dims=True) / (2 * R)


@triton.jit
def norm_rope_tile(
    tile, x, weight, rope, out, tokens, length, stride_b, stride_l, stride_n,
    rope_stride_c, rope_stride_l, eps,
    N: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of queries or of keys, forward."""
    token, head, pair, mask, token_mask = locate(tile, tokens, N, R, BLOCK_T, BLOCK_N, BLOCK_R)
    offsets = strided(token, head, pair, length, stride_b, stride_l, stride_n)
    x1, x2 = load_pairs(x, offsets, mask, R)
    # Under the mask of the cosines, though every token has weights: 40 registers instead of 48.
    weight1, weight2 = load_pairs(weight, pair, token_mask, R)
    rstd = tl.rsqrt(head_mean(x1 * x1 + x2 * x2, R) + eps)
    y1 = x1 * rstd * weight1
    y2 = x2 * rstd * weight2
    if rope is not None:
        cos, sin = load_rope(rope, token, pair, token_mask, length, rope_stride_c, rope_stride_l)
        rotated1 = y1 * cos - y2 * sin
        y2 = y2 * cos + y1 * sin
        y1 = rotated1
    store_pairs(out, contiguous(token, head, pair, N, R), mask, y1, y2, R)


@triton.jit
def qk_norm_rope_kernel(
    q, k, q_weight, k_weight, rope, q_out, k_out, q_tokens, k_tokens, q_length, k_length,
    q_stride_b, q_stride_l, q_stride_n, k_stride_b, k_stride_l, k_stride_n,
    rope_stride_c, rope_stride_l, eps, q_tiles,
    N: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of queries or of keys per program."""
    is_key, tile = side_of(tl.program_id(0), rope, q_tiles)
    if is_key:
        norm_rope_tile(
            tile, k, k_weight, rope, k_out, k_tokens, k_length, k_stride_b, k_stride_l, k_stride_n,
            rope_stride_c, rope_stride_l, eps, N, R, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    else:
        norm_rope_tile(
            tile, q, q_weight, rope, q_out, q_tokens, q_length, q_stride_b, q_stride_l, q_stride_n,
            rope_stride_c, rope_stride_l, eps, N, R, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip


@triton.jit
def norm_rope_backward_tiles(
    number, programs, tiles, x, grad_out, weight, rope, grad, partials, tokens, length,
    stride_b, stride_l, stride_n, grad_stride_b, grad_stride_l, grad_stride_n,
    rope_stride_c, rope_stride_l, eps,
    N: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile from `number` on, and their part of the gradient of the weight."""
    total1 = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_R], tl.float32)
    total2 = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_R], tl.float32)
    for tile in range(number, tiles, programs):
        token, head, pair, mask, token_mask = locate(tile, tokens, N, R, BLOCK_T, BLOCK_N, BLOCK_R)
        offsets = strided(token, head, pair, length, grad_stride_b, grad_stride_l, grad_stride_n)
        dy1, dy2 = load_pairs(grad_out, offsets, mask, R)
        if rope is not None:
            cos, sin = load_rope(
                rope, token, pair, token_mask, length, rope_stride_c, rope_stride_l
            )
            turned1 = dy1 * cos + dy2 * sin
            dy2 = dy2 * cos - dy1 * sin
            dy1 = turned1
        offsets = strided(token, head, pair, length, stride_b, stride_l, stride_n)
        x1, x2 = load_pairs(x, offsets, mask, R)
        rstd = tl.rsqrt(head_mean(x1 * x1 + x2 * x2, R) + eps)
        dy1 *= rstd
        dy2 *= rstd
        total1 += dy1 * x1
        total2 += dy2 * x2
        # Loaded anew for every tile, from the cache: held in registers, the weight would cost a
        # third of the programs that fit on a multiprocessor.
        weight1, weight2 = load_pairs(weight, pair, pair < R, R)
        dy1 *= weight1
        dy2 *= weight2
        along = head_mean(dy1 * x1 + dy2 * x2, R) * (rstd * rstd)
        dx1 = dy1 - x1 * along
        dx2 = dy2 - x2 * along
        store_pairs(grad, contiguous(token, head, pair, N, R), mask, dx1, dx2, R)
    pair = tl.arange(0, BLOCK_R)
    total1 = tl.sum(tl.sum(total1, axis=0), axis=0)
    total2 = tl.sum(tl.sum(total2, axis=0), axis=0)
    store_pairs(partials + number * (2 * R), pair, pair < R, total1, total2, R)


@triton.jit
def qk_norm_rope_backward_kernel(
    q, k, q_out_grad, k_out_grad, q_weight, k_weight, rope, q_grad, k_grad, q_partials, k_partials,
    q_tokens, k_tokens, q_length, k_length,
    q_stride_b, q_stride_l, q_stride_n, k_stride_b, k_stride_l, k_stride_n,
    q_grad_stride_b, q_grad_stride_l, q_grad_stride_n,
    k_grad_stride_b, k_grad_stride_l, k_grad_stride_n,
    rope_stride_c, rope_stride_l, eps, q_tiles, k_tiles, q_programs, k_programs,
    N: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and keys; float32 partial sums [programs, K] of those of the weights."""
    is_key, number = side_of(tl.program_id(0), rope, q_programs)
    if is_key:
        norm_rope_backward_tiles(
            number, k_programs, k_tiles, k, k_out_grad, k_weight, rope, k_grad, k_partials,
            k_tokens, k_length, k_stride_b, k_stride_l, k_stride_n,
            k_grad_stride_b, k_grad_stride_l, k_grad_stride_n,
            rope_stride_c, rope_stride_l, eps, N, R, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    else:
        norm_rope_backward_tiles(
            number, q_programs, q_tiles, q, q_out_grad, q_weight, rope, q_grad, q_partials,
            q_tokens, q_length, q_stride_b, q_stride_l, q_stride_n,
            q_grad_stride_b, q_grad_stride_l, q_grad_stride_n,
            rope_stride_c, rope_stride_l, eps, N, R, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip


@triton.jit
def add_partials(partials, total, count, column, K: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums over the rows of [count, K], in a fixed order, in the dtype of `total`."""
    rows = tl.arange(0, BLOCK_P)[:, None]
    sums = tl.zeros([BLOCK_P, column.shape[0]], tl.float32)
    for start in range(0, count, BLOCK_P):
        row = start + rows
        mask = (row < count) & (column < K)[None, :]
        sums += tl.load(partials + row * K + column[None, :], mask=mask, other=0.0)
    sums = tl.sum(sums, axis=0)
    tl.store(total + column, sums.to(total.dtype.element_ty), mask=column < K)


@triton.jit
def weight_gradients_kernel(
    q_partials, k_partials, q_weight_grad, k_weight_grad, q_programs, k_programs,
    K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_K components of the gradient of one weight per program."""
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if tl.program_id(1) == 1:
        add_partials(k_partials, k_weight_grad, k_programs, column, K, BLOCK_P)
    else:
        add_partials(q_partials, q_weight_grad, q_programs, column, K, BLOCK_P)
