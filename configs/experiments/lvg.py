"""The released control models on 121-frame clips, to train from the base or from the release."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore

RELEASE = "checkpoints/nvidia/Cosmos-Transfer1-7B/checkpoints_tp"

# name -> (control, job project, control weights to start from)
EXPERIMENTS = {
    "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3_pretrain": (
        "control_input_edge",
        "cosmos_transfer1_pretrain",
        "",
    ),
    "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3_posttrain": (
        "control_input_edge",
        "cosmos_transfer1_posttrain",
        f"{RELEASE}/edge_control.pt",
    ),
}

# What base and control encoder have in common: one more channel (the frame mask) and a learned
# position per block.
NETWORK: dict[str, Any] = {
    "in_channels": 17,
    "concat_frame_mask": True,
    "pos_emb_learnable": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}


def experiment(name: str, hint_key: str, project: str, load_path: str) -> dict[str, Any]:
    """The node of one experiment."""
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
        "job": {"project": project, "group": "CTRL_7Bv1_lvg", "name": name},
        "model": {
            "latent_shape": [16, 16, 88, 160],
            "loss_reduce": "mean",
            "adjust_video_noise": True,
            "hint_dropout_rate": 0.3,
            "base_load_from": {"load_path": f"{RELEASE}/base_model_model_mp_*.pt"},
            "conditioner": {
                "video_cond_bool": {
                    "dropout_rate": 0.0,
                    "condition_location": "first_random_n",
                    "first_random_n_num_condition_t_max": 2,
                    "augment_sigma_sample_p_mean": -3.0,
                    "augment_sigma_sample_p_std": 2.0,
                    "augment_sigma_sample_multiplier": 1.0,
                }
            },
            "net": {**NETWORK, "rope_t_extrapolation_ratio": 2.0},
            "net_ctrl": {**NETWORK, "hint_channels": 128, "num_control_blocks": 3},
        },
        "optimizer": {
            "lr": 2**-14.3,
            "weight_decay": 0.1,
            "betas": [0.9, 0.99],
            "eps": 1e-10,
        },
        "scheduler": {"warm_up_steps": [2500]},
        "trainer": {"max_iter": 999999999, "logging_iter": 200},
        "model_parallel": {"tensor_model_parallel_size": 8, "sequence_parallel": True},
        "checkpoint": {"load_path": load_path, "strict_resume": False},
    }


def register() -> None:
    """Store the experiments of this family."""
    for name, (hint_key, project, load_path) in EXPERIMENTS.items():
        ConfigStore.instance().store(
            group="experiment",
            package="_global_",
            name=name,
            node=experiment(name, hint_key, project, load_path),
        )
