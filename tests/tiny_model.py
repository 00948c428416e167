"""Networks of a few thousand parameters, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transfer1.diffusion.condition import Condition
from transfer1.model.control import ControlEncoder
from transfer1.model.dit import DiT

TINY: dict[str, Any] = {
    "max_img_h": 16,
    "max_img_w": 16,
    "max_frames": 8,
    "in_channels": 4,
    "out_channels": 4,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 48,
    "num_blocks": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "crossattn_emb_channels": 12,
    "pos_emb_cls": "rope3d",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
    "legacy_patch_emb": False,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
CONTROL: dict[str, Any] = {"num_control_blocks": 2, "hint_channels": 6}


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that matters; fresh networks are identities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tiny_dit(**changes: Any) -> DiT:
    network = DiT(**{**TINY, **changes})
    randomize(network)
    return network


def tiny_control(**changes: Any) -> ControlEncoder:
    network = ControlEncoder(**{**TINY, **CONTROL, **changes})
    randomize(network, seed=1)
    return network


def tiny_inputs(
    batch: int = 2, channels: int = 4, frames: int = 3, rows: int = 4, columns: int = 6
) -> tuple[Tensor, Tensor, Condition]:
    """(x [B, C, T, H, W], noise level [B], condition), each sample different."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, channels, frames, rows, columns, generator=generator)
    condition = Condition(
        context=torch.randn(batch, 5, 12, generator=generator),
        fps=torch.full((batch,), 30.0),
        padding_mask=(
            torch.rand(batch, 1, 8 * rows, 8 * columns, generator=generator) > 0.5
        ).float(),
    )
    return x, torch.linspace(-0.5, 0.4, batch), condition


def sample_of(condition: Condition, index: int) -> Condition:
    """The condition of one sample of a batch."""
    fields = {
        name: value[index : index + 1] if isinstance(value, Tensor) else value
        for name, value in vars(condition).items()
    }
    return Condition(**fields)
