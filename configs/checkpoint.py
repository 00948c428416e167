"""Groups `checkpoint` (when to save, what to start from) and `ckpt_klass` (the file layout)."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import PLACEHOLDER
from transfer1.config import LazyCall as L


def register() -> None:
    """Store the options of `checkpoint` and `ckpt_klass`."""
    store = ConfigStore.instance().store
    store(group="checkpoint", package="checkpoint", name="local", node={"save_iter": 1000})
    store(
        group="ckpt_klass",
        package="checkpoint.type",
        name="multi_rank",
        node=L("transfer1.training.checkpoint.MultiRankCheckpointer")(
            config=PLACEHOLDER, folder=PLACEHOLDER, callbacks=PLACEHOLDER
        ),
    )
