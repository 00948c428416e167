"""Group `scheduler`: the learning rate over updates."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `scheduler`: after the warm-up constant, or falling to the end."""
    module = "transfer1.training.schedule"
    for name, target, warm_up, length, f_start, f_min in (
        ("lambdalinear", "LambdaLinear", 1000, 10000000000000, 1.0e-6, 1.0),
        ("lambdacosine", "LambdaWarmUpCosine", 1000, "${trainer.max_iter}", 1.0e-6, 0.0),
        ("constant", "LambdaLinear", 0, 10000000000000, 1.0, 1.0),
    ):
        ConfigStore.instance().store(
            group="scheduler",
            package="scheduler",
            name=name,
            node=L(f"{module}.{target}")(
                warm_up_steps=[warm_up],
                cycle_lengths=[length],
                f_start=[f_start],
                f_max=[1.0],
                f_min=[f_min],
            ),
        )
