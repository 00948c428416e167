"""Translates resolved configurations of the original into ours, leaf by leaf.

Every difference is a row of a table below, with its reason; a leaf that no row explains must be
equal. Patterns are `fnmatch` patterns over dotted keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from transfer1.config.removed import REMOVED_ARGUMENTS, REMOVED_KEYS

Leaves = dict[str, Any]

# Last part of the dotted name of the original's class or function -> ours.
TARGETS = {
    "GeneralDIT": "transfer1.model.dit.DiT",
    "VideoExtendGeneralDIT": "transfer1.model.dit.DiT",
    "GeneralDITEncoder": "transfer1.model.control.ControlEncoder",
    "VideoDiffusionModelWithCtrlWrapper": "transfer1.model.transfer.build_transfer",
    "VideoConditioner": "transfer1.diffusion.condition.Conditioner",
    "VideoExtendConditioner": "transfer1.diffusion.condition.Conditioner",
    "VideoConditionerWithCtrl": "transfer1.diffusion.condition.Conditioner",
    "TextAttr": "transfer1.diffusion.condition.TextAttr",
    "ReMapkey": "transfer1.diffusion.condition.ReMapkey",
    "BooleanFlag": "transfer1.diffusion.condition.BooleanFlag",
    "EDMSDE": "transfer1.diffusion.edm.NoiseDistribution",
    "VideoJITTokenizer": "transfer1.diffusion.jit_tokenizer.JITVideoTokenizer",
    "DummyJointImageVideoTokenizer": (
        "transfer1.diffusion.debug_tokenizer.DummyJointImageVideoTokenizer"
    ),
    "get_base_optimizer": "transfer1.training.optimizer.build_optimizer",
    "LambdaLinearScheduler": "transfer1.training.schedule.LambdaLinear",
    "initialize_multi_rank_ema": "transfer1.training.ema.build_power_ema",
    "ProgressBarCallback": "transfer1.training.callbacks.ProgressBar",
    "GradClip": "transfer1.training.callbacks.GradClip",
    "LowPrecisionCallback": "transfer1.training.callbacks.LowPrecision",
    "IterSpeed": "transfer1.training.callbacks.IterSpeed",
    "MultiRankCheckpointer": "transfer1.training.checkpoint.MultiRankCheckpointer",
    "ExampleTransferDataset": "transfer1.data.dataset.TransferDataset",
    "AVTransferDataset": "transfer1.data.dataset.TransferDataset",
    "DataLoader": "transfer1.data.loader.build_dataloader",
    "Trainer": "transfer1.training.trainer.Trainer",
}

# Options that the original has and this package does not build yet: group -> names.
LATER = {"ckpt_klass": {"fsdp", "tp", "fast_tp"}}

# Options that are registered and refuse with one message: group -> names.
REFUSED = {
    "net_ctrl": {"faditv2_sv2mv"},
    "conditioner": {"view_cond_ctrlnet_add_fps_image_size_padding_mask"},
    "experiment": {"*_sv2mv_*"},
}

# Leaves of the original that have no counterpart: pattern -> reason.
DROPPED = {
    **{f"*.{name}": reason for name, reason in REMOVED_ARGUMENTS.items()},
    **{f"*.{name}.*": reason for name, reason in REMOVED_ARGUMENTS.items()},
    **REMOVED_KEYS,
    **{f"{key}.*": reason for key, reason in REMOVED_KEYS.items()},
    "dataloader_*.sampler.*": "build_dataloader makes the sampler from the loader's own dataset",
    "dataloader_*.batch_sampler": "set by build_dataloader",
    "dataloader_*.collate_fn": "set by build_dataloader",
    "dataloader_*.timeout": "set by build_dataloader",
    "dataloader_*.worker_init_fn": "set by build_dataloader: draws are keyed, not per worker",
    "dataloader_*.multiprocessing_context": "set by build_dataloader",
    "dataloader_*.generator": "set by build_dataloader: the order is keyed by (seed, epoch)",
    "dataloader_*.persistent_workers": "set by build_dataloader",
    "dataloader_*.pin_memory_device": "set by build_dataloader",
    "dataloader_*.in_order": "set by build_dataloader",
    "trainer.callbacks.*.config": "callbacks reach the configuration through their trainer",
    "trainer.callbacks.*.trainer": "set when the trainer is built",
    **dict.fromkeys(
        (
            "dataloader_*.dataset.caption_view_idx_map",
            "dataloader_*.dataset.load_mv_emb",
            "dataloader_*.dataset.sample_n_views",
            "dataloader_*.dataset.view_keys.*",
        ),
        "one camera at a time: multi-view models are not built",
    ),
    "checkpoint.type._target_": "one checkpointer, whatever the parallelism: any world size reads "
    "any checkpoint",
}

UNSET = "???"
ANY = object()
RUN_TIME = "known only at run time"
NEW = "new here"

# Leaves of ours that the original has not: pattern -> (value, reason).
ADDED = {
    "model.ema.rank": (UNSET, RUN_TIME),
    "optimizer.master_remainder": (False, "16 bits of a master beside a bfloat16 parameter"),
    "optimizer.stochastic_rounding": (False, "bfloat16 parameters without masters"),
    "checkpoint.type.config": (UNSET, RUN_TIME),
    "checkpoint.type.folder": (UNSET, RUN_TIME),
    "checkpoint.type.callbacks": (UNSET, RUN_TIME),
    "checkpoint.type._target_": (TARGETS["MultiRankCheckpointer"], "see DROPPED"),
    "model.fsdp.reduce_dtype": ("float32", "in which gradients are summed"),
    "model.fsdp.cpu_offload": (False, "shards stay on the host"),
    "kernels.device": (UNSET, RUN_TIME),
    "kernels._target_": ("kernels.select", NEW),
    "kernels.default": ("auto", NEW),
    "kernels.*": (None, "the backend of one op; null follows the default"),
    "trainer.device": ("auto", NEW),
    "trainer.non_finite": ("skip", "a non-finite gradient skips the update"),
    "trainer.max_skipped": (100, "abort after this many skipped updates in a row"),
    "trainer.nvtx": (False, "named ranges for NVIDIA's profilers"),
    "trainer.profile": ([], "traces of chosen updates"),
    "trainer.callbacks.grad_clip.clip_norm": (1.0, "the original's default, not listed there"),
    "trainer.callbacks.grad_clip.force_finite": (False, "see trainer.non_finite"),
    "trainer.callbacks.progress_bar.seconds": (10.0, "distance of lines without a terminal"),
    "model.net*.activation_checkpoint": ("none", "replaces use_checkpoint and use_memory_save"),
    "model.net*.add_augment_sigma_embedding": (False, "one class has the options of several"),
    "model.net*.concat_frame_mask": (False, "one class has the options of several"),
    "model.net_ctrl.hint_channels": (16, "the original's default, not listed there"),
    "model.net_ctrl.dropout_ctrl_branch": (0.5, "the original's default, not listed there"),
    "model.net_ctrl.hint_gain": (1.0, "scale of the hint layers at the start; 1 is the original's"),
    "model.conditioner.video_cond_bool.augment_sigma_in_inference": (0.001, "of the sampler there"),
    "model.conditioner.video_cond_bool.augment_seed": (1, "of the sampler there"),
    "dataloader_*.dataset.*": (ANY, "options of ours at their defaults; constants in the original"),
    "dataloader_train.stream": (True, "the sampler that was `sampler`"),
    "dataloader_val.stream": (False, "validation is one ordered pass"),
    "model.base_load_from.load_path": ("", "an empty path, where the original has null"),
}


@dataclass(frozen=True)
class Change:
    """A leaf, or a list of leaves, whose value or key differs."""

    translate: Callable[[Any], Any]
    reason: str


CHANGED = {
    "optimizer.model": Change(lambda value: UNSET, RUN_TIME),
    "model.ema.model": Change(lambda value: UNSET, RUN_TIME),
    "model_obj.config": Change(lambda value: UNSET, RUN_TIME),
    "dataloader_*.shuffle": Change(
        lambda value: True, "of a stream; the original's sampler shuffles"
    ),
    "dataloader_*.prefetch_factor": Change(
        lambda value: 2 if value is None else value, "null is PyTorch's 2"
    ),
    "dataloader_val.dataset.is_train": Change(
        lambda value: False, "validation draws nothing at random; driving data did there"
    ),
}


def translate(original: Mapping[str, Any]) -> Leaves:
    """Leaves of a configuration of the original that have a counterpart, under our names."""
    expected: Leaves = {}
    for key, value in leaves(_rename(original)):
        if any(fnmatchcase(key, pattern) for pattern in DROPPED):
            continue
        change = next((c for pattern, c in CHANGED.items() if fnmatchcase(key, pattern)), None)
        expected[key] = change.translate(value) if change else value
    return expected


def differences(expected: Leaves, actual: Leaves) -> list[str]:
    """Leaves that differ without a row that says why."""
    found = []
    for key in sorted(expected.keys() | actual.keys()):
        if key not in actual:
            if not _is_empty(expected[key]):
                found.append(f"{key}: missing, the original has {expected[key]!r}")
        elif key in expected:
            if _is_empty(actual[key]) and _is_empty(expected[key]):
                continue
            if actual[key] != expected[key] or isinstance(actual[key], bool) != isinstance(
                expected[key], bool
            ):
                found.append(f"{key}: {actual[key]!r}, the original has {expected[key]!r}")
        elif not _is_empty(actual[key]):
            allowed = [v for pattern, (v, _) in ADDED.items() if fnmatchcase(key, pattern)]
            if not allowed or allowed[0] not in (ANY, actual[key]):
                found.append(f"{key}: {actual[key]!r}, the original has no such key")
    return found


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every scalar; empty lists and mappings count as scalars."""
    if isinstance(node, Mapping) and node:
        for name, child in node.items():
            yield from leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and node:
        for index, child in enumerate(node):
            yield from leaves(child, f"{key}.{index}")
    else:
        yield key, node


