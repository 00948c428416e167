"""Low-rank adaptation: small trainable matrices beside frozen linear layers.

Applied to a finished model from outside. Names of its own parameters stay; each adapted layer gains
`lora_A.weight`, `lora_B.weight` and the buffer `lora_alpha`. How adapters are exported or merged is
in `transfer1/interop/lora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from transfer1.config import ConfigError


def apply_lora(
    model: nn.Module, rank: int, alpha: float, targets: Sequence[str], freeze: bool = True
) -> list[str]:
    """Give every linear layer whose name matches an adapter, which changes nothing at the start.

    A is drawn as `nn.Linear` draws its weights, B is zero (Hu et al. 2021, arXiv:2106.09685).

    Args:
        model: changed in place.
        rank: r, columns of B.
        alpha: the adapter's output is multiplied by alpha / rank.
        targets: regular expressions, searched in the names of the linear layers.
        freeze: train nothing but adapters: no gradients, optimizer state or averages of the rest.
            A control branch that starts afresh ends in zeros and would stay without effect: start
            from a trained one. False leaves what trained before, but for the adapted weights.

    Returns:
        names of the adapted layers.

    Raises:
        ConfigError: a rank or a target that fits nothing.
    """
    if rank < 1:
        raise ConfigError(f"model.lora.rank={rank}: give 1 or more")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(re.search(target, name) for name in linear):
            raise ConfigError(
                f"model.lora.targets: {target!r} is in no name of the {len(linear)} linear layers, "
                f"for example {next(iter(linear), 'none')}"
            )
    chosen = [name for name in linear if any(re.search(target, name) for target in targets)]
    if not chosen:
        raise ConfigError("model.lora.targets is empty: choose lora=attention or lora=linear")
    if freeze:
        model.requires_grad_(False)
    for name in chosen:
        _adapt(linear[name], rank, alpha)
        if not freeze:
            linear[name].weight.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        f"LoRA of rank {rank} on {len(chosen)} linear layers: {trained:,} parameters train"
        + (", the rest is frozen" if freeze else "")
    )
    return chosen


def remove_lora(model: nn.Module, merge: bool = True) -> None:
    """Take all adapters off, back to the parameters of the plain model, all of them trainable.

    Args:
        model: changed in place.
        merge: add the adapters to the weights first, so that the model computes the same.
    """
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in adapted:
        A, B, alpha = layer.lora_A.weight, layer.lora_B.weight, layer.lora_alpha
        if merge:
            delta = (alpha / A.shape[0]) * (B.float() @ A.float())
            layer.weight.data = (layer.weight.float() + delta).to(layer.weight.dtype).detach()
        layer.lora_hook.remove()
        del layer.lora_A, layer.lora_B, layer.lora_alpha, layer.lora_hook
    model.requires_grad_(True)


def _adapt(layer: Any, rank: int, alpha: float) -> None:
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    layer.lora_A = nn.Linear(layer.in_features, rank, bias=False, **place)
    layer.lora_B = nn.Linear(rank, layer.out_features, bias=False, **place)
    nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))
    nn.init.zeros_(layer.lora_B.weight)
    layer.register_buffer("lora_alpha", torch.tensor(float(alpha), device=layer.weight.device))
    layer.lora_scale = alpha / rank
    layer.lora_hook = layer.register_forward_hook(_add)


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Looks the adapter up in the layer it is called for, so that copies of a model work."""
    return output + layer.lora_scale * layer.lora_B(layer.lora_A(inputs[0]))
