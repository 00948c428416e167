"""Group `optimizer`."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import PLACEHOLDER
from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `optimizer`: ours, and PyTorch's own to compare with."""
    store = ConfigStore.instance().store
    common = {"lr": 1e-4, "weight_decay": 0.3, "betas": [0.9, 0.999], "eps": 1e-8}
    for name, node in (
        (
            "fusedadamw",
            L("transfer1.training.optimizer.build_optimizer")(
                model=PLACEHOLDER,
                **common,
                master_weights=True,
                master_remainder=False,
                stochastic_rounding=False,
                capturable=True,
            ),
        ),
        (
            "adamw",
            L("transfer1.training.torch_optimizer.build_adamw")(model=PLACEHOLDER, **common),
        ),
    ):
        store(group="optimizer", package="optimizer", name=name, node=node)
