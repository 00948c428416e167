"""Where a run computes, and what it cannot do. Nothing else names a device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transfer1.config import Config, ConfigError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """Return the device of `trainer.device`: auto, cuda or cpu.

    Raises:
        ConfigError: another name, or cuda where there is none.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"trainer.device={name}: choose auto, cuda or cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "trainer.device=cuda: PyTorch finds no CUDA device; use trainer.device=cpu"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_dtype(precision: str) -> torch.dtype:
    """Return the dtype of `model.precision`.

    Raises:
        ConfigError: a precision that cannot be trained in.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"model.precision={precision}: choose {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def refuse_parallelism(config: Config) -> None:
    """Raise ConfigError where a run splits the model in a way that this trainer does not."""
    sizes, problems = config.model_parallel, []
    tensor, context = sizes.tensor_model_parallel_size, sizes.context_parallel_size
    if sizes.pipeline_model_parallel_size > 1 or sizes.sequence_parallel:
        problems.append(
            f"model_parallel.pipeline_model_parallel_size={sizes.pipeline_model_parallel_size}, "
            f"model_parallel.sequence_parallel={sizes.sequence_parallel}: not built yet; give 1 "
            "and false"
        )
    group, world = tensor * context, int(os.environ.get("WORLD_SIZE", "1"))
    if world % group:
        problems.append(
            f"model_parallel.tensor_model_parallel_size={tensor}, context_parallel_size={context}: "
            f"{group} processes share one model, but {world} were started; start a multiple of "
            f"{group} with torchrun --nproc_per_node, or set both to 1"
        )
    mode, strategy = config.trainer.distributed_parallelism, config.model.fsdp.sharding_strategy
    if tensor > 1 and (mode, strategy) != ("fsdp", "full"):
        problems.append(
            f"model_parallel.tensor_model_parallel_size={tensor}: trainer.distributed_parallelism="
            f"{mode} and model.fsdp.sharding_strategy={strategy} cannot be combined with it; set "
            "fsdp=full"
        )
    if problems:
        raise ConfigError("\n  ".join(problems))


def sharing_sample(config: Config) -> int:
    """How many processes work on the same samples."""
    sizes = config.model_parallel
    return sizes.tensor_model_parallel_size * sizes.context_parallel_size


def set_backend_flags(config: Config, device: torch.device) -> None:
    """Set the cuDNN flags of `trainer.cudnn` and, on a GPU, TF32 for float32 matrix products."""
    torch.backends.cudnn.deterministic = config.trainer.cudnn.deterministic
    torch.backends.cudnn.benchmark = config.trainer.cudnn.benchmark
    if device.type != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a new dict of the batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