def is_later(group: str, name: str) -> bool:
    """Whether an option of the original belongs to what is not built yet."""
    return any(fnmatchcase(name, pattern) for pattern in LATER.get(group, ()))


def is_refused(group: str, name: str) -> bool:
    """Whether an option of the original is known by name only."""
    return any(fnmatchcase(name, pattern) for pattern in REFUSED.get(group, ()))


def _rename(node: Any) -> Any:
    """Targets as our dotted paths, layer_mask as num_control_blocks, the frame mask as option."""
    if isinstance(node, list):
        return [_rename(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    if set(node) == {"__callable__"}:
        path = node["__callable__"]
        return TARGETS.get(path.rpartition(".")[2], path)
    renamed = {name: _rename(child) for name, child in node.items()}
    mask = renamed.get("layer_mask")
    if mask:  # of blocks that are not built
        renamed["num_control_blocks"] = mask.index(True)
    original = re.sub(r".*\.", "", node.get("_target_", {}).get("__callable__", ""))
    if original == "VideoExtendGeneralDIT":
        renamed["concat_frame_mask"] = True
    elif original == "GeneralDITEncoder":  # takes the frame mask whenever its input has room for it
        renamed["concat_frame_mask"] = node["in_channels"] > node["out_channels"]
    return renamed


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or value == {}
