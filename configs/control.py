"""Group `hint_key`: what the control branch sees.

A control modality is one row of `CONTROLS` and one class in `transfer1/data/controls`; its hint
key, its entries in the data groups and its experiments derive from the row. A file of one's own may
add both before it calls `make_config` (`tests/new_control.py` does).
"""

from __future__ import annotations

import attrs
from hydra.core.config_store import ConfigStore


@attrs.frozen
class Control:
    """One control modality.

    Attributes:
        name: as in `control_input_<name>`, a key of `transfer1.data.controls.CONTROLS`; no
            underscore, which joins the names of several controls.
        dataset_dir: folder of its example data.
        family: experiments it is trained in: `lvg` (videos of anything, first frames given), or
            `av` (driving).
    """

    name: str = attrs.field(validator=attrs.validators.matches_re("[a-z0-9]+"))
    dataset_dir: str = "datasets/hdvila"
    family: str = "lvg"

    @property
    def hint_key(self) -> str:
        """Key of the control in a batch."""
        return f"control_input_{self.name}"


CONTROLS = [
    Control("vis"),
    Control("edge"),
    Control("depth"),
    Control("seg"),
    Control("keypoint"),
    Control("upscale"),
    Control("hdmap", "datasets/waymo_transfer1/", family="av"),
    Control("lidar", "datasets/waymo_transfer1/", family="av"),
]


def register() -> None:
    """Store the options of `hint_key`."""
    store = ConfigStore.instance().store
    for control in CONTROLS:
        for suffix, grayscale in (("", False), ("_grayscale", True)):
            store(
                group="hint_key",
                package="model",
                name=control.hint_key + suffix,
                node={"hint_key": {"hint_key": control.hint_key, "grayscale": grayscale}},
            )
