"""Group `lora`: low-rank adapters in place of training the weights; null trains the weights."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import PLACEHOLDER
from transfer1.config import LazyCall as L

# Searched in the names of the linear layers; `base_model.net.` is the base, `net.` at the start the
# control branch.
TARGETS = {
    "attention": [r"\.attn\.to_(q|k|v|out)\.0$"],
    "attention_base": [r"^base_model\..*\.attn\.to_(q|k|v|out)\.0$"],
    "linear": [r"\.blocks\.\d\."],
    "linear_base": [r"^base_model\..*\.blocks\.\d\."],
}


def register() -> None:
    """Store the options of `lora`, by which layers have adapters."""
    for name, targets in TARGETS.items():
        ConfigStore.instance().store(
            group="lora",
            package="model.lora",
            name=name,
            node=L("transfer1.training.lora.apply_lora")(
                model=PLACEHOLDER, rank=16, alpha=16.0, targets=targets, freeze=True
            ),
        )
