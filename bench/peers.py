"""The same work by what one would use instead: callables on the inputs of an op."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Peer = Callable[[dict[str, Any]], Callable[[], Any]]


def torch_update(inputs: dict[str, Any], **how: bool) -> Callable[[], Any]:
    """clip_grad_norm_, torch.optim.AdamW and an average by `torch._foreach_*`, as scripts do it."""
    params = _trainable(inputs)
    optimizer = torch.optim.AdamW(
        params,
        lr=float(inputs["lr"]),
        betas=inputs["betas"],
        eps=inputs["eps"],
        weight_decay=inputs["weight_decay"],
        **how,
    )
    shadows = [param.detach().clone() for param in params]
    beta = float(inputs["ema_beta"])

    def update() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimizer.step()
        _average(shadows, params, beta)

    return update


def torch_norm(inputs: dict[str, Any]) -> Callable[[], Any]:
    """The norm as `clip_grad_norm_` computes it."""
    return lambda: nn.utils.get_total_norm(inputs["grads"], foreach=True)


def torch_average(inputs: dict[str, Any]) -> Callable[[], Any]:
    """`torch._foreach_mul_` and `torch._foreach_add_`."""
    shadows, params = copy.deepcopy(inputs["shadows"]), inputs["params"]
    beta = float(inputs["beta"])
    return lambda: _average(shadows, params, beta)


def torch_lerp(inputs: dict[str, Any]) -> Callable[[], Any]:
    """`torch._foreach_lerp_`, as timm's ModelEmaV3 does."""
    shadows, params = copy.deepcopy(inputs["shadows"]), inputs["params"]
    weight = 1 - float(inputs["beta"])
    return lambda: torch._foreach_lerp_(shadows, params, weight)


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "adamw_step": {
        "torch fused": lambda inputs: torch_update(inputs, fused=True),
        "torch foreach": lambda inputs: torch_update(inputs, foreach=True),
    },
    "grad_norm": {"torch foreach": torch_norm},
    "ema_update": {"torch foreach": torch_average, "torch lerp": torch_lerp},
}


def _trainable(inputs: dict[str, Any]) -> list[nn.Parameter]:
    params = [nn.Parameter(param.clone()) for param in inputs["params"]]
    for param, grad in zip(params, inputs["grads"], strict=True):
        param.grad = grad.clone()
    return params


def _average(shadows: list[Tensor], params: list[Any], beta: float) -> None:
    torch._foreach_mul_(shadows, beta)
    torch._foreach_add_(shadows, [param.detach() for param in params], alpha=1 - beta)
