"""The five ops of an adaLN-modulated attention block, in plain PyTorch: their specification.

Statistics, modulation and rotation are computed in float32, in float64 for float64 inputs; results
have the dtype of x (of q).
Shift, scale, gate always come in this order and may have any row stride.

Letters: B batch, L tokens, M context tokens, D width, N heads, K head size, R = K / 2 rotary pairs.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _modulated_norm(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(_wide(x_BLD), x_BLD.shape[-1:], eps=eps)
    shift_B1D, scale_B1D = _wide(shift_BD)[:, None], _wide(scale_BD)[:, None]
    return torch.addcmul(shift_B1D, normed, 1 + scale_B1D).to(x_BLD.dtype)


@overload
def adaln_modulate(
    x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, position_LD: None = None
) -> Tensor: ...
@overload
def adaln_modulate(
    x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, position_LD: Tensor
) -> tuple[Tensor, Tensor]: ...
def adaln_modulate(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    position_LD: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Open a block: LayerNorm(x) * (1 + scale) + shift, after adding a positional embedding.

    Args:
        x_BLD: tokens.
        shift_BD: shift per sample.
        scale_BD: scale per sample, 0 means unchanged.
        eps: added to the variance.
        position_LD: embedding added to x first; [L, D] for all samples, or [B, L, D].

    Returns:
        The modulated tokens h [B, L, D]; with a position (x + position, h). h is computed from the
        sum as it is stored, so a backward pass sees the same statistics.
    """
    if position_LD is None:
        return _modulated_norm(x_BLD, shift_BD, scale_BD, eps)
    x_BLD = (_wide(x_BLD) + _wide(position_LD)).to(x_BLD.dtype)
    return x_BLD, _modulated_norm(x_BLD, shift_BD, scale_BD, eps)


def residual_adaln_modulate(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Join two sublayers: x' = x + gate * y and h = LayerNorm(x') * (1 + scale) + shift.

    Args:
        x_BLD: residual stream.
        y_BLD: output of the sublayer before.
        gate_BD: gate of the sublayer before.
        shift_BD: shift of the next sublayer.
        scale_BD: scale of the next sublayer.
        eps: added to the variance.

    Returns:
        (x', h), both [B, L, D]; h is computed from x' as it is stored.
    """
    x_BLD = gated_residual(x_BLD, y_BLD, gate_BD)
    return x_BLD, _modulated_norm(x_BLD, shift_BD, scale_BD, eps)


def gated_residual(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, addend_BLD: Tensor | None = None
) -> Tensor:
    """End a block: x + gate * y, plus the control residual or the hint where there is one.

    Returns:
        The residual stream [B, L, D].
    """
    total = torch.addcmul(_wide(x_BLD), _wide(gate_BD)[:, None], _wide(y_BLD))
    if addend_BLD is not None:
        total = total + _wide(addend_BLD)
    return total.to(x_BLD.dtype)


def qk_norm_rope(
    q_BLNK: Tensor,
    k_BMNK: Tensor,
    q_weight_K: Tensor,
    k_weight_K: Tensor,
    rope_2LR: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMS-normalise queries and keys per head, then rotate them by their positions.

    Component r of a head is paired with component r + R; both halves turn by the same angle.

    Args:
        q_BLNK: queries.
        k_BMNK: keys; M = L where they are rotated.
        q_weight_K: norm weight of the queries, shared by all heads.
        k_weight_K: norm weight of the keys.
        rope_2LR: float32 cosines and sines of the angles; None leaves positions out
            (cross-attention).
        eps: added to the mean square.

    Returns:
        (q, k) in the shapes and dtypes of the inputs.
    """
    return (
        _norm_rope(q_BLNK, q_weight_K, rope_2LR, eps),
        _norm_rope(k_BMNK, k_weight_K, rope_2LR, eps),
    )


def _norm_rope(x_BLNK: Tensor, weight_K: Tensor, rope_2LR: Tensor | None, eps: float) -> Tensor:
    normed = F.rms_norm(_wide(x_BLNK), x_BLNK.shape[-1:], _wide(weight_K), eps)
    if rope_2LR is None:
        return normed.to(x_BLNK.dtype)
    cos_LR, sin_LR = rope_2LR[:, :, None]  # one head axis, broadcast over N
    first, second = normed.chunk(2, dim=-1)
    rotated = (
        torch.addcmul(first * cos_LR, second, sin_LR, value=-1),
        torch.addcmul(second * cos_LR, first, sin_LR),
    )
    return torch.cat(rotated, dim=-1).to(x_BLNK.dtype)


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """Softmax attention without a mask, scores scaled by K ** -0.5.

    Returns:
        [B, L, N, K], contiguous in that order, so that merging the heads is a view.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
