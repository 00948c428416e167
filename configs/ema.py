"""Group `ema`: the averaged weights."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import PLACEHOLDER
from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `ema`: a power-law profile, or a constant rate."""
    for name, builder, rate, num in (
        ("power", "build_power_ema", 0.10, 3),
        ("reg", "build_constant_ema", 0.9999, 1),
    ):
        ConfigStore.instance().store(
            group="ema",
            package="model.ema",
            name=name,
            node=L(f"transfer1.training.ema.{builder}")(
                model=PLACEHOLDER, enabled=True, rate=rate, num=num, rank=PLACEHOLDER
            ),
        )
