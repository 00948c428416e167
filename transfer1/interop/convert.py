"""`convert`: a checkpoint from one file layout to another, verified by reading it back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from transfer1.config import Config, ConfigError

from . import keys
from .diffusers import all_arguments, diffusers_arguments, from_diffusers, to_diffusers
from .files import Scratch, equal_bits, map_safetensors, replacing, save_safetensors
from .layouts import Checkpoint, read, sibling, write

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
BASE = "net."


def convert(source: Path, target: Path, layout: str, config: Config | None = None) -> list[str]:
    """Write `source` again as `target` and compare what was written bit by bit.

    Args:
        source: X.pt, X.safetensors, or a folder of diffusers.
        target: the same; nothing may be there yet.
        layout: original, tpN, fsdp, portable or diffusers.
        config: the experiment of the checkpoint; diffusers needs its sizes.

    Returns:
        lines that say what was written, dropped and left out.

    Raises:
        FileNotFoundError, ValueError: see `layouts`.
        ConfigError: there is something at `target`, or diffusers without a configuration.
    """
    scratch = scratch_for(target, folder=layout == "diffusers")
    found = read_diffusers(source) if source.is_dir() else read(source, scratch)
    lines = [f"read {source} ({found.layout}), iteration {found.iteration}: {_account(found)}"]
    lines += found.notes
    if layout == "diffusers":
        left_out = write_diffusers(found, target, config, scratch)
    else:
        left_out = write(found, target, layout, scratch)
        _verify(found, read(target, scratch), target)
    lines.append(f"wrote {target} ({layout}) and compared every bit with what was read")
    if left_out:
        lines.append(f"left out, {layout} has no place for it: {', '.join(left_out)}")
    return lines


def scratch_for(target: Path, folder: bool) -> Scratch:
    """Make room for an output, a file or a folder, where nothing may be yet.

    Raises:
        ConfigError: there is something.
    """
    for path in (target, sibling(target, "_model_mp_0.pt"), sibling(target, "_reg_model.pt")):
        if path.exists():
            raise ConfigError(f"{path} exists: nothing is overwritten, give another name")
    place = target if folder else target.parent
    place.mkdir(parents=True, exist_ok=True)
    return Scratch(place)


def _account(found: Checkpoint) -> str:
    averages = len(found.ema or {})
    size = sum(t.nbytes for t in (*found.model.values(), *(found.ema or {}).values()))
    text = f"{len(found.model)} tensors, {averages} averages, {size / 2**30:.3f} GiB"
    changes = str(found.report).partition("; ")[2]
    return f"{text}; {changes}" if changes else text


def _verify(written: Checkpoint, back: Checkpoint, target: Path) -> None:
    for what, first, second in (
        ("weights", written.model, back.model),
        ("averages", written.ema or {}, back.ema or {}),
    ):
        _compare(first, second, f"{what} of {target}")
    if (written.record, written.iteration) != (back.record, back.iteration):
        raise ValueError(f"{target}: the counts that were read back differ")


def _compare(first: Mapping[str, Tensor], second: Mapping[str, Tensor], what: str) -> None:
    wrong = sorted(first.keys() ^ second.keys())
    wrong += [k for k in first.keys() & second.keys() if not equal_bits(first[k], second[k])]
    if wrong:
        raise ValueError(
            f"{what} read back differ in {len(wrong)} tensors, for example {wrong[:3]}; is the "
            "disk full or failing? Delete what was written and try again"
        )


def write_diffusers(
    found: Checkpoint, folder: Path, config: Config | None, scratch: Scratch
) -> list[str]:
    """Write the base network as a folder that `CosmosTransformer3DModel.from_pretrained` reads."""
    if config is None or config.model.net is None:
        raise ConfigError(
            "--to diffusers needs the sizes of the network: add `-- experiment=NAME` (or net=NAME)"
        )
    base, report = keys.base_state(found.model)
    state = {name.removeprefix(BASE): t for name, t in base.items() if name.startswith(BASE)}
    if not state:
        raise ValueError(f"no key begins with {BASE}: there is no base network to convert")
    theirs = to_diffusers(state)
    arguments = diffusers_arguments(all_arguments(config.model.net))
    save_safetensors(theirs, folder / WEIGHTS_FILE, {}, scratch)
    with replacing(folder / CONFIG_FILE) as path:
        named = {"_class_name": "CosmosTransformer3DModel", **arguments}
        path.write_text(json.dumps(named, indent=2) + "\n")
    expected = {name: tensor for name, tensor in base.items() if name.startswith(BASE)}
    _compare(_without_index(expected), _without_index(read_diffusers(folder).model), str(folder))
    left_out = [f"{len(names)} keys ({rule})" for rule, names in report.ignored.items()]
    rest = len(base) - len(state)
    left_out += [f"{rest} keys of the log-variance head"] if rest else []
    left_out += ["averages"] if found.ema else []
    return left_out + sorted(found.training)


def _without_index(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but the position index, which diffusers does not store."""
    pattern = keys.POSITION_INDEX.pattern
    return {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


def read_diffusers(folder: Path) -> Checkpoint:
    """Read a folder of diffusers as a base network, `net.*`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or has keys without a counterpart.
    """
    state, _ = map_safetensors(folder / WEIGHTS_FILE)
    described = folder / CONFIG_FILE
    if not described.exists():
        raise FileNotFoundError(f"there is no file {described}")
    frames, rows, columns = json.loads(described.read_text())["max_size"]
    # Theirs are sizes of the latent video, and patches make the grid of tokens.
    patch = json.loads(described.read_text())["patch_size"]
    grid = (frames // patch[0], rows // patch[1], columns // patch[2])
    ours = from_diffusers(state, grid)
    return Checkpoint("diffusers", {f"{BASE}{name}": tensor for name, tensor in ours.items()})
