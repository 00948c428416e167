"""Group `ema`: the averaged weights."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import PLACEHOLDER
from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `ema`."""
    ConfigStore.instance().store(
        group="ema",
        package="model.ema",
        name="power",
        node=L("transfer1.training.ema.build_power_ema")(
            model=PLACEHOLDER, enabled=True, rate=0.10, num=3, rank=PLACEHOLDER
        ),
    )
