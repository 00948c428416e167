"""`make demo`: an edge-control model on two real clips, small enough for two CPU cores."""

from __future__ import annotations

from typing import Any

from transfer1.config import LazyCall as L

FRAMES = 17
STEPS = 540
SIZE = [96, 224]  # height, width in pixels
TEXT_TOKENS = 8  # the captions are short, and their embeddings carry no meaning

NETWORK: dict[str, Any] = {
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 16,
    "model_channels": 256,
    "num_blocks": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "adaln_lora_dim": 64,
}


def dataloader(part: str, is_train: bool) -> Any:
    """Clips of `python -m transfer1.data.demo`, decoded once and kept in memory."""
    dataset = {
        "dataset_dir": f"datasets/demo/{part}",
        "num_frames": FRAMES,
        "resolution": SIZE,
        "hint_key": "control_input_edge",
        "is_train": is_train,
        "cache_frames": True,
        "num_text_tokens": TEXT_TOKENS,
        "fps": 24.0,  # clips of 25 and 29.97 frames per second share a batch
    }
    if is_train:
        dataset["augmentation"] = L("transfer1.data.augment.Augmentation")(
            flip_probability=0.5, min_crop=0.85, frame_strides=[1, 2]
        )
    else:
        dataset["control_strength"] = "low"  # near the mean of what training draws
    return L("transfer1.data.loader.build_dataloader")(
        dataset=L("transfer1.data.dataset.TransferDataset")(**dataset),
        stream=is_train,
        batch_size=4 if is_train else 1,
        num_workers=1 if is_train else 0,
        drop_last=is_train,
    )


DEMO_EDGE = {
    "defaults": [
        {"override /net": "tiny_fa"},
        {"override /net_ctrl": "tiny_fa"},
        {"override /callbacks": "held_out"},
        "_self_",
    ],
    "job": {"project": "transfer1", "group": "demo", "name": "edge"},
    "model": {
        "precision": "float32",
        "latent_shape": [16, 3, 12, 28],
        "loss_add_logvar": False,
        "loss_reduce": "mean",
        "finetune_base_model": True,  # there is no pretrained base: both learn together
        "sde": {"p_mean": 0.45, "p_std": 1.4},
        "net": NETWORK,
        "net_ctrl": {
            **NETWORK,
            "num_control_blocks": 2,
            "hint_gain": 3.0,  # so that the hint counts within a few hundred updates
            "dropout_ctrl_branch": 0.0,
        },
        "conditioner": {
            "text": {"dropout_rate": 0.0},
            # No first frames are given: the control is all that tells where things are.
            "video_cond_bool": {"dropout_rate": 0.0, "first_random_n_num_condition_t_max": 0},
        },
    },
    "optimizer": {"lr": 2e-3, "weight_decay": 0.01, "betas": [0.9, 0.99], "eps": 1e-15},
    "scheduler": {
        "warm_up_steps": [20],
        "cycle_lengths": [STEPS + 100],
        "f_start": [0.05],
        "f_min": [0.1],
    },
    "dataloader_train": dataloader("train", is_train=True),
    "dataloader_val": dataloader("held_out", is_train=False),
    "trainer": {
        "max_iter": STEPS,
        "timestamp_seed": False,
        "logging_iter": 10,
        "callbacks": {
            "iter_speed": {"hit_thres": 0, "every_n": 100},
            "held_out": {"every_n": 180},
        },
    },
    "checkpoint": {"save_iter": 180},
}
