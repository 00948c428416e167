"""`qk_norm_rope` in one launch forward and two backward, registered with PyTorch.

Forward, every program normalises and rotates one tile. Backward, a bounded number of programs walks
over the tiles, each with its own float32 sum for the gradient of a weight; the second launch adds
these sums up in a fixed order. The number of programs depends on shapes alone, so that gradients
are the same bits on GPUs of different sizes.

The inputs are all that is kept for the backward pass: a stored rstd would add bytes and save none,
since the heads are read again in any case.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.launch import check_device, is_amd, launch, target_of
from kernels.registry import FLOATS

from .qk_norm_rope_kernels import (
    qk_norm_rope_backward_kernel,
    qk_norm_rope_kernel,
    weight_gradients_kernel,
)

LANES = 256  # of a program; each loads 128 bits of either half of a head at a time
MAX_HEAD_SIZE = 256
BACKWARD_PROGRAMS = 1024  # per weight: several waves on any GPU, 55 tokens each at 56,320
SUM_ROWS, SUM_COLUMNS = 128, 16  # of partial sums per iteration


def qk_norm_rope(
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.qk_norm_rope`; contiguous results, no gradient for the positions.

    Queries and keys may have any strides with contiguous heads, such as those of slices of one
    packed projection.

    Raises:
        ValueError: shapes, dtypes, strides or devices that the kernels do not take.
    """
    _check(q_BLNK, k_BMNK, q_weight_K, k_weight_K, rope_2LR)
    return _forward(q_BLNK, k_BMNK, q_weight_K, k_weight_K, rope_2LR, eps)


