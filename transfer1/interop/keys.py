"""Names of tensors in released checkpoints, and strict loading with a report.

A key that is renamed, ignored or allowed to be absent matches a rule with a name; any other
difference between a file and a module is an error.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rule(NamedTuple):
    """What happens to the keys that match a pattern."""

    name: str
    pattern: str  # regular expression, searched anywhere in the key
    replacement: str | None = None  # of the matched part; None ignores the key


EXTRA_STATE = Rule("Transformer Engine state, holds no weight", r"(^|\.)_extra_state$")
COMPILED = Rule("prefix of a compiled module", r"\b_orig_mod\.", "")
EMA_SPELLING = Rule("EMA files write '-' for '.'", r"-", ".")
BASE_PREFIX = Rule("prefix of the base inside a control model", r"^base_model\.", "")
CONTROL_BRANCH = Rule("control branch, not part of the base", r"^net\.")
REPEATED = Rule("log-variance head, stored a second time under base_model", r"^logvar\.")
CONDITIONER = Rule("conditioner, holds no weight", r"^(base_model\.)?conditioner\.")

RELEASED = (EXTRA_STATE, COMPILED, CONDITIONER)

# Keys that a file may lack.
FRESH_LOG_VARIANCE = Rule("log-variance head, starts afresh", r"^logvar\.")
FRESH_ADAPTER = Rule("adapters, start without effect", r"\.lora_(A\.weight|B\.weight|alpha)$")
POSITION_INDEX = Rule("position index, the same in every network", r"\bpos_embedder\.seq$")


@dataclass
class KeyReport:
    """What happened to the keys of a file that did not load under their own name."""

    renamed: dict[str, list[str]] = field(default_factory=dict)  # rule -> keys of the file
    ignored: dict[str, list[str]] = field(default_factory=dict)  # rule -> keys of the file
    absent: dict[str, list[str]] = field(default_factory=dict)  # rule -> keys of the module
    loaded: int = 0  # tensors that were copied

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded"]
        for verb in ("renamed", "ignored", "absent"):
            for rule, keys in getattr(self, verb).items():
                lines.append(f"{len(keys)} {verb} ({rule}), for example {keys[0]}")
        return "; ".join(lines)


def apply_rules(
    state: Mapping[str, Tensor], rules: Sequence[Rule], report: KeyReport | None = None
) -> tuple[dict[str, Tensor], KeyReport]:
    """Rename and drop keys, each rule in turn on what the rules before it left.

    Returns:
        (state with the new names, report).

    Raises:
        ValueError: two keys of the file end up with one name.
    """
    report = report or KeyReport()
    result: dict[str, Tensor] = {}
    for original, tensor in state.items():
        key: str | None = original
        for rule in rules:
            if key is None or not re.search(rule.pattern, key):
                continue
            if rule.replacement is None:
                report.ignored.setdefault(rule.name, []).append(original)
                key = None
            else:
                report.renamed.setdefault(rule.name, []).append(original)
                key = re.sub(rule.pattern, rule.replacement, key)
        if key is None:
            continue
        if key in result:
            raise ValueError(f"two keys of the file are {key!r} by the rules, one is {original!r}")
        result[key] = tensor
    return result, report


def base_state(
    state: Mapping[str, Tensor], report: KeyReport | None = None
) -> tuple[dict[str, Tensor], KeyReport]:
    """Select the base network (`net.*`, `logvar.*`) out of a base file or a control checkpoint.

    In a control checkpoint the base is under `base_model.`, and `net.` is the control branch.
    """
    rules = [*RELEASED]
    if any(key.startswith("base_model.net.") for key in state):
        rules.append(CONTROL_BRANCH)
    if any(key.startswith("base_model.logvar.") for key in state):
        rules.append(REPEATED)
    return apply_rules(state, [*rules, BASE_PREFIX], report)


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    optional: Sequence[Rule] = (),
    report: KeyReport | None = None,
) -> KeyReport:
    """Copy a state dict into a module.

    Args:
        module: is not changed when this raises.
        state: names as in the module.
        optional: rules for keys of the module that the state may lack.
        report: continued and returned.

    Raises:
        ValueError: keys that the module does not have or that the state lacks, other shapes, or no
            key in common.
    """
    report = report or KeyReport()
    own = module.state_dict()
    unknown = [key for key in state if key not in own]
    lacking = []
    for key in [key for key in own if key not in state]:
        rule = next((rule for rule in optional if re.search(rule.pattern, key)), None)
        if rule is None:
            lacking.append(key)
        else:
            report.absent.setdefault(rule.name, []).append(key)
    reshaped = [
        f"{key}: {tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in the network"
        for key, tensor in state.items()
        if key in own and own[key].shape != tensor.shape
    ]
    problems = [
        f"{len(keys)} {what}: {_some(keys)}"
        for keys, what in (
            (unknown, "keys of the file that the network does not have"),
            (lacking, "keys of the network that the file lacks"),
            (reshaped, "tensors of another shape"),
        )
        if keys
    ]
    if not own.keys() & state.keys():
        problems.insert(0, "no key of the file belongs to this network")
    if problems:
        raise ValueError(
            "weights do not fit the network; check that model.net and the file belong together. "
            + ". ".join(problems)
        )
    module.load_state_dict(dict(state), strict=False)
    report.loaded = len(state)
    return report


def read_weights(path: str | Path, report: KeyReport | None = None) -> dict[str, Tensor]:
    """Read the weights of a released file: averaged ones where it has them.

    A file is a state dict, or holds one under "model" and, spelled with "-", averages of some of it
    under "ema".

    Args:
        path: one file, or a pattern in which `*` stands for the ranks of a tensor-parallel model.
        report: the renaming of averaged weights is entered there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else, or shards that do not belong together.
    """
    report = report or KeyReport()
    return merge_tensor_parallel([_read_file(shard, report) for shard in find_shards(path)])


def find_shards(path: str | Path) -> list[Path]:
    """The files that a path or pattern names, in the order of their ranks.

    Raises:
        FileNotFoundError: there are none, or a rank in between is missing.
    """
    path = Path(path)
    if "*" not in path.name:
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path} (model.base_load_from.load_path)")
        return [path]
    expression = re.compile(re.escape(path.name).replace(r"\*", r"(\d+)"))
    ranks = {
        int(match[1]): candidate
        for candidate in path.parent.glob(path.name)
        if (match := expression.fullmatch(candidate.name))
    }
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise FileNotFoundError(
            f"{path} (model.base_load_from.load_path) finds ranks {sorted(ranks)}; expected 0, 1, "
            "... without gaps"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _read_file(path: Path, report: KeyReport) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location=torch.get_default_device(), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} (model.base_load_from.load_path) is no file of tensors and plain values, "
            "which are all that is read from it; save its weights alone: "
            'torch.save({"model": content["model"]}, path)'
        ) from error
    averages: Mapping[str, Tensor] = {}
    while isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        averages = content.get("ema") or averages
        content = content["model"]
    weights = {
        key: value
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, Tensor) or re.search(EXTRA_STATE.pattern, key)
    }
    if not weights:
        raise ValueError(f"{path} holds no weights (model.base_load_from.load_path)")
    renamed, _ = apply_rules(averages, (EMA_SPELLING,), report)
    return weights | renamed


# How the original splits a weight over tensor-parallel ranks: end of the key -> axis.
SPLIT_AXES = {
    "to_q.0.weight": 0,
    "to_k.0.weight": 0,
    "to_v.0.weight": 0,
    "block.layer1.weight": 0,
    "to_out.0.weight": 1,
    "block.layer2.weight": 1,
}


def split_axis(key: str) -> int | None:
    """The axis along which a weight is split over tensor-parallel ranks; None: it is replicated."""
    return next((axis for end, axis in SPLIT_AXES.items() if key.endswith(end)), None)


def merge_tensor_parallel(
    shards: Sequence[Mapping[str, Tensor]], cat: Callable[..., Tensor] = torch.cat
) -> dict[str, Tensor]:
    """Join the state dicts of all tensor-parallel ranks, given in the order of ranks.

    Args:
        shards: one state dict per rank.
        cat: joins a sequence of tensors along `dim`.

    Raises:
        ValueError: shards with different keys, or whose replicated tensors differ.
    """
    first = shards[0]
    if len(shards) == 1:
        return dict(first)
    merged: dict[str, Tensor] = {}
    for rank, shard in enumerate(shards):
        if shard.keys() != first.keys():
            raise ValueError(
                f"tensor-parallel ranks 0 and {rank} hold different keys, for example "
                f"{_some(sorted(shard.keys() ^ first.keys()))}"
            )
    for key, tensor in first.items():
        axis = split_axis(key)
        if axis is not None:
            merged[key] = cat([shard[key] for shard in shards], dim=axis)
            continue
        if isinstance(tensor, Tensor) and any(
            not torch.equal(shard[key], tensor) for shard in shards
        ):
            raise ValueError(f"{key} is replicated over ranks, but the files hold different values")
        merged[key] = tensor
    return merged


def _some(keys: Iterable[str], limit: int = 3) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")
