"""The ops `adaln_modulate` and `residual_adaln_modulate` in Triton, with their gradients.

Both are one op of `torch.library`, so that `torch.compile`, activation checkpointing and CUDA
graphs see it whole; `modulate_kernels.py` has the kernels and the mathematics.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .modulate_kernels import modulate_backward, modulate_forward
from .rows import check_rows, column_sum

_modulate = torch.library.custom_op("transfer1::modulate", modulate_forward, mutates_args=())
_modulate_backward = torch.library.custom_op(
    "transfer1::modulate_backward", modulate_backward, mutates_args=()
)


@_modulate.register_fake
def _(
    x_BLD: Tensor,
    y: Tensor | None,
    gate_BD: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x_BLD.new_empty((0,) if y is None else x_BLD.shape)
    mean_BL = x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32)
    return total, x_BLD.new_empty(x_BLD.shape), mean_BL, torch.empty_like(mean_BL)


@_modulate_backward.register_fake
def _(
    dh_BLD: Tensor,
    dtotal_BLD: Tensor | None,
    total_BLD: Tensor,
    mean_BL: Tensor,
    rstd_BL: Tensor,
    scale_BD: Tensor,
    y_BLD: Tensor | None,
    gate_BD: Tensor | None,
    vector_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, D = total_BLD.shape
    dy = total_BLD.new_empty(0) if y_BLD is None else y_BLD.new_empty(y_BLD.shape)
    vectors = total_BLD.new_empty(2 if y_BLD is None else 3, B, D, dtype=vector_dtype)
    return total_BLD.new_empty(total_BLD.shape), dy, vectors


@torch.library.custom_op("transfer1::sum_over_samples", mutates_args=())
def _sum_over_samples(x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the samples in float32, [L, D]."""
    B, L, D = x_BLD.shape
    return column_sum(x_BLD.contiguous().view(B, L * D), dtype).view(L, D)


@_sum_over_samples.register_fake
def _(x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BLD.new_empty(x_BLD.shape[1:], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BLD, y, gate_BD, shift_BD, scale_BD, _ = inputs
    total, _, mean_BL, rstd_BL = output
    ctx.mark_non_differentiable(mean_BL, rstd_BL)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x_BLD if y is None else total,
        mean_BL,
        rstd_BL,
        scale_BD,
        None if gate_BD is None else y,
        gate_BD,
    )
    ctx.y_dim, ctx.y_dtype = (None, None) if y is None else (y.dim(), y.dtype)
    ctx.vector_dtypes = [v.dtype for v in (shift_BD, scale_BD, gate_BD) if v is not None]


def _gradients(
    ctx: Any, dtotal: Tensor | None, dh_BLD: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    total_BLD, *rest = ctx.saved_tensors
    if dh_BLD is None:
        dh_BLD = torch.zeros_like(total_BLD)
    if ctx.y_dim is None:
        dtotal = None
    dx_BLD, dy, vectors = _modulate_backward(
        dh_BLD, dtotal, total_BLD, *rest, reduce(torch.promote_types, ctx.vector_dtypes)
    )
    dshift_BD, dscale_BD, *dgate_BD = (
        vector.to(dtype) for vector, dtype in zip(vectors, ctx.vector_dtypes, strict=True)
    )
    if not ctx.needs_input_grad[1]:
        dy = None
    elif ctx.y_dim == 2:
        dy = _sum_over_samples(dx_BLD, ctx.y_dtype)
    elif not dgate_BD:
        dy = dx_BLD.to(ctx.y_dtype)
    return dx_BLD, dy, *(dgate_BD or [None]), dshift_BD, dscale_BD, None


_modulate.register_autograd(_gradients, setup_context=_save)


def adaln_modulate(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    position_LD: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `reference.adaln_modulate`, in one launch, and two of the gradients.

    A third sums the gradient of a position that several samples share.
    """
    check_rows(
        "adaln_modulate",
        x_BLD,
        shift_BD=(shift_BD, "BD"),
        scale_BD=(scale_BD, "BD"),
        position_LD=(position_LD, "LD|BLD"),
    )
    if position_LD is not None and len(x_BLD) == 1:
        position_LD = position_LD.reshape(x_BLD.shape)  # its gradient is that of x: nothing to sum
    total_BLD, h_BLD, _, _ = _modulate(x_BLD, position_LD, None, shift_BD, scale_BD, eps)
    return h_BLD if position_LD is None else (total_BLD, h_BLD)


def residual_adaln_modulate(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `reference.residual_adaln_modulate`, in one launch, and two of the gradients."""
    check_rows(
        "residual_adaln_modulate",
        x_BLD,
        y_BLD=(y_BLD, "BLD"),
        gate_BD=(gate_BD, "BD"),
        shift_BD=(shift_BD, "BD"),
        scale_BD=(scale_BD, "BD"),
    )
    total_BLD, h_BLD, _, _ = _modulate(x_BLD, y_BLD, gate_BD, shift_BD, scale_BD, eps)
    return total_BLD, h_BLD
