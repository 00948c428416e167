"""Weights of our `DiT` in the names of diffusers' `CosmosTransformer3DModel`, and back.

The two compute the same function of the same weights. diffusers fixes what we leave open: blocks
"FA-CA-MLP", low-rank modulation, a normalised conditioning vector, rotary positions, a linear patch
embedding.

Differences in calling: diffusers takes one `fps` number and one padding mask [1, 1, H, W] per
batch, the frame mask as `condition_mask`, and control residuals as a list with one tensor per block
(`controlnet_block_every_n=1`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transfer1.model.dit import DiT

# Our name <-> theirs. {i} is a block; groups of alternatives correspond in order.
_SINGLE = {
    "x_embedder.proj.1.weight": "patch_embed.proj.weight",
    "extra_pos_embedder.pos_emb_t": "learnable_pos_embed.pos_emb_t",
    "extra_pos_embedder.pos_emb_h": "learnable_pos_embed.pos_emb_h",
    "extra_pos_embedder.pos_emb_w": "learnable_pos_embed.pos_emb_w",
    "t_embedder.1.linear_1.weight": "time_embed.t_embedder.linear_1.weight",
    "t_embedder.1.linear_2.weight": "time_embed.t_embedder.linear_2.weight",
    "affline_norm.weight": "time_embed.norm.weight",
    "final_layer.linear.weight": "proj_out.weight",
    "final_layer.adaLN_modulation.1.weight": "norm_out.linear_1.weight",
    "final_layer.adaLN_modulation.2.weight": "norm_out.linear_2.weight",
}
_BLOCK = {
    **{
        f"blocks.{sublayer}.block.attn.{ours}.weight": f"attn{sublayer + 1}.{theirs}.weight"
        for sublayer in (0, 1)
        for ours, theirs in (
            ("to_q.0", "to_q"),
            ("to_k.0", "to_k"),
            ("to_v.0", "to_v"),
            ("to_q.1", "norm_q"),
            ("to_k.1", "norm_k"),
            ("to_out.0", "to_out.0"),
        )
    },
    **{
        f"blocks.{sublayer}.adaLN_modulation.{layer}.weight": (
            f"norm{sublayer + 1}.linear_{layer}.weight"
        )
        for sublayer in (0, 1, 2)
        for layer in (1, 2)
    },
    "blocks.2.block.layer1.weight": "ff.net.0.proj.weight",
    "blocks.2.block.layer2.weight": "ff.net.2.weight",
}
_POSITION_INDEX = "pos_embedder.seq"  # only we store it: 0, 1, 2, ...

_OUR_BLOCK = re.compile(r"blocks\.block(\d+)\.(.+)")
_THEIR_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def _rename(
    key: str, single: Mapping[str, str], block: Mapping[str, str], pattern: re.Pattern, to: str
) -> str:
    if key in single:
        return single[key]
    match = pattern.fullmatch(key)
    if match is None or match[2] not in block:
        raise ValueError(
            f"{key!r} has no counterpart: only networks of rotary positions, FA-CA-MLP blocks, "
            "low-rank modulation and a linear patch embedding can be converted"
        )
    return to.format(match[1]) + block[match[2]]


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a `DiT` to `CosmosTransformer3DModel`.

    Raises:
        ValueError: a key without a counterpart.
    """
    return {
        _rename(key, _SINGLE, _BLOCK, _OUR_BLOCK, "transformer_blocks.{}."): tensor
        for key, tensor in state.items()
        if key != _POSITION_INDEX
    }


def from_diffusers(
    state: Mapping[str, Tensor], max_size: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Convert the state dict of a `CosmosTransformer3DModel` to a `DiT`.

    Args:
        state: its weights.
        max_size: frames, rows and columns of the largest token grid, which sets the length of the
            stored position index.

    Raises:
        ValueError: a key without a counterpart.
    """
    single = {theirs: ours for ours, theirs in _SINGLE.items()}
    block = {theirs: ours for ours, theirs in _BLOCK.items()}
    converted = {
        _rename(key, single, block, _THEIR_BLOCK, "blocks.block{}."): tensor
        for key, tensor in state.items()
    }
    index = torch.arange(max(max_size), dtype=torch.float32)
    return {_POSITION_INDEX: index, **converted}


# What diffusers fixes: argument of `DiT` -> the only value that converts.
_FIXED: dict[str, Any] = {
    "block_config": "FA-CA-MLP",
    "pos_emb_cls": "rope3d",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "legacy_patch_emb": False,
    "additional_timestamp_channels": None,
    "add_augment_sigma_embedding": False,
}


def all_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a `DiT` with its defaults filled in."""
    parameters = inspect.signature(DiT).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **{name: arguments[name] for name in arguments if name != "_target_"}}


def diffusers_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `CosmosTransformer3DModel` for those of a `DiT`.

    Args:
        arguments: all constructor arguments of the DiT, defaults included.

    Raises:
        ValueError: an option that diffusers does not have.
    """
    for name, value in _FIXED.items():
        if arguments[name] != value:
            raise ValueError(
                f"diffusers has no {name}={arguments[name]!r}; only {name}={value!r} converts"
            )
    extra = None
    if arguments["extra_per_block_abs_pos_emb"]:
        extra = arguments["extra_per_block_abs_pos_emb_type"]
        if extra != "learnable":
            raise ValueError(f"diffusers has no extra_per_block_abs_pos_emb_type={extra!r}")
    patch = arguments["patch_spatial"]
    return {
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "num_attention_heads": arguments["num_heads"],
        "attention_head_dim": arguments["model_channels"] // arguments["num_heads"],
        "num_layers": arguments["num_blocks"],
        "mlp_ratio": arguments["mlp_ratio"],
        "text_embed_dim": arguments["crossattn_emb_channels"],
        "adaln_lora_dim": arguments["adaln_lora_dim"],
        "max_size": tuple(arguments[name] for name in ("max_frames", "max_img_h", "max_img_w")),
        "patch_size": (arguments["patch_temporal"], patch, patch),
        "rope_scale": tuple(arguments[f"rope_{axis}_extrapolation_ratio"] for axis in "thw"),
        "concat_padding_mask": arguments["concat_padding_mask"],
        "extra_pos_embed_type": extra,
        "controlnet_block_every_n": 1,
    }
