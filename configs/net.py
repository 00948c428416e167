"""Group `net`: the base network."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L

# Shared with the control encoders of the same size.
COMMON: dict[str, Any] = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "block_config": "FA-CA-MLP",
    "pos_emb_cls": "rope3d",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "legacy_patch_emb": False,
}
FADITV2_7B = {**COMMON, "model_channels": 4096, "num_blocks": 28, "num_heads": 32}
TINY_FA = {**COMMON, "model_channels": 256, "num_blocks": 4, "num_heads": 2}


def register() -> None:
    """Store the options of `net`."""
    store = ConfigStore.instance().store
    for name, arguments in (("faditv2_7b", FADITV2_7B), ("tiny_fa", TINY_FA)):
        store(
            group="net",
            package="model.net",
            name=name,
            node=L("transfer1.model.dit.DiT")(**arguments),
        )
