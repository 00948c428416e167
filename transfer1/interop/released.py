"""Released files against the networks of an experiment: strict, with an account of every key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from transfer1.config import Config, ConfigError, instantiate
from transfer1.model.layers import LogVariance

from . import keys
from .layouts import Checkpoint

BASE_OF_CONTROL = keys.Rule("base, not part of the control branch", r"^base_model\.")
LOG_VARIANCE = keys.Rule("log-variance head, not part of the control branch", r"^logvar\.")
PREFIX = "net."


def control_state(
    state: Mapping[str, Tensor], report: keys.KeyReport | None = None
) -> tuple[dict[str, Tensor], keys.KeyReport]:
    """Select the control branch (`net.*`) of a control file, with or without its base."""
    rules = (keys.EXTRA_STATE, keys.COMPILED, keys.CONDITIONER, BASE_OF_CONTROL, LOG_VARIANCE)
    return keys.apply_rules(state, rules, report)


def check(found: Checkpoint, part: str, config: Config) -> list[str]:
    """Load a checkpoint into a network without memory and tell what happened to every key.

    Args:
        found: the file.
        part: "base" or "control".
        config: the experiment whose networks it is for.

    Returns:
        lines, one per key that was read under another name or not at all, then a summary.

    Raises:
        ConfigError: the experiment has no such network.
        ValueError: a wrong prefix, missing or unknown keys, or other shapes, with counts.
    """
    node = config.model.net if part == "base" else config.model.net_ctrl
    if node is None:
        raise ConfigError(f"this experiment has no {part}: add `-- experiment=NAME` with one")
    with torch.device("meta"):
        network = nn.ModuleDict({"net": instantiate(node)})
        if part == "base":
            network["logvar"] = LogVariance()
    report = found.report
    if part == "base":
        state, report = keys.base_state(found.model, report)
        optional: tuple[keys.Rule, ...] = (keys.FRESH_LOG_VARIANCE, keys.POSITION_INDEX)
    else:
        state, report = control_state(found.model, report)
        optional = (keys.POSITION_INDEX,)
    check_prefix(state, part)
    placeless = {name: tensor.to("meta") for name, tensor in state.items()}
    keys.load_strictly(network, placeless, optional, report)
    lines = [
        f"{verb:<8} {key}  ({rule})"
        for verb in ("renamed", "ignored", "absent")
        for rule, names in getattr(report, verb).items()
        for key in names
    ]
    return [*(f"loaded   {key} {tuple(state[key].shape)}" for key in state), *lines, str(report)]


def check_prefix(state: Mapping[str, Tensor], part: str) -> None:
    """Raise ValueError where no key begins as those of released files do."""
    if any(key.startswith(PREFIX) for key in state):
        return
    prefixes = Counter(key.split(".")[0] + "." for key in state)
    seen = ", ".join(f"{count} {prefix}*" for prefix, count in prefixes.most_common(4)) or "none"
    raise ValueError(
        f"no key of the file is a weight of the {part}, which begin with {PREFIX!r}; after the "
        f"rules its keys are: {seen}, for example {next(iter(state), 'none')}"
    )


def describe(path: Path) -> str:
    """Which part a released file is, by its name: `*_control.pt` or a base."""
    return "control" if "control" in path.stem else "base"
