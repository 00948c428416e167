"""`adapter` and `merge-lora`: adapters out of a checkpoint, or into its weights."""

from __future__ import annotations

from pathlib import Path

from .convert import scratch_for
from .files import Scratch, equal_bits
from .layouts import Checkpoint, read, write
from .lora import Adapter, merge, read_peft, split_adapters, write_diffusers, write_peft


def export(source: Path, target: Path, layout: str, averages: bool) -> list[str]:
    """Write the adapters of a checkpoint as peft or diffusers reads them.

    Raises:
        ValueError: the checkpoint has none, or `layout` has no place for them.
        ConfigError: there is something at `target`.
    """
    scratch = scratch_for(target, folder=True)
    _, adapters, _ = _parts(source, averages, scratch)
    if not adapters:
        raise ValueError(f"{source} has no adapters: it is of a run without lora=NAME")
    (write_peft if layout == "peft" else write_diffusers)(adapters, target, scratch)
    if layout == "peft":
        back = read_peft(target)
        if any(
            not (equal_bits(back[n].A, a.A) and equal_bits(back[n].B, a.B))
            for n, a in adapters.items()
        ):
            raise ValueError(f"{target}: what was read back differs; is the disk full?")
    return [f"wrote {len(adapters)} adapters of {source} to {target} ({layout})"]


def merge_into(source: Path, target: Path, adapter: Path | None, averages: bool) -> list[str]:
    """Write a checkpoint of plain weights, with the adapters added: it trains on with lora=null.

    Raises:
        ValueError: no adapters, or they do not fit.
        ConfigError: there is something at `target`.
    """
    scratch = scratch_for(target, folder=False)
    plain, adapters, found = _parts(source, averages, scratch)
    if adapter is not None:
        if adapters:
            raise ValueError(f"{source} has adapters of its own: leave out --adapter {adapter}")
        adapters = read_peft(adapter)
    if not adapters:
        raise ValueError(f"{source} has no adapters: give --adapter FOLDER")
    merged = Checkpoint("original", merge(plain, adapters, scratch), iteration=found.iteration)
    write(merged, target, "original", scratch)
    return [
        f"wrote {target}: {len(adapters)} adapters are added to its {len(merged.model)} tensors; "
        f"train on with checkpoint.load_path={target} and without lora=NAME"
    ]


def _parts(
    source: Path, averages: bool, scratch: Scratch
) -> tuple[dict, dict[str, Adapter], Checkpoint]:
    found = read(source, scratch)
    state = dict(found.model)
    if averages:
        if not found.ema:
            raise ValueError(f"{source} holds no averages: leave out --averages")
        state.update({name.replace("-", "."): tensor for name, tensor in found.ema.items()})
    return *split_adapters(state), found
