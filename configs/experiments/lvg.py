"""The released control models on 121-frame clips of any kind, whose first frames may be given.

`CTRL_7Bv1pt3_lvg_tp_121frames_control_input_<control>_block3_<pretrain or posttrain>`, for every
row of `configs/control.py` of this family.
"""

from __future__ import annotations

from typing import Any

from configs.control import CONTROLS

from . import released

RELEASE = "checkpoints/nvidia/Cosmos-Transfer1-7B/checkpoints_tp"

# One more channel: the mask of given frames.
NETWORK: dict[str, Any] = {"in_channels": 17, "concat_frame_mask": True}


def experiment(hint_key: str, phase: str) -> dict[str, Any]:
    """The node of one experiment."""
    name = f"CTRL_7Bv1pt3_lvg_tp_121frames_{hint_key}_block3_{phase}"
    node = released.experiment(name, hint_key, phase, "CTRL_7Bv1_lvg", RELEASE, first_frames=2)
    return released.merged(
        node,
        {
            "model": {
                "hint_dropout_rate": 0.3,
                "net": {**NETWORK, "rope_t_extrapolation_ratio": 2.0},
                "net_ctrl": {**NETWORK, "hint_channels": 128},
            },
            "scheduler": {"warm_up_steps": [2500]},
        },
    )


def experiments() -> dict[str, dict[str, Any]]:
    """Name -> node."""
    nodes = [
        experiment(control.hint_key, phase)
        for control in CONTROLS
        if control.family == "lvg"
        for phase in released.PHASES
    ]
    return {node["job"]["name"]: node for node in nodes}
