"""Combinations of values that no run can have, found before anything is built.

Every check reads the composed configuration alone; what it needs of a tokenizer or a network is
arithmetic on their options. Parts that are missing, and classes that are not ours, are not judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .errors import ConfigError
from .schema import Config
from .targets import TARGET, locate

Problems = Iterator[str]

BASE = "transfer1.model.dit.DiT"
CONTROL = "transfer1.model.control.ControlEncoder"
DATASET = "transfer1.data.dataset.TransferDataset"
CONDITIONER = "transfer1.diffusion.condition.Conditioner"

CHOICES = {
    "model.precision": ("float32", "bfloat16"),
    "model.loss_reduce": ("mean", "sum"),
    "trainer.device": ("auto", "cuda", "cpu"),
    "trainer.distributed_parallelism": ("ddp", "fsdp"),
    "trainer.non_finite": ("skip", "zero"),
    "model.fsdp.sharding_strategy": ("full", "hybrid"),
    "model.fsdp.reduce_dtype": ("float32", "bfloat16"),
}
# Key -> least value, largest value (None: no bound).
BOUNDS: dict[str, tuple[float, float | None]] = {
    "trainer.max_iter": (1, None),
    "trainer.grad_accum_iter": (1, None),
    "trainer.logging_iter": (1, None),
    "trainer.validation_iter": (1, None),
    "trainer.max_skipped": (1, None),
    "trainer.timeout_period": (1, None),
    "checkpoint.save_iter": (1, None),
    "model_parallel.tensor_model_parallel_size": (1, None),
    "model_parallel.context_parallel_size": (1, None),
    "model_parallel.pipeline_model_parallel_size": (1, 1),
    "model.sigma_data": (1e-6, None),
    "model.hint_dropout_rate": (0, 1),
    "model.n_views": (1, 1),
    "model.net.num_blocks": (1, None),
    "model.net_ctrl.dropout_ctrl_branch": (0, 1),
    "model.sde.p_std": (0, None),
    "model.sde.sigma_min": (1e-12, None),
    "optimizer.lr": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.eps": (0, None),
    "dataloader_train.batch_size": (1, None),
    "dataloader_val.batch_size": (1, None),
    "dataloader_train.num_workers": (0, None),
    "dataloader_val.num_workers": (0, None),
}
RESUMABLE = ("model", "optim", "scheduler", "trainer")


def check_consistency(config: Config) -> None:
    """Refuse a configuration whose values contradict each other.

    Raises:
        ConfigError: all contradictions, one line each: key and value, then what is allowed.
    """
    _refuse(problem for check in CHECKS for problem in check(config))


def check_values(config: Config) -> None:
    """Refuse single values that no run can have; the part of `check_consistency` that is cheap.

    Raises:
        ConfigError: see above.
    """
    _refuse(values(config))


def _refuse(problems: Problems) -> None:
    if found := list(problems):
        raise ConfigError("\n  ".join(found))


def values(config: Config) -> Problems:
    """Single values outside their choices or bounds."""
    for key, allowed in CHOICES.items():
        value = _get(config, key)
        if value is not None and value not in allowed:
            yield f"{key}={value}: choose {', '.join(allowed[:-1])} or {allowed[-1]}"
    for key, (least, most) in BOUNDS.items():
        value = _get(config, key)
        if isinstance(value, int | float) and not least <= value <= (
            float("inf") if most is None else most
        ):
            yield f"{key}={value}: give {_bounds(least, most)}"
    yield from sharding(config)
    for name in config.checkpoint.keys_not_to_resume:
        if name not in RESUMABLE:
            yield (
                f"checkpoint.keys_not_to_resume: unknown {name}; choose of {', '.join(RESUMABLE)}"
            )
    for beta in _get(config, "optimizer.betas") or ():
        if not 0 <= beta < 1:
            yield f"optimizer.betas holds {beta}: give values of at least 0 and less than 1"
    low, high = _get(config, "model.sde.sigma_min"), _get(config, "model.sde.sigma_max")
    if low is not None and high is not None and low >= high:
        yield f"model.sde.sigma_min={low}: give less than model.sde.sigma_max={high}"


def sharding(config: Config) -> Problems:
    """Options of FSDP that do not fit each other or the number of processes."""
    options, mode = config.model.fsdp, config.trainer.distributed_parallelism
    if config.model.fsdp_enabled and mode != "fsdp":
        yield (
            f"model.fsdp_enabled=True: trainer.distributed_parallelism={mode}; set both with the "
            "group fsdp=full, or it to false"
        )
    if options.policy != "block":
        yield f"model.fsdp.policy={options.policy}: give block; a transformer block is one unit"
    if options.checkpoint:
        yield (
            "model.fsdp.checkpoint=True: set model.net.activation_checkpoint=block (and that of "
            "model.net_ctrl) instead, and it to false"
        )
    size, world = options.sharding_group_size, int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "fsdp" and options.sharding_strategy == "hybrid" and (size < 1 or world % size):
        yield (
            f"model.fsdp.sharding_group_size={size}: give a divisor of the {world} processes, or "
            "model.fsdp.sharding_strategy=full"
        )


def networks(config: Config) -> Problems:
    """Networks that cannot be built, or that do not fit each other or the tokenizer."""
    channels = _get(config, "model.tokenizer.latent_ch")
    for key, net in _networks(config):
        if net.model_channels % net.num_heads:
            yield (
                f"{key}.model_channels={net.model_channels}: give a multiple of "
                f"{key}.num_heads={net.num_heads}"
            )
        if channels is not None and net.out_channels != channels:
            yield (
                f"{key}.out_channels={net.out_channels}: the latents of model.tokenizer have "
                f"{channels} channels"
            )
        if not net.concat_frame_mask and net.in_channels != net.out_channels:
            yield (
                f"{key}.in_channels={net.in_channels}: give {net.out_channels}, the channels of "
                "the latent, or one more with concat_frame_mask=true"
            )
        if net.concat_frame_mask and net.in_channels <= net.out_channels:
            yield (
                f"{key}.in_channels={net.in_channels}: give {net.out_channels + 1}, the channels "
                "of the latent and the frame mask"
            )
    net, control = (_of(config.model[key], target) for key, target in NETWORKS.items())
    if control is None:
        return
    if not 1 <= control.num_control_blocks <= control.num_blocks:
        yield (
            f"model.net_ctrl.num_control_blocks={control.num_control_blocks}: give 1 to "
            f"{control.num_blocks} (model.net_ctrl.num_blocks)"
        )
    if net is None:
        return
    for name in SHARED:
        if net[name] != control[name]:
            yield (
                f"model.net_ctrl.{name}={control[name]}: the control branch starts as a copy of "
                f"the base network, which has model.net.{name}={net[name]}"
            )
    if control.num_control_blocks > net.num_blocks:
        yield (
            f"model.net_ctrl.num_control_blocks={control.num_control_blocks}: the base network "
            f"has model.net.num_blocks={net.num_blocks} to add its residuals to"
        )


def hints(config: Config) -> Problems:
    """A control branch that cannot take its hints."""
    control = _of(config.model.net_ctrl, CONTROL)
    channels = _get(config, "model.tokenizer.latent_ch")
    hint_key = config.model.hint_key
    if config.model.pixel_corruptor is not None and config.model.net_ctrl is None:
        yield "model.pixel_corruptor: damages control videos, but there is no net_ctrl; choose one"
    if config.model.net_ctrl is not None and hint_key is None:
        yield "model.hint_key=null: the control branch needs one; choose hint_key=NAME"
    if control is not None and hint_key is not None:
        # control_input_edge_depth holds two conditions
        conditions = len(hint_key.hint_key.removeprefix("control_input_").split("_"))
        if channels is not None and control.hint_channels < channels * conditions:
            yield (
                f"model.net_ctrl.hint_channels={control.hint_channels}: give at least "
                f"{channels * conditions}, {channels} latent channels for each of the {conditions} "
                f"conditions of model.hint_key.hint_key={hint_key.hint_key}"
            )
        mask = config.model.hint_mask
        if conditions > 1 and config.model.hint_dropout_rate > 0 and len(mask) != conditions:
            yield (
                f"model.hint_mask={list(mask)}: give {conditions} entries, one for each condition "
                f"of model.hint_key.hint_key={hint_key.hint_key}"
            )
    for key, dataset in _datasets(config):
        if config.model.net_ctrl is None or hint_key is None:
            continue
        if dataset.hint_key != hint_key.hint_key:
            yield (
                f"model.hint_key.hint_key={hint_key.hint_key}: {key} makes {dataset.hint_key}; "
                "choose the same control with hint_key, data_train and data_val"
            )


def conditions(config: Config) -> Problems:
    """Inputs of the networks that the conditioner does not make, or nothing reads."""
    conditioner = _of(config.model.conditioner, CONDITIONER)
    if conditioner is None:
        return
    frames = conditioner.get("video_cond_bool")
    for name, embedder in conditioner.items():
        rate = embedder.get("dropout_rate") if isinstance(embedder, DictConfig) else None
        if rate is not None and not 0 <= rate <= 1:
            yield f"model.conditioner.{name}.dropout_rate={rate}: give 0 to 1"
    for key, net in _networks(config):
        if net.concat_padding_mask and "padding_mask" not in conditioner:
            yield (
                f"{key}.concat_padding_mask=True: the conditioner makes no padding_mask; choose "
                "conditioner=ctrlnet_add_fps_image_size_padding_mask or set it to false"
            )
        if net.concat_frame_mask and frames is None:
            yield (
                f"{key}.concat_frame_mask=True: the conditioner has no video_cond_bool; choose "
                "conditioner=ctrlnet_add_fps_image_size_padding_mask"
            )
        if net.pos_emb_cls == "rope3d" and "fps" not in conditioner:
            yield (
                f"{key}.pos_emb_cls=rope3d: needs frame rates, and the conditioner makes no fps; "
                "choose conditioner=ctrlnet_add_fps_image_size_padding_mask"
            )
        for name in net.additional_timestamp_channels or {}:
            needed = "fps" if name == "fps" else "image_size"
            if needed not in conditioner:
                yield (
                    f"{key}.additional_timestamp_channels.{name}: the conditioner makes no "
                    f"{needed}; choose conditioner=ctrlnet_add_fps_image_size_padding_mask"
                )
        told = frames is not None and frames.condition_on_augment_sigma
        if net.add_augment_sigma_embedding and not told:
            yield (
                f"{key}.add_augment_sigma_embedding=True: set "
                "model.conditioner.video_cond_bool.condition_on_augment_sigma=true too"
            )
    if config.model.loss_mask_enabled and not config.model.loss_masking:
        yield (
            "model.loss_mask_enabled=True: model.loss_masking is empty; add masks with "
            "+model.loss_masking.NAME=WEIGHT"
        )


def clips(config: Config) -> Problems:
    """Clips that the tokenizer or the networks cannot take."""
    tokenizer = config.model.tokenizer
    for key, dataset in _datasets(config):
        frames = _latent_frames(tokenizer, dataset.num_frames)
        if isinstance(frames, str):
            yield f"{key}.num_frames={dataset.num_frames}: {frames}"
        for name, net in _networks(config):
            if dataset.text_channels != net.crossattn_emb_channels:
                yield (
                    f"{key}.text_channels={dataset.text_channels}: {name} takes text of "
                    f"crossattn_emb_channels={net.crossattn_emb_channels}"
                )
            if isinstance(frames, int):
                yield from _too_large(f"{key}.num_frames={dataset.num_frames}", name, net, frames)
            if OmegaConf.is_list(dataset.resolution):
                yield from _odd_size(f"{key}.resolution", dataset.resolution, name, net, tokenizer)
    shape = config.model.latent_shape
    if len(shape) != 4 or any(length < 1 for length in shape):
        yield f"model.latent_shape={list(shape)}: give 4 positive numbers, channels to columns"
    if config.trainer.run_validation and config.dataloader_val is None:
        yield "trainer.run_validation=True: there is no validation data; choose data_val=NAME"


def parallelism(config: Config) -> Problems:
    """Networks and batches that the processes of the run cannot share."""
    sizes = config.model_parallel
    group = sizes.tensor_model_parallel_size * sizes.context_parallel_size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" in os.environ and world % max(1, group):
        yield (
            f"model_parallel: {group} processes share one model (tensor_model_parallel_size="
            f"{sizes.tensor_model_parallel_size} x context_parallel_size="
            f"{sizes.context_parallel_size}), but {world} were started; start a multiple of {group}"
        )
    if sizes.sequence_parallel and sizes.tensor_model_parallel_size == 1:
        yield (
            "model_parallel.sequence_parallel=True: it splits what tensor parallelism leaves "
            "whole; set model_parallel.tensor_model_parallel_size above 1, or it to false"
        )
    for key, net in _networks(config):
        if net.num_heads % max(1, sizes.tensor_model_parallel_size):
            yield (
                f"model_parallel.tensor_model_parallel_size={sizes.tensor_model_parallel_size}: "
                f"give a divisor of {key}.num_heads={net.num_heads}"
            )


CHECKS: tuple[Callable[[Config], Problems], ...] = (
    values,
    networks,
    hints,
    conditions,
    clips,
    parallelism,
)
NETWORKS = {"net": BASE, "net_ctrl": CONTROL}
# Arguments that decide the shapes of what the control branch copies from the base.
SHARED = (
    "in_channels",
    "out_channels",
    "patch_spatial",
    "patch_temporal",
    "concat_padding_mask",
    "block_config",
    "model_channels",
    "num_heads",
    "mlp_ratio",
    "crossattn_emb_channels",
    "use_adaln_lora",
    "adaln_lora_dim",
    "legacy_patch_emb",
    "affline_emb_norm",
    "concat_frame_mask",
)


def _of(node: Any, target: str) -> Any:
    """The node if it describes an object of this class of ours, else None."""
    is_call = isinstance(node, DictConfig) and not node._is_none() and TARGET in node
    return node if is_call and node[TARGET] == target else None


def _networks(config: Config) -> Iterator[tuple[str, Any]]:
    for key, target in NETWORKS.items():
        if (node := _of(config.model[key], target)) is not None:
            yield f"model.{key}", node


def _datasets(config: Config) -> Iterator[tuple[str, Any]]:
    for key in ("dataloader_train", "dataloader_val"):
        loader = config[key]  # type: ignore[index]
        node = loader.get("dataset") if isinstance(loader, DictConfig) else None
        if (dataset := _of(node, DATASET)) is not None:
            yield f"{key}.dataset", dataset


def _latent_frames(tokenizer: Any, num_frames: int) -> int | str | None:
    """Latent frames of a clip, a message where it cannot be encoded, None for a foreign class."""
    if not isinstance(tokenizer, DictConfig) or TARGET not in tokenizer:
        return None
    count = getattr(locate(tokenizer[TARGET]), "count_latent_frames", None)
    if count is None:
        return None
    try:
        return count(tokenizer, num_frames)
    except ValueError as error:
        return str(error)


def _too_large(given: str, name: str, net: Any, frames: int) -> Problems:
    if frames % net.patch_temporal:
        yield (
            f"{given}: {frames} latent frames are no multiple of {name}.patch_temporal="
            f"{net.patch_temporal}"
        )
    if frames > net.max_frames:
        yield f"{given}: {frames} latent frames are more than {name}.max_frames={net.max_frames}"


def _odd_size(key: str, size: Any, name: str, net: Any, tokenizer: Any) -> Problems:
    factor = tokenizer.get("spatial_compression_factor") if tokenizer is not None else None
    if factor is None:
        return
    step = factor * net.patch_spatial
    for length, most in zip(size, (net.max_img_h, net.max_img_w), strict=False):
        if length % step:
            yield (
                f"{key}={list(size)}: give multiples of {step}, the {factor} of model.tokenizer "
                f"times {name}.patch_spatial={net.patch_spatial}"
            )
        elif length // factor > most:
            yield f"{key}={list(size)}: {name} takes at most {most * factor} there (max_img_h, _w)"


def _get(config: Config, key: str) -> Any:
    return OmegaConf.select(config, key, throw_on_missing=False)  # type: ignore[arg-type]


def _bounds(least: float, most: float | None) -> str:
    if most is None:
        return f"{least:g} or more"
    return f"{least:g} to {most:g}" if least < most else f"{least:g}"
