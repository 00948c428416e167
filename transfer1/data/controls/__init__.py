"""Control inputs: what the network is told about the video it shall make.

A control modality is one class and one entry in `CONTROLS`; a row of the same name in
`configs/control.py` gives it its hint key, its data groups and its experiments. A control is
computed from the frames of the video, or drawn from a file stored beside it.

The batch key of a control is `control_input_<name>`; that of several at once joins their names, as
in `control_input_edge_depth`, and holds three channels for each, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer1.data.controls.base import (
    PRESETS,
    ComputedControl,
    Control,
    Depth,
    Drawn,
    HDMap,
    Lidar,
    Source,
    StoredControl,
    shrink_to_grid,
)
from transfer1.data.controls.edge import Edge
from transfer1.data.controls.keypoint import Keypoint
from transfer1.data.controls.seg import Seg
from transfer1.data.controls.upscale import Upscale
from transfer1.data.controls.vis import Vis

__all__ = [
    "CONTROLS",
    "PRESETS",
    "ComputedControl",
    "Control",
    "Depth",
    "Drawn",
    "Edge",
    "HDMap",
    "Keypoint",
    "Lidar",
    "Seg",
    "Source",
    "StoredControl",
    "Upscale",
    "Vis",
    "build_controls",
    "control_names",
    "shrink_to_grid",
]

PREFIX = "control_input_"

# name -> class; another modality may be added at import time
CONTROLS: dict[str, type[Control]] = {
    "vis": Vis,
    "edge": Edge,
    "depth": Depth,
    "seg": Seg,
    "keypoint": Keypoint,
    "upscale": Upscale,
    "hdmap": HDMap,
    "lidar": Lidar,
}


def control_names(hint_key: str) -> list[str]:
    """Return the names of the controls that a batch key holds.

    Raises:
        ValueError: an unknown name, or the same twice.
    """
    names = hint_key.removeprefix(PREFIX).split("_")
    known = hint_key.startswith(PREFIX) and all(name in CONTROLS for name in names)
    if not known or len(set(names)) < len(names):
        choices = ", ".join(PREFIX + name for name in sorted(CONTROLS))
        raise ValueError(
            f"hint_key={hint_key}: choose one of {choices}, or several with their names joined, "
            f"each once, as in {PREFIX}edge_depth"
        )
    return names


def build_controls(
    hint_key: str,
    preset: str = "medium",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Control]:
    """Return the controls of a batch key by name, in the order of its channels.

    Args:
        hint_key: batch key.
        preset: strength outside training.
        options: name of a control -> arguments of its class.

    Raises:
        ValueError: unknown key, preset, name or argument.
    """
    names, options = control_names(hint_key), options or {}
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ValueError(
            f"control_options.{unknown[0]}: hint_key={hint_key} has no such control; it has "
            f"{', '.join(names)}"
        )
    controls = {}
    for name in names:
        try:
            controls[name] = CONTROLS[name](preset, **options.get(name, {}))
        except TypeError as error:
            raise ValueError(f"control_options.{name}: {error}") from error
    return controls
