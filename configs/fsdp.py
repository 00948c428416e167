"""Group `fsdp`: parameters, gradients and optimizer state sharded over the processes."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore


def register() -> None:
    """Store the options of `fsdp`: over all processes, in groups, or with shards on the host."""
    options: dict[str, dict[str, Any]] = {
        "full": {"sharding_strategy": "full"},
        "hybrid": {"sharding_strategy": "hybrid"},
        "offload": {"sharding_strategy": "full", "cpu_offload": True},
    }
    for name, node in options.items():
        ConfigStore.instance().store(
            group="fsdp",
            package="_global_",
            name=name,
            node={
                "trainer": {"distributed_parallelism": "fsdp"},
                "model": {"fsdp_enabled": True, "fsdp": node},
            },
        )
