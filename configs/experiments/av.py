"""The released control models on driving clips; no frames are given.

`CTRL_7Bv1pt3_t2w_<57 or 121>frames_control_input_<control>_block3_<pretrain or posttrain>`, for
every row of `configs/control.py` of this family. Those of several cameras at once (sv2mv) are
known by name only.
"""

from __future__ import annotations

from typing import Any

from configs.control import CONTROLS

from . import released

RELEASE = "checkpoints/nvidia/Cosmos-Transfer1-7B-Sample-AV/checkpoints_tp"


def hint_keys() -> list[str]:
    """Controls of this family."""
    return [control.hint_key for control in CONTROLS if control.family == "av"]


def experiment(hint_key: str, num_frames: int, phase: str) -> dict[str, Any]:
    """The node of one experiment."""
    name = f"CTRL_7Bv1pt3_t2w_{num_frames}frames_{hint_key}_block3_{phase}"
    node = released.experiment(name, hint_key, phase, "CTRL_7Bv1_sampleAV", RELEASE, first_frames=0)
    clips = {"dataset": {"num_frames": num_frames}}
    return released.merged(
        node,
        {
            "model": {
                "hint_dropout_rate": 0.15,
                "latent_shape": [16, (num_frames - 1) // 8 + 1, 88, 160],
                "tokenizer": {"pixel_chunk_duration": num_frames},
                "net_ctrl": {"hint_channels": 16},
            },
            "trainer": {"callbacks": {"iter_speed": {"hit_thres": 5}}},
            "dataloader_train": clips,
            "dataloader_val": clips,
        },
    )


def multi_view() -> dict[str, dict[str, Any]]:
    """Name -> node that is refused when it is chosen."""
    node: dict[str, Any] = {"defaults": [{"override /net_ctrl": "faditv2_sv2mv"}, "_self_"]}
    return {
        f"CTRL_7Bv1pt3_{task}_sv2mv_57frames_{hint_key}_block3_{phase}": node
        for task in ("t2w", "v2w")
        for hint_key in hint_keys()
        for phase in released.PHASES
    }


def experiments() -> dict[str, dict[str, Any]]:
    """Name -> node, without the multi-view ones."""
    nodes = [
        experiment(hint_key, num_frames, phase)
        for hint_key in hint_keys()
        for num_frames in (57, 121)
        for phase in released.PHASES
    ]
    return {node["job"]["name"]: node for node in nodes}
