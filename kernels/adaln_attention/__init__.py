"""The fused adaLN-modulated attention: five ops that make up a transformer block.

Letters: B batch, L tokens, M context tokens, D width, N heads, K head size, R = K / 2 rotary pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import FLOATS, Case, Op, register
from . import reference

EPS = 1e-6
HEADS = (64, 96, 128, 256)  # sizes of attention heads, apart from that of the default case


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def _modulation(
    B: int, D: int, dtype: torch.dtype, device: torch.device | str | None
) -> dict[str, Tensor]:
    """Shift, scale and gate as the model has them: chunks of one projection, row stride 3 * D."""
    projected = 0.5 * torch.randn(B, 3 * D, dtype=dtype, device=device)
    names = ("shift_BD", "scale_BD", "gate_BD")
    chunks = projected.chunk(3, dim=-1)
    return {name: chunk.requires_grad_() for name, chunk in zip(names, chunks, strict=True)}


def adaln_modulate_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    B: int = 2,
    L: int = 77,
    D: int = 96,
    position: str | None = "LD",
    vector_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Tokens that open a block; a positional embedding is one for all ("LD") or one per sample."""
    shape = {"LD": (L, D), "BLD": (B, L, D)}
    modulation = _modulation(B, D, vector_dtype or dtype, device)
    return {
        "x_BLD": _leaf(B, L, D, dtype=dtype, device=device),
        "shift_BD": modulation["shift_BD"],
        "scale_BD": modulation["scale_BD"],
        "eps": EPS,
        "position_LD": _leaf(*shape[position], dtype=dtype, device=device) if position else None,
    }


def residual_adaln_modulate_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    B: int = 2,
    L: int = 77,
    D: int = 96,
    vector_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """A sublayer's output on its way into the next; gate, shift, scale of two projections."""
    before, after = (_modulation(B, D, vector_dtype or dtype, device) for _ in range(2))
    return {
        "x_BLD": _leaf(B, L, D, dtype=dtype, device=device),
        "y_BLD": _leaf(B, L, D, dtype=dtype, device=device),
        "gate_BD": before["gate_BD"],
        "shift_BD": after["shift_BD"],
        "scale_BD": after["scale_BD"],
        "eps": EPS,
    }


def gated_residual_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    B: int = 2,
    L: int = 77,
    D: int = 96,
    addend: bool = True,
    vector_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The end of a block, with or without a control residual."""
    return {
        "x_BLD": _leaf(B, L, D, dtype=dtype, device=device),
        "y_BLD": _leaf(B, L, D, dtype=dtype, device=device),
        "gate_BD": _modulation(B, D, vector_dtype or dtype, device)["gate_BD"],
        "addend_BLD": _leaf(B, L, D, dtype=dtype, device=device) if addend else None,
    }


def qk_norm_rope_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    B: int = 2,
    L: int = 77,
    M: int | None = None,
    N: int = 3,
    K: int = 32,
    packed: bool = False,
    weight_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Heads of self-attention with positions; with M, of cross-attention without.

    Packed heads are slices of one projection [B, L, 3 * N * K], as where q, k, v have one matrix.
    """
    if packed:
        projected = torch.randn(B, L, 3, N, K, dtype=dtype, device=device)
        q_BLNK, k_BMNK = (projected[:, :, i].requires_grad_() for i in range(2))
    else:
        q_BLNK = _leaf(B, L, N, K, dtype=dtype, device=device)
        k_BMNK = _leaf(B, L if M is None else M, N, K, dtype=dtype, device=device)
    angles_LR = torch.randn(L, K // 2, device=device) * 10
    rope_2LR = torch.stack([angles_LR.cos(), angles_LR.sin()]) if M is None else None
    return {
        "q_BLNK": q_BLNK,
        "k_BMNK": k_BMNK,
        "q_weight_K": _leaf(K, dtype=weight_dtype or dtype, device=device),
        "k_weight_K": _leaf(K, dtype=weight_dtype or dtype, device=device),
        "rope_2LR": rope_2LR,
        "eps": EPS,
    }


def attention_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    B: int = 2,
    L: int = 77,
    M: int = 53,
    N: int = 3,
    K: int = 32,
    packed: bool = False,
) -> dict[str, Any]:
    """Queries of the tokens, keys and values of a context of another length.

    Packed, all three are slices of one projection of the tokens, and M is L.
    """
    if packed:
        projected = torch.randn(B, L, 3, N, K, dtype=dtype, device=device)
        names = ("q_BLNK", "k_BMNK", "v_BMNK")
        slices = zip(names, projected.unbind(2), strict=True)
        return {name: part.requires_grad_() for name, part in slices}
    return {
        "q_BLNK": _leaf(B, L, N, K, dtype=dtype, device=device),
        "k_BMNK": _leaf(B, M, N, K, dtype=dtype, device=device),
        "v_BMNK": _leaf(B, M, N, K, dtype=dtype, device=device),
    }


def _read(inputs: dict[str, Any]) -> int:
    """Bytes of all input tensors, each read once."""
    return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))


def adaln_modulate_cost(**inputs: Any) -> tuple[int, int]:
    """Least (bytes, flops): read all inputs, write one or two tensors of the size of x."""
    x = inputs["x_BLD"]
    outputs = 1 if inputs["position_LD"] is None else 2
    return _read(inputs) + outputs * x.nbytes, (8 + outputs) * x.numel()


