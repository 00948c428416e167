"""Checkpoints of the original, in each of its file layouts, as one value in memory.

    original   X.pt = {model: {model, ema, trained_data_record}, optimizer, scheduler, ...}
    tpN        X_model_mp_R.pt for ranks R < N = {model, ema, trained_data_record}, and X.pt
    fsdp       X_reg_model.pt, X_ema_model.pt, X_optim.pt = {optimizer, scheduler}, and X.pt
    portable   one file, X.safetensors or X.pt: model under its names, averages spelled with "-"

Released files (a state dict, or one under "model") are read as `original`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import keys
from .files import Scratch, map_pt, map_safetensors, save_atomically, save_safetensors

WEIGHTS = ("model", "ema", "trained_data_record")
RANKS = "_model_mp_*.pt"


@dataclass
class Checkpoint:
    """What a checkpoint holds, whatever its files are; tensors are mapped.

    Attributes:
        layout: that of the files it was read from.
        model: weights by name.
        ema: averages by name, "." written as "-"; None where there are none.
        record: `trained_data_record`, samples by type; None where there is none.
        iteration: optimizer updates.
        training: optimizer, scheduler and what else resume needs; empty where there is none.
        report: keys that were dropped or renamed.
        notes: what was seen beside the file and is not part of this value.
    """

    layout: str
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    record: dict[str, Any] | None = None
    iteration: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    report: keys.KeyReport = field(default_factory=keys.KeyReport)
    notes: list[str] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Model and averages under the names of the portable layout.

        Raises:
            ValueError: an average has the name of a weight.
        """
        averages = self.ema or {}
        if both := self.model.keys() & averages.keys():
            raise ValueError(f"averages and weights share names, for example {sorted(both)[:3]}")
        return {**self.model, **averages}


def sibling(path: Path, suffix: str) -> Path:
    """X.pt -> X<suffix>."""
    return path.with_name(path.stem + suffix)


def read(path: Path, scratch: Scratch) -> Checkpoint:
    """Read a checkpoint; `path` is X.pt (or X.safetensors), its other files lie beside it.

    Shards of tensor-parallel ranks are joined into scratch files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds no weights, or shards do not belong together.
    """
    if path.suffix == ".safetensors":
        found = _read_safetensors(path)
    elif sibling(path, "_model_mp_0.pt").exists():
        found = _read_tensor_parallel(path, scratch)
    elif sibling(path, "_reg_model.pt").exists():
        found = _read_fsdp(path)
    else:
        found = _from_file(map_pt(path), path)
    found.model, found.report = keys.apply_rules(found.model, (keys.EXTRA_STATE, keys.COMPILED))
    others = sorted(path.parent.glob(f"{path.stem}_RANK*.pt"))
    if others:
        names = ", ".join(other.name for other in others)
        found.notes.append(f"averages of other rates are files of their own: {names}")
    if not found.model or not all(isinstance(v, Tensor) for v in found.model.values()):
        raise ValueError(f"{path} holds no model weights")
    return found


def _from_file(content: Mapping[str, Any], path: Path) -> Checkpoint:
    inner = content.get("model", content)
    if not isinstance(inner, Mapping):
        raise ValueError(f"{path} holds no model weights; its entries are {sorted(content)[:8]}")
    nested = isinstance(inner.get("model"), Mapping)
    parts = inner if nested else content
    if inner is content:
        return Checkpoint("original", dict(inner))
    return Checkpoint(
        layout="original" if nested or "optimizer" in content else "portable",
        model=dict(inner["model"] if nested else inner),
        ema=dict(averages) if (averages := parts.get("ema")) else None,
        record=parts.get("trained_data_record"),
        iteration=int(content.get("iteration") or 0),
        training={k: v for k, v in content.items() if k not in (*WEIGHTS, "iteration")},
    )


def _read_tensor_parallel(path: Path, scratch: Scratch) -> Checkpoint:
    shards = [map_pt(shard) for shard in keys.find_shards(sibling(path, RANKS))]
    ema = None
    if shards[0].get("ema"):
        dotted = [keys.apply_rules(shard["ema"], (keys.EMA_SPELLING,))[0] for shard in shards]
        merged = keys.merge_tensor_parallel(dotted, scratch.cat)
        ema = {name.replace(".", "-"): tensor for name, tensor in merged.items()}
    weights = [keys.apply_rules(shard["model"], (keys.EXTRA_STATE,))[0] for shard in shards]
    notes = []
    if sibling(path, "_optim_mp_0.pt").exists():
        notes.append("optimizer and schedule of tensor-parallel ranks are not converted")
    record = shards[0].get("trained_data_record")
    beside = sibling(path, "_trained_data_record.json")
    if record is None and beside.exists():
        record = json.loads(beside.read_text())
    return Checkpoint(
        layout=f"tp{len(shards)}",
        model=keys.merge_tensor_parallel(weights, scratch.cat),
        ema=ema,
        record=record,
        iteration=_iteration(path),
        notes=notes,
    )