@torch.library.custom_op("transfer1::qk_norm_rope", mutates_args=())
def _forward(
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    check_device("qk_norm_rope", q_BLNK.device)
    q_out, k_out = _empty_like(q_BLNK), _empty_like(k_BMNK)
    blocks = _blocks(q_BLNK, k_BMNK)
    q_tiles, k_tiles = _tiles(q_BLNK, blocks), _tiles(k_BMNK, blocks)
    launch(
        qk_norm_rope_kernel,
        (q_tiles + k_tiles,),
        {
            **_operands(q_BLNK, k_BMNK, q_weight_K, k_weight_K, rope_2LR, eps),
            "q_out": q_out,
            "k_out": k_out,
            "q_tiles": q_tiles,
            **blocks,
        },
        device=q_BLNK.device,
        num_warps=_warps(q_BLNK),
    )
    return q_out, k_out


@_forward.register_fake
def _(
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _empty_like(q_BLNK), _empty_like(k_BMNK)


@torch.library.custom_op("transfer1::qk_norm_rope_backward", mutates_args=())
def _backward(
    q_out_grad: Tensor,
    k_out_grad: Tensor,
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, K = q_BLNK.device, q_BLNK.shape[-1]
    q_out_grad, k_out_grad = _with_contiguous_heads(q_out_grad), _with_contiguous_heads(k_out_grad)
    q_grad, k_grad = _empty_like(q_BLNK), _empty_like(k_BMNK)
    q_weight_grad, k_weight_grad = torch.empty_like(q_weight_K), torch.empty_like(k_weight_K)
    blocks = _blocks(q_BLNK, k_BMNK)
    q_tiles, k_tiles = _tiles(q_BLNK, blocks), _tiles(k_BMNK, blocks)
    q_programs, k_programs = min(q_tiles, BACKWARD_PROGRAMS), min(k_tiles, BACKWARD_PROGRAMS)
    partials = torch.empty(q_programs + k_programs, K, dtype=torch.float32, device=device)
    sums = {
        "q_partials": partials[:q_programs],
        "k_partials": partials[q_programs:],
        "q_programs": q_programs,
        "k_programs": k_programs,
    }
    launch(
        qk_norm_rope_backward_kernel,
        (q_programs + k_programs,),
        {
            **_operands(q_BLNK, k_BMNK, q_weight_K, k_weight_K, rope_2LR, eps),
            "q_out_grad": q_out_grad,
            "k_out_grad": k_out_grad,
            **_strides("q_grad", q_out_grad),
            **_strides("k_grad", k_out_grad),
            "q_grad": q_grad,
            "k_grad": k_grad,
            "q_tiles": q_tiles,
            "k_tiles": k_tiles,
            **sums,
            **blocks,
        },
        device=device,
        num_warps=_warps(q_BLNK),
        # Every lane has a token of its own then; without a word, ptxas spills to get below 80.
        max_registers=96 if blocks["BLOCK_T"] > 1 else None,
    )
    launch(
        weight_gradients_kernel,
        (triton.cdiv(K, SUM_COLUMNS), 2),
        {
            "q_weight_grad": q_weight_grad,
            "k_weight_grad": k_weight_grad,
            **sums,
            "K": K,
            "BLOCK_P": SUM_ROWS,
            "BLOCK_K": SUM_COLUMNS,
        },
        device=device,
        num_warps=4,
    )
    return q_grad, k_grad, q_weight_grad, k_weight_grad


@_backward.register_fake
def _(
    q_out_grad: Tensor,
    k_out_grad: Tensor,
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = torch.empty_like(q_weight_K), torch.empty_like(k_weight_K)
    return _empty_like(q_BLNK), _empty_like(k_BMNK), *weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, *out_grads: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(*out_grads, *ctx.saved_tensors, ctx.eps), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _empty_like(x_BLNK: Tensor) -> Tensor:
    return torch.empty_like(x_BLNK, memory_format=torch.contiguous_format)


def _with_contiguous_heads(x_BLNK: Tensor) -> Tensor:
    return x_BLNK if x_BLNK.stride(-1) == 1 else x_BLNK.contiguous()


def _warps(x_BLNK: Tensor) -> int:
    return LANES // (64 if is_amd(target_of(x_BLNK.device)) else 32)


def _blocks(q_BLNK: Tensor, k_BMNK: Tensor) -> dict[str, int]:
    """Shape of a tile: as many heads at a time as leave the fewest lanes idle.

    A tile has fewer cosines than lanes, so that every lane loads those that it needs; more of them
    would be loaded in narrow accesses and pass through shared memory. Where there are too few heads
    for that, a tile has one, and cosines have the shape of the heads.
    """
    N, R = q_BLNK.shape[2], q_BLNK.shape[3] // 2
    per_lane = 16 // max(q_BLNK.itemsize, k_BMNK.itemsize)
    tile = LANES * per_lane
    block_r = triton.next_power_of_2(R)
    limit = min(triton.next_power_of_2(N), tile // block_r)
    block_n = min(
        (limit >> halvings for halvings in range(3) if limit >> halvings > per_lane),
        key=lambda heads: triton.cdiv(N, heads) * heads,
        default=1,
    )
    block_t = tile // (block_r * block_n)
    return {"N": N, "R": R, "BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_R": block_r}


def _tiles(x_BLNK: Tensor, blocks: dict[str, int]) -> int:
    tokens = x_BLNK.shape[0] * x_BLNK.shape[1]
    return triton.cdiv(tokens, blocks["BLOCK_T"]) * triton.cdiv(blocks["N"], blocks["BLOCK_N"])


def _strides(name: str, x_BLNK: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": x_BLNK.stride(i) for i, axis in enumerate("bln")}


def _operands(
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> dict[str, Any]:
    """Arguments of the kernels that describe the inputs."""
    rope_strides = (0, 0) if rope_2LR is None else rope_2LR.stride()[:2]
    return {
        "q": q_BLNK,
        "k": k_BMNK,
        "q_weight": q_weight_K,
        "k_weight": k_weight_K,
        "rope": rope_2LR,
        "q_tokens": q_BLNK.shape[0] * q_BLNK.shape[1],
        "k_tokens": k_BMNK.shape[0] * k_BMNK.shape[1],
        "q_length": q_BLNK.shape[1],
        "k_length": k_BMNK.shape[1],
        **_strides("q", q_BLNK),
        **_strides("k", k_BMNK),
        "rope_stride_c": rope_strides[0],
        "rope_stride_l": rope_strides[1],
        "eps": eps,
    }


def _check(
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
) -> None:
    """Raise ValueError for what the kernels do not take."""
    if q_BLNK.ndim != 4:
        raise _error(f"q has shape {tuple(q_BLNK.shape)}, but must be [B, L, N, K]")
    B, L, N, K = q_BLNK.shape
    if K % 2 or not 2 <= K <= MAX_HEAD_SIZE:
        raise _error(f"heads have size {K}, but must be even and at most {MAX_HEAD_SIZE}")
    if k_BMNK.ndim != 4 or (k_BMNK.shape[0], *k_BMNK.shape[2:]) != (B, N, K):
        raise _error(f"k has shape {tuple(k_BMNK.shape)}, but must be [{B}, M, {N}, {K}]")
    tensors = {"q": q_BLNK, "k": k_BMNK, "q_weight": q_weight_K, "k_weight": k_weight_K}
    for name in ("q_weight", "k_weight"):
        if tensors[name].shape != (K,):
            raise _error(f"{name} has shape {tuple(tensors[name].shape)}, but must be [{K}]")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            allowed = ", ".join(str(dtype) for dtype in FLOATS)
            raise _error(f"{name} is {tensor.dtype}, but must be one of {allowed}")
    if rope_2LR is not None:
        M = k_BMNK.shape[1]
        if M != L:
            raise _error(f"with positions q and k must be equally long, but L={L} and M={M}")
        if rope_2LR.shape != (2, L, K // 2) or rope_2LR.dtype != torch.float32:
            raise _error(
                f"rope has shape {tuple(rope_2LR.shape)} and is {rope_2LR.dtype}, but must be "
                f"{[2, L, K // 2]} and torch.float32"
            )
        if rope_2LR.requires_grad:
            raise _error("rope requires a gradient, but the kernels have none for it")
        tensors["rope"] = rope_2LR
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise _error(f"{name} has strides {tensor.stride()}, but the last one must be 1")
        if tensor.device != q_BLNK.device:
            raise _error(f"{name} is on {tensor.device}, but q is on {q_BLNK.device}")


def _error(problem: str) -> ValueError:
    return ValueError(f"qk_norm_rope: {problem}; or set kernels.qk_norm_rope=reference")
