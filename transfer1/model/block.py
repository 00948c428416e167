"""Transformer blocks: sublayers modulated by adaptive LayerNorm, joined by fused ops.

Letters: B batch, L tokens, M context tokens, C context width, D width, R rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import Ops

from .attention import Attention
from .layers import EPS, modulation_layers


class SelfAttention(nn.Module):
    """Attention of the tokens among themselves, with rotary positions."""

    def __init__(
        self, width: int, context_dim: int, num_heads: int, mlp_ratio: float, ops: Ops
    ) -> None:
        super().__init__()
        self.attn = Attention(width, width, num_heads, ops)

    def forward(self, h_BLD: Tensor, context_BMC: Tensor, rope_2LR: Tensor | None) -> Tensor:
        return self.attn(h_BLD, h_BLD, rope_2LR)


class CrossAttention(nn.Module):
    """Attention of the tokens to the context; positions do not enter."""

    def __init__(
        self, width: int, context_dim: int, num_heads: int, mlp_ratio: float, ops: Ops
    ) -> None:
        super().__init__()
        self.attn = Attention(width, context_dim, num_heads, ops)

    def forward(self, h_BLD: Tensor, context_BMC: Tensor, rope_2LR: Tensor | None) -> Tensor:
        return self.attn(h_BLD, context_BMC, None)


class MLP(nn.Module):
    """Two bias-free linear layers with an exact GELU between them."""

    def __init__(
        self, width: int, context_dim: int, num_heads: int, mlp_ratio: float, ops: Ops
    ) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, int(width * mlp_ratio), bias=False)
        self.layer2 = nn.Linear(int(width * mlp_ratio), width, bias=False)

    def forward(self, h_BLD: Tensor, context_BMC: Tensor, rope_2LR: Tensor | None) -> Tensor:
        return self.layer2(F.gelu(self.layer1(h_BLD)))


SUBLAYERS: dict[str, Callable[..., nn.Module]] = {
    "fa": SelfAttention,
    "full_attn": SelfAttention,
    "ca": CrossAttention,
    "cross_attn": CrossAttention,
    "mlp": MLP,
    "ff": MLP,
}


class Modulation(NamedTuple):
    """What the conditioning does to one sublayer, each [B, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class AdaLNSublayer(nn.Module):
    """Attention or MLP with the layers that turn the conditioning vector into its modulation.

    Args:
        kind: a key of `SUBLAYERS`, in any case.
        width: D.
        context_dim: width C of the context.
        num_heads: heads of an attention.
        mlp_ratio: hidden width of an MLP over D.
        lora_dim: rank of the modulation layers; None for one full layer.
        ops: the chosen kernels.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        context_dim: int,
        num_heads: int,
        mlp_ratio: float,
        lora_dim: int | None,
        ops: Ops,
    ) -> None:
        super().__init__()
        if kind.lower() not in SUBLAYERS:
            raise ValueError(
                f"block_config names a sublayer {kind!r}; "
                f"join any of {', '.join(SUBLAYERS)} with '-'"
            )
        self.block = SUBLAYERS[kind.lower()](width, context_dim, num_heads, mlp_ratio, ops)
        self.adaLN_modulation = modulation_layers(width, 3 * width, lora_dim)

    def modulation(self, emb_BD: Tensor, adaln_lora_B3D: Tensor | None) -> Modulation:
        """Shift, scale and gate: chunks of one tensor."""
        projected = self.adaLN_modulation(emb_BD)
        if adaln_lora_B3D is not None:
            projected = projected + adaln_lora_B3D
        return Modulation(*projected.chunk(3, dim=-1))

    def transform(self, h_BLD: Tensor, context_BMC: Tensor, rope_2LR: Tensor | None) -> Tensor:
        """The attention or the MLP on modulated tokens, before the gate."""
        return self.block(h_BLD, context_BMC, rope_2LR)


class TransformerBlock(nn.Module):
    """Sublayers in the order of `block_config`, for example "FA-CA-MLP"."""

    def __init__(
        self,
        block_config: str,
        width: int,
        context_dim: int,
        num_heads: int,
        mlp_ratio: float,
        lora_dim: int | None,
        ops: Ops,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.blocks = nn.ModuleList(
            AdaLNSublayer(kind, width, context_dim, num_heads, mlp_ratio, lora_dim, ops)
            for kind in block_config.split("-")
        )

    def forward(
        self,
        x_BLD: Tensor,
        emb_BD: Tensor,
        context_BMC: Tensor,
        rope_2LR: Tensor | None,
        adaln_lora_B3D: Tensor | None,
        position_LD: Tensor | None = None,
        addend_BLD: Tensor | None = None,
    ) -> Tensor:
        """Run the sublayers.

        Args:
            x_BLD: tokens.
            emb_BD: activated conditioning vector.
            context_BMC: text.
            rope_2LR: rotary table of self-attention.
            adaln_lora_B3D: modulation shared by all sublayers of the network.
            position_LD: embedding added to the tokens at the start; [L, D] or [B, L, D].
            addend_BLD: added to the result: a control residual, or the hint.

        Returns:
            [B, L, D].
        """
        sublayers: list[AdaLNSublayer] = list(self.blocks)  # type: ignore[arg-type]
        modulations = [sublayer.modulation(emb_BD, adaln_lora_B3D) for sublayer in sublayers]

        shift_BD, scale_BD, _ = modulations[0]
        if position_LD is None:
            h_BLD = self.ops.adaln_modulate(x_BLD, shift_BD, scale_BD, EPS)
        else:
            x_BLD, h_BLD = self.ops.adaln_modulate(x_BLD, shift_BD, scale_BD, EPS, position_LD)
        y_BLD = sublayers[0].transform(h_BLD, context_BMC, rope_2LR)

        for sublayer, (before, after) in zip(sublayers[1:], pairwise(modulations), strict=True):
            x_BLD, h_BLD = self.ops.residual_adaln_modulate(
                x_BLD, y_BLD, before.gate, after.shift, after.scale, EPS
            )
            y_BLD = sublayer.transform(h_BLD, context_BMC, rope_2LR)

        return self.ops.gated_residual(x_BLD, y_BLD, modulations[-1].gate, addend_BLD)


ACTIVATION_CHECKPOINT = ("none", "selective", "block")


def _save_products(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of attention and of matrix products; recompute everything cheap."""
    name = str(function)
    if "attention" in name or name in ("aten.mm.default", "aten.addmm.default"):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpointing(mode: str) -> Callable[..., Tensor]:
    """Return `run(block, *args)`, which decides what the backward pass keeps of a block.

    Args:
        mode: "none" keeps all activations, "selective" the results of matrix products and
            attention, "block" only the inputs of the block. The numbers are the same.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ACTIVATION_CHECKPOINT:
        raise ValueError(
            f"activation_checkpoint={mode!r}: choose one of {', '.join(ACTIVATION_CHECKPOINT)}"
        )
    if mode == "none":
        return lambda block, *args: block(*args)
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if mode == "block":
        return recompute
    contexts = partial(create_selective_checkpoint_contexts, _save_products)
    return partial(recompute, context_fn=contexts)
