"""What the released control models have in common, whatever their control and data.

An experiment is a mapping like a config file; one starts from the base, one from the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.config_store import ConfigStore

PHASES = ("pretrain", "posttrain")

# What base and control branch have in common: a learned position in every block.
NETWORK: dict[str, Any] = {
    "pos_emb_learnable": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}


def experiment(
    name: str, hint_key: str, phase: str, group: str, release: str, first_frames: int
) -> dict[str, Any]:
    """The node of one experiment, without what its recipe adds.

    Args:
        name: name of experiment and job.
        hint_key: `control_input_<name>`.
        phase: "pretrain" starts the control branch from the base, "posttrain" from its release.
        group: of the job.
        release: folder of the released weights.
        first_frames: largest number of latent frames that are given.
    """
    control = hint_key.removeprefix("control_input_")
    return {
        "defaults": [
            {"override /net": "faditv2_7b"},
            {"override /net_ctrl": "faditv2_7b"},
            {"override /conditioner": "ctrlnet_add_fps_image_size_padding_mask"},
            {"override /tokenizer": "cosmos_diffusion_tokenizer_res720_comp8x8x8_t121_ver092624"},
            {"override /hint_key": hint_key},
            {"override /callbacks": "basic"},
            {"override /checkpoint": "local"},
            {"override /ckpt_klass": "multi_rank"},
            {"override /data_train": f"example_transfer_train_data_{hint_key}"},
            {"override /data_val": f"example_transfer_val_data_{hint_key}"},
            "_self_",
        ],
        "job": {"project": f"cosmos_transfer1_{phase}", "group": group, "name": name},
        "model": {
            "latent_shape": [16, 16, 88, 160],
            "loss_reduce": "mean",
            "adjust_video_noise": True,
            "base_load_from": {"load_path": f"{release}/base_model_model_mp_*.pt"},
            "conditioner": {
                "video_cond_bool": {
                    "dropout_rate": 0.0,
                    "condition_location": "first_random_n",
                    "first_random_n_num_condition_t_max": first_frames,
                    "augment_sigma_sample_p_mean": -3.0,
                    "augment_sigma_sample_p_std": 2.0,
                    "augment_sigma_sample_multiplier": 1.0,
                }
            },
            "net": dict(NETWORK),
            "net_ctrl": {**NETWORK, "num_control_blocks": 3},
        },
        "optimizer": {"lr": 2**-14.3, "weight_decay": 0.1, "betas": [0.9, 0.99], "eps": 1e-10},
        "trainer": {"max_iter": 999999999, "logging_iter": 200},
        "model_parallel": {"tensor_model_parallel_size": 8, "sequence_parallel": True},
        "checkpoint": {
            "load_path": f"{release}/{control}_control.pt" if phase == "posttrain" else "",
            "strict_resume": False,
        },
    }


def merged(node: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an experiment with other values; both are left as they are."""
    result = dict(node)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def store(experiments: Mapping[str, dict[str, Any]]) -> None:
    """Register experiments by name."""
    for name, node in experiments.items():
        ConfigStore.instance().store(group="experiment", package="_global_", name=name, node=node)
