"""Group `pixel_corruptor`: damage to the control video in training."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L

MODULE = "transfer1.diffusion.corruption"


def register() -> None:
    """Store the options of `pixel_corruptor`; half of the clips stay as they are."""
    store = ConfigStore.instance().store
    group = "pixel_corruptor"
    store(group=group, package="model", name="none", node={"pixel_corruptor": None})
    for name, target, low, high in (
        ("blur", "Blur", 0.5, 4.0),
        ("jpeg", "Compression", 10, 75),
        ("noise", "Noise", 0.02, 0.2),
        ("downscale", "Downscale", 1.0, 4.0),
    ):
        node = L(f"{MODULE}.{target}")(low=low, high=high, probability=0.5)
        store(group=group, package="model.pixel_corruptor", name=name, node=node)
