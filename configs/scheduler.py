"""Group `scheduler`: the learning rate over updates."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `scheduler`."""
    ConfigStore.instance().store(
        group="scheduler",
        package="scheduler",
        name="lambdalinear",
        node=L("transfer1.training.schedule.LambdaLinear")(
            warm_up_steps=[1000],
            cycle_lengths=[10000000000000],
            f_start=[1.0e-6],
            f_max=[1.0],
            f_min=[1.0],
        ),
    )
