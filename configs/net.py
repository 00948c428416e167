"""Groups `net` and `net_ctrl`: the base network and its control branch, in the same sizes."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L
from transfer1.config.removed import MULTI_VIEW

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

# Option -> arguments. Heads are 128 wide throughout. The two sizes in between are for one GPU:
# 400m to train whole in 24 GB, 2b as a frozen base with a control branch that learns.
NETWORKS: dict[str, dict[str, Any]] = {
    "faditv2_7b": {**COMMON, "model_channels": 4096, "num_blocks": 28, "num_heads": 32},
    "faditv2_2b": {**COMMON, "model_channels": 2048, "num_blocks": 28, "num_heads": 16},
    "faditv2_400m": {**COMMON, "model_channels": 1024, "num_blocks": 20, "num_heads": 8},
    "tiny_fa": {**COMMON, "model_channels": 256, "num_blocks": 4, "num_heads": 2},
}


def register() -> None:
    """Store the options of `net` and `net_ctrl`; a control branch has the first half of the blocks.

    Multi-view networks are known by name only.
    """
    store = ConfigStore.instance().store
    for name, arguments in NETWORKS.items():
        base = L("transfer1.model.dit.DiT")(**arguments)
        control = L("transfer1.model.control.ControlEncoder")(
            **arguments, hint_channels=16, num_control_blocks=arguments["num_blocks"] // 2 + 1
        )
        store(group="net", package="model.net", name=name, node=base)
        store(group="net_ctrl", package="model.net_ctrl", name=name, node=control)
    store(group="net_ctrl", package="model.net_ctrl", name="faditv2_sv2mv", node=L(MULTI_VIEW)())
