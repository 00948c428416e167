"""Every released experiment shrunk to train on the demo data with a CPU, as `<its name>_cpu`.

All that is not about size stays: the recipe, the control, the kinds of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .released import merged

FRAMES = 17
SIZE = [64, 96]  # height, width in pixels

GROUPS = {
    "override /net": "tiny_fa",
    "override /net_ctrl": "tiny_fa",
    "override /tokenizer": "vae1",
}
NETWORK: dict[str, Any] = {
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 16,
    "model_channels": 64,
    "num_blocks": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "adaln_lora_dim": 16,
}


def dataloader(part: str) -> dict[str, Any]:
    """Short clips of `python -m transfer1.data.demo`, decoded once and kept in memory."""
    return {
        "dataset": {
            "dataset_dir": f"datasets/demo/{part}",
            "num_frames": FRAMES,
            "resolution": SIZE,
            "cache_frames": True,
            "num_text_tokens": 8,
            "fps": 24.0,
        },
        "batch_size": 2 if part == "train" else 1,
        "num_workers": 0,
    }


def shrunk(node: Mapping[str, Any]) -> dict[str, Any]:
    """The twin of one experiment."""
    defaults = [
        {key: GROUPS.get(key, option) for key, option in entry.items()}
        if isinstance(entry, dict)
        else entry
        for entry in node["defaults"]
    ]
    return merged(
        node,
        {
            "defaults": defaults,
            "job": {"name": f"{node['job']['name']}_cpu"},
            "model": {
                "precision": "float32",
                "latent_shape": [16, 3, SIZE[0] // 8, SIZE[1] // 8],
                "tokenizer": {"pixel_chunk_duration": FRAMES},
                "base_load_from": {"load_path": ""},
                "net": NETWORK,
                "net_ctrl": NETWORK,
            },
            "optimizer": {"lr": 1e-3},
            "scheduler": {"warm_up_steps": [10]},
            "dataloader_train": dataloader("train"),
            "dataloader_val": dataloader("held_out"),
            "model_parallel": {"tensor_model_parallel_size": 1, "sequence_parallel": False},
            "trainer": {
                "device": "cpu",
                "max_iter": 100,
                "logging_iter": 10,
                "timestamp_seed": False,
            },
            "checkpoint": {"load_path": "", "save_iter": 50, "strict_resume": True},
        },
    )
