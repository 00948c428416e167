"""The content of a checkpoint file: written whole or not at all, read without running code.

A file has the original's layout `multi_rank`,
{model: {model, ema, trained_data_record}, optimizer, scheduler, grad_scaler, iteration}, and beside
it what resume needs to be bit-exact: float32 masters (in the optimizer state), seed, samples_seen,
ema_updates, skipped, skipped_in_a_row and the table of kernels.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from loguru import logger
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from transfer1.config import ConfigError
from transfer1.interop import keys
from transfer1.interop.files import REFERENCE_TYPES

from .shards import gather, is_sharded

LAYOUT = ("model", "optimizer", "scheduler", "grad_scaler", "iteration")
MODEL_LAYOUT = ("model", "ema", "trained_data_record")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read; the message names the file and what to do."""


def snapshot(value: Any, keep: bool = True) -> Any:
    """Copy nested dicts and lists with their tensors to the host; shared tensors stay shared.

    Sharded tensors become whole ones, for which all processes call this together.

    Args:
        value: what to copy.
        keep: False on processes that only help to gather; tensors are None then.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(item: Any) -> Any:
        if is_sharded(item):
            whole = gather(item)
            return whole.cpu() if keep else None
        if isinstance(item, Tensor):
            if not keep:
                return None
            key = (item.data_ptr(), item.dtype, item.shape, item.stride())
            if key not in copies:
                detached = item.detach()
                copies[key] = detached.clone() if detached.is_cpu else detached.cpu()
            return copies[key]
        if isinstance(item, Mapping):
            return {name: copy(child) for name, child in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(copy(child) for child in item)
        return item

    return copy(value)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain containers; nothing in it is executed.

    Raises:
        CheckpointError: the file is missing, truncated or holds other Python objects.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; check checkpoint.load_path, or the job's latest_checkpoint.txt"
        )
    try:
        with torch.serialization.safe_globals(REFERENCE_TYPES):
            content = torch.load(path, map_location=lambda storage, _: storage, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        types = get_unsafe_globals_in_checkpoint(path) if is_zipfile(path) else []
        if types:
            raise CheckpointError(
                f"{path} holds {', '.join(types)}, which is not loaded because it could run any "
                "code. Where it was written, keep only its weights: "
                'torch.save({"model": content["model"]}, path)'
            ) from error
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or no checkpoint: {first_line}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content


def to_layout(state: dict[str, Any]) -> dict[str, Any]:
    """Arrange a `TrainState.state_dict()` as the original does; its further entries follow."""
    return {
        "model": {name: state[name] for name in MODEL_LAYOUT},
        "optimizer": state["optimizer"],
        "scheduler": state["scheduler"],
        "grad_scaler": {},
        "iteration": state["iteration"],
        **{name: value for name, value in state.items() if name not in MODEL_LAYOUT + LAYOUT},
    }


def from_layout(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Undo `to_layout`. A plain state dict, or one under "model", is taken as the model alone.

    Entries that hold no weights go by the rules of `transfer1.interop.keys`, and are logged.

    Raises:
        CheckpointError: there are no weights in the file.
    """
    inner = content.get("model", content)
    named = inner["model"] if isinstance(inner.get("model"), Mapping) else inner
    weights, report = keys.apply_rules(named, keys.RELEASED)
    if report.ignored or report.renamed:
        logger.info(f"{path}: {report}")
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} holds no model weights; its entries are {sorted(content)}")
    loaded = {name: value for name, value in content.items() if name in LAYOUT[1:]}
    if inner is not named:
        loaded.update({name: inner[name] for name in MODEL_LAYOUT if name in inner})
    if inner is not content:
        extra = {name: value for name, value in content.items() if name not in LAYOUT}
        loaded.update(extra)
    loaded["model"] = weights
    loaded.setdefault("ema_updates", content.get("iteration", 0))
    return loaded


def fit_weights(
    weights: Mapping[str, Tensor], model: nn.Module, *, strict: bool, source: Path
) -> dict[str, Tensor]:
    """Return a full state dict for `model` made of `weights`.

    Adapters may be absent, all of them together: they start without effect.

    Not strict: entries that are missing or of another shape keep the values of the model, unknown
    ones are left out; all of them are logged.

    Raises:
        CheckpointError: strict and something differs, or nothing at all fits.
    """
    own = model.state_dict()
    unexpected = sorted(weights.keys() - own.keys())
    missing = sorted(own.keys() - weights.keys())
    adapters = [name for name in missing if re.search(keys.FRESH_ADAPTER.pattern, name)]
    if len(adapters) == sum(bool(re.search(keys.FRESH_ADAPTER.pattern, name)) for name in own):
        missing = [name for name in missing if name not in adapters]
        if adapters:
            logger.info(f"{source}: {len(adapters)} absent ({keys.FRESH_ADAPTER.name})")
    shapes = [
        f"{name} {tuple(weights[name].shape)} where the model has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    differences = [
        f"{len(names)} {label}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for label, names in (
            ("missing in the file", missing),
            ("unknown to the model", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    fitting = {
        name: value
        for name, value in weights.items()
        if name in own and value.shape == own[name].shape
    }
    if not fitting or (strict and differences):
        hint = "" if not fitting else "; checkpoint.strict_resume=false loads only what fits"
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(differences)}{hint}")
    for difference in differences:
        logger.warning(f"{source}: {difference}")
    return {**own, **fitting}