def residual_adaln_modulate_cost(**inputs: Any) -> tuple[int, int]:
    """Least (bytes, flops): read all inputs, write x' and the modulated tokens."""
    x = inputs["x_BLD"]
    return _read(inputs) + 2 * x.nbytes, 10 * x.numel()


def gated_residual_cost(**inputs: Any) -> tuple[int, int]:
    """Least (bytes, flops): read all inputs, write x'."""
    x = inputs["x_BLD"]
    return _read(inputs) + x.nbytes, (2 if inputs["addend_BLD"] is None else 3) * x.numel()


def qk_norm_rope_cost(**inputs: Any) -> tuple[int, int]:
    """Least (bytes, flops): read all inputs, write q and k."""
    q, k = inputs["q_BLNK"], inputs["k_BMNK"]
    per_element = 4 if inputs["rope_2LR"] is None else 7
    return _read(inputs) + q.nbytes + k.nbytes, per_element * (q.numel() + k.numel())


def attention_cost(**inputs: Any) -> tuple[int, int]:
    """Least (bytes, flops): read q, k, v, write one like q; two products of 2 L M K flops."""
    q, k = inputs["q_BLNK"], inputs["k_BMNK"]
    return _read(inputs) + q.nbytes, 4 * math.prod(q.shape) * k.shape[1]


register(
    Op(
        "adaln_modulate",
        reference.adaln_modulate,
        triton="kernels.adaln_attention.modulate:adaln_modulate",
        inputs=adaln_modulate_inputs,
        cost=adaln_modulate_cost,
        cases={
            "position": Case({"L": 21}),
            "position_per_sample": Case({"L": 21, "position": "BLD"}),
            "plain": Case({"L": 21, "position": None}),
            "full_width": Case({"L": 21, "D": 128}),
            "odd_width": Case({"B": 3, "L": 19, "D": 65}),
        },
        sizes={
            "2k_tokens": Case({"B": 1, "L": 2048, "D": 512, "position": None}),
            "7B": Case({"B": 1, "L": 56320, "D": 4096, "position": None}, FLOATS[1:]),
        },
    )
)
register(
    Op(
        "residual_adaln_modulate",
        reference.residual_adaln_modulate,
        triton="kernels.adaln_attention.modulate:residual_adaln_modulate",
        inputs=residual_adaln_modulate_inputs,
        cost=residual_adaln_modulate_cost,
        cases={
            "padded_width": Case({"L": 21}),
            "full_width": Case({"L": 21, "D": 128}),
            "odd_width": Case({"B": 3, "L": 19, "D": 65}),
        },
        sizes={
            "2k_tokens": Case({"B": 1, "L": 2048, "D": 512}),
            "7B": Case({"B": 1, "L": 56320, "D": 4096}, FLOATS[1:]),
        },
    )
)
register(
    Op(
        "gated_residual",
        reference.gated_residual,
        triton="kernels.adaln_attention.gated_residual:gated_residual",
        inputs=gated_residual_inputs,
        cost=gated_residual_cost,
        cases={
            "addend": Case({"L": 21}),
            "plain": Case({"L": 21, "addend": False}),
            "full_width": Case({"L": 21, "D": 128}),
            "odd_width": Case({"B": 3, "L": 19, "D": 65}),
        },
        sizes={
            "2k_tokens": Case({"B": 1, "L": 2048, "D": 512}),
            "7B": Case({"B": 1, "L": 56320, "D": 4096}, FLOATS[1:]),
        },
    )
)
register(
    Op(
        "qk_norm_rope",
        reference.qk_norm_rope,
        triton="kernels.adaln_attention.qk_norm_rope:qk_norm_rope",
        inputs=qk_norm_rope_inputs,
        cost=qk_norm_rope_cost,
        cases={
            "one_head_per_tile": Case(),
            "cross_attention": Case({"M": 11}),
            "packed": Case({"L": 9, "N": 16, "K": 64, "packed": True}),
            "token_per_tile": Case({"L": 5, "N": 32, "K": 128}),
            "blocks_of_heads": Case({"B": 3, "L": 3, "N": 40, "K": 128}),
            "few_tokens": Case({"B": 1, "L": 1, "M": 2, "N": 9, "K": 256}),
            "padded_heads": Case({"B": 1, "L": 9, "N": 12, "K": 96}),
            "float32_weights": Case({"weight_dtype": torch.float32}, FLOATS[1:]),
        },
        sizes={
            "2k_tokens": Case({"B": 1, "L": 2048, "N": 4, "K": 128}),
            "7B": Case({"B": 1, "L": 56320, "N": 32, "K": 128}),
            "7B_cross": Case({"B": 1, "L": 56320, "M": 512, "N": 32, "K": 128}),
        },
    )
)
register(
    Op(
        "attention",
        reference.attention,
        triton="kernels.adaln_attention.flash:attention",
        inputs=attention_inputs,
        cost=attention_cost,
        compiled="kernels.adaln_attention.compiled:attention",
        cases={
            "cross": Case(),
            "packed": Case({"packed": True, "L": 130, "K": 64}),
            "one_query": Case({"L": 1}),
            **{f"head_{K}": Case({"B": 1, "L": 150, "M": 133, "N": 1, "K": K}) for K in HEADS},
        },
        sizes={
            "2k_tokens": Case({"B": 1, "L": 2048, "M": 2048, "N": 4, "K": 128}),
            "7B": Case({"B": 1, "L": 56320, "M": 56320, "N": 32, "K": 128}, FLOATS[1:]),
            "7B_cross": Case({"B": 1, "L": 56320, "M": 512, "N": 32, "K": 128}, FLOATS[1:]),
        },
    )
)
