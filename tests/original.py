"""Builds our objects from class names and constructor arguments of the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kernels import select
from transfer1.config.removed import REMOVED_ARGUMENTS
from transfer1.model.block import TransformerBlock
from transfer1.model.control import ControlEncoder
from transfer1.model.dit import DiT
from transfer1.model.layers import FinalLayer, PatchEmbed, TimestepEmbedding, Timesteps
from transfer1.model.position import (
    FpsAwarePositionTable,
    LearnablePositionAxes,
    PositionTable,
    RotaryPosition1D,
    RotaryPosition3D,
    SinCosPositionAxes,
)

Arguments = dict[str, Any]
OPS = select("reference")  # kernels of what is built; a test may choose others


def network_arguments(init: Mapping[str, Any]) -> Arguments:
    """Replace what the original's networks take and ours do not."""
    arguments = {name: value for name, value in init.items() if name not in REMOVED_ARGUMENTS}
    if init.get("use_memory_save"):
        arguments["activation_checkpoint"] = "selective"
    if init.get("use_checkpoint"):
        arguments["activation_checkpoint"] = "block"
    return arguments


def dit(init: Mapping[str, Any], **extra: Any) -> DiT:
    assert not any(init.get("layer_mask") or ()), "a base network has all its blocks"
    return DiT(**network_arguments(init), **{"ops": OPS, **extra})


def frame_conditioned_dit(init: Mapping[str, Any], **extra: Any) -> DiT:
    return dit({"in_channels": 17, **init}, concat_frame_mask=True, **extra)


def control_encoder(init: Mapping[str, Any], **extra: Any) -> ControlEncoder:
    """`layer_mask[i] = True` leaves block i out; the encoder reads a frame mask if it has room."""
    arguments = network_arguments(init)
    if init.get("layer_mask"):
        arguments["num_control_blocks"] = list(init["layer_mask"]).index(True)
    frame_mask = init["in_channels"] > init["out_channels"]
    return ControlEncoder(**arguments, concat_frame_mask=frame_mask, **{"ops": OPS, **extra})


def block(init: Mapping[str, Any], config: str, **extra: Any) -> TransformerBlock:
    return TransformerBlock(
        block_config=init[config],
        width=init["x_dim"],
        context_dim=init["context_dim"],
        num_heads=init["num_heads"],
        mlp_ratio=init.get("mlp_ratio", 4.0),
        lora_dim=lora_dim(init),
        ops=extra.get("ops", OPS),
    )


def lora_dim(init: Mapping[str, Any]) -> int | None:
    return init.get("adaln_lora_dim", 256) if init.get("use_adaln_lora", False) else None


def final_layer(init: Mapping[str, Any], **extra: Any) -> FinalLayer:
    patch = init["spatial_patch_size"] ** 2 * init["temporal_patch_size"]
    return FinalLayer(
        init["hidden_size"],
        patch * init["out_channels"],
        lora_dim(init),
        extra.get("ops", OPS),
    )


def patch_embed(init: Mapping[str, Any]) -> PatchEmbed:
    assert not init.get("bias", False), "our patch embedding has no bias"
    names = ("spatial_patch_size", "temporal_patch_size", "in_channels", "out_channels")
    legacy = init.get("legacy_patch_emb", True)
    return PatchEmbed(**{name: init[name] for name in names}, legacy_patch_emb=legacy)


def position(cls: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    """A builder for a positional embedder whose only interpolation is cropping."""

    def build_position(init: Mapping[str, Any]) -> nn.Module:
        arguments = {**init, **fixed}
        assert arguments.pop("interpolation", "crop") == "crop"
        is_learnable = arguments.pop("is_learnable", False)
        if "learnable" in fixed:
            arguments["learnable"] = fixed["learnable"] or is_learnable
        return cls(**arguments)

    return build_position


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "GeneralDIT": dit,
    "VideoExtendGeneralDIT": frame_conditioned_dit,
    "GeneralDITEncoder": control_encoder,
    "DITBuildingBlock": lambda init, **extra: block(init, "block_type", **extra),
    "GeneralDITTransformerBlock": lambda init, **extra: block(init, "block_config", **extra),
    "FinalLayer": final_layer,
    "PatchEmbed": patch_embed,
    "SDXLTimesteps": lambda init: Timesteps(**{"num_channels": 320, **init}),
    "SDXLTimestepEmbedding": lambda init: TimestepEmbedding(**{"use_adaln_lora": False, **init}),
    "VideoRopePosition3DEmb": position(RotaryPosition3D),
    "VideoRopePositionEmb": lambda init: RotaryPosition1D(init["head_dim"]),
    "LearnablePosEmbAxis": position(LearnablePositionAxes),
    "SinCosPosEmbAxis": position(SinCosPositionAxes),
    "LearnableEmb3D": position(PositionTable, fixed=False, learnable=True),
    "SinCosPosEmb": position(PositionTable, fixed=True, learnable=False),
    "LearnableEmb3D_FPS_Aware": position(FpsAwarePositionTable, fixed=False, learnable=True),
    "SinCosPosEmb_FPS_Aware": position(FpsAwarePositionTable, fixed=True, learnable=False),
}


def build(cls: str, init: Mapping[str, Any], **extra: Any) -> Any:
    """Build our counterpart of a class of the original.

    Args:
        cls: class name of the original.
        init: its constructor arguments.
        extra: arguments that only our class has (ops, activation_checkpoint).
    """
    assert cls in BUILDERS, f"no translation for class {cls}; known: {', '.join(BUILDERS)}"
    return BUILDERS[cls](init, **extra)
