"""Group `callbacks`; they run in the order in which they stand here."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L

MODULE = "transfer1.training.callbacks"


def register() -> None:
    """Store the options of `callbacks`: those of every run, and with scores on held-out clips."""
    basic = {
        "progress_bar": L(f"{MODULE}.ProgressBar")(),
        "grad_clip": L(f"{MODULE}.GradClip")(fsdp_enabled=True, model_key="model"),
        "low_prec": L(f"{MODULE}.LowPrecision")(update_iter=1),
        "iter_speed": L(f"{MODULE}.IterSpeed")(every_n=200, hit_thres=1000),
    }
    held_out = {"held_out": L("transfer1.training.report.HeldOutReport")(every_n=1000)}
    for name, node in (("basic", basic), ("held_out", {**basic, **held_out})):
        ConfigStore.instance().store(
            group="callbacks", package="trainer.callbacks", name=name, node=node
        )