def _read_fsdp(path: Path) -> Checkpoint:
    averages, optim = sibling(path, "_ema_model.pt"), sibling(path, "_optim.pt")
    ema = map_pt(averages) if averages.exists() else None
    return Checkpoint(
        layout="fsdp",
        model=map_pt(sibling(path, "_reg_model.pt")),
        # Flat state dicts: averages are spelled like the model.
        ema=ema and {name.replace(".", "-"): tensor for name, tensor in ema.items()},
        record=map_pt(path).get("trained_data_record") if path.exists() else None,
        iteration=_iteration(path),
        training=map_pt(optim) if optim.exists() else {},
    )


def _iteration(path: Path) -> int:
    return int(map_pt(path).get("iteration") or 0) if path.exists() else 0


def _read_safetensors(path: Path) -> Checkpoint:
    tensors, metadata = map_safetensors(path)
    ema = {name: tensor for name, tensor in tensors.items() if "-" in name}
    return Checkpoint(
        layout="portable",
        model={name: tensor for name, tensor in tensors.items() if name not in ema},
        ema=ema or None,
        record=json.loads(metadata.get("trained_data_record", "null")),
        iteration=int(metadata.get("iteration", 0)),
    )


def write(checkpoint: Checkpoint, path: Path, layout: str, scratch: Scratch) -> list[str]:
    """Write a checkpoint in one of the layouts above.

    Returns:
        what it holds that this layout has no place for.

    Raises:
        ValueError: an unknown layout, or weights that do not divide by the number of ranks.
    """
    weights = {
        "model": checkpoint.model,
        "ema": checkpoint.ema,
        "trained_data_record": checkpoint.record,
    }
    if layout == "original":
        whole = {"model": weights, **checkpoint.training, "iteration": checkpoint.iteration}
        save_atomically(whole, path)
        return []
    if layout == "portable":
        record = json.dumps(checkpoint.record)
        metadata = {"trained_data_record": record, "iteration": str(checkpoint.iteration)}
        if path.suffix == ".safetensors":
            save_safetensors(checkpoint.tensors(), path, metadata, scratch)
        else:
            save_atomically({**weights, "iteration": checkpoint.iteration}, path)
        return _left_out(checkpoint)
    if layout == "fsdp":
        save_atomically(checkpoint.model, sibling(path, "_reg_model.pt"))
        if checkpoint.ema:
            dotted = {name.replace("-", "."): tensor for name, tensor in checkpoint.ema.items()}
            save_atomically(dotted, sibling(path, "_ema_model.pt"))
        if checkpoint.training:
            save_atomically(checkpoint.training, sibling(path, "_optim.pt"))
        counts = {"iteration": checkpoint.iteration, "trained_data_record": checkpoint.record}
        save_atomically(counts, path)
        return []
    if match := re.fullmatch(r"tp(\d+)", layout):
        _write_tensor_parallel(checkpoint, path, int(match[1]), scratch)
        return _left_out(checkpoint)
    raise ValueError(f"--to {layout}: choose original, tpN (N ranks), fsdp, portable or diffusers")


def _write_tensor_parallel(
    checkpoint: Checkpoint, path: Path, ranks: int, scratch: Scratch
) -> None:
    for rank in range(ranks):
        shard = {
            "model": _shard(checkpoint.model, rank, ranks, scratch),
            "ema": checkpoint.ema and _shard(checkpoint.ema, rank, ranks, scratch),
            "trained_data_record": checkpoint.record,
        }
        save_atomically(shard, sibling(path, f"_model_mp_{rank}.pt"))
    save_atomically({"grad_scaler": {}, "iteration": checkpoint.iteration}, path)


def _shard(
    state: Mapping[str, Tensor], rank: int, ranks: int, scratch: Scratch
) -> dict[str, Tensor]:
    """One rank's part of a state dict, each part in a storage of its own."""
    shard = {}
    for name, tensor in state.items():
        axis = keys.split_axis(name.replace("-", "."))
        if axis is None:
            shard[name] = tensor
            continue
        if tensor.shape[axis] % ranks:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} does not divide by {ranks} ranks along axis {axis}"
            )
        shard[name] = scratch.copy(torch.chunk(tensor, ranks, axis)[rank])
    return shard


def _left_out(checkpoint: Checkpoint) -> list[str]:
    return sorted(checkpoint.training)
