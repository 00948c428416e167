"""Group `optimizer`."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import PLACEHOLDER
from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `optimizer`."""
    ConfigStore.instance().store(
        group="optimizer",
        package="optimizer",
        name="fusedadamw",
        node=L("transfer1.training.optimizer.build_optimizer")(
            model=PLACEHOLDER,
            lr=1e-4,
            weight_decay=0.3,
            betas=[0.9, 0.999],
            eps=1e-8,
            master_weights=True,
            capturable=True,
        ),
    )
