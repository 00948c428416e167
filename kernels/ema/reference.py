"""Exponential moving average over lists of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor


@torch.no_grad()
def ema_update(shadows: list[Tensor], params: list[Tensor], beta: Scalar) -> None:
    """shadow = beta * shadow + (1 - beta) * param, in place and in float32.

    Args:
        shadows: float32 averages.
        params: sources, any floating dtype, one per shadow and of its shape.
        beta: number, or tensor of one element on their device; 0 copies the sources exactly.
    """
    if not shadows:
        return
    beta = scalar(beta, shadows)
    sources = [param.float() for param in params]
    torch._foreach_mul_(shadows, beta)
    torch._foreach_add_(shadows, torch._foreach_mul(sources, 1 - beta))


def scalar(value: Scalar, like: list[Tensor]) -> Tensor:
    """A number or a tensor of one element as float64 [] on the device of the first of `like`."""
    return torch.as_tensor(value, dtype=torch.float64, device=like[0].device).reshape(())
