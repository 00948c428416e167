"""Exponential moving average over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.checks import Scalar, check_dtypes, check_matching, check_range
from kernels.multi_tensor import scalar

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def ema_update(
    shadows: list[Tensor],
    params: list[Tensor],
    beta: Scalar,
    average: Callable[..., None] | None = None,
) -> None:
    """shadow = beta * shadow + (1 - beta) * param, in place and in float32.

    Several averages of the same parameters ("profiles") are updated in one read of them: `shadows`
    then holds one list of averages after the other, and `beta` one element per profile.

    Args:
        shadows: float32 averages, as many as parameters, or profiles times as many.
        params: sources, any floating dtype, each of the shape of its shadows.
        beta: number, or tensor of one element per profile on their device; 0 copies the sources.
        average: what does the arithmetic, `average_lists` if None; another one may be faster.

    Raises:
        ValueError: lengths, shapes, devices or dtypes do not fit, or beta is outside [0, 1].
    """
    profiles = check_ema_update(shadows, params, beta)
    if not params:
        return
    betas = scalar(beta, torch.float64, params[0].device, count=profiles)
    (average or average_lists)(shadows, params, betas.float(), (1 - betas).float())


def average_lists(
    shadows: list[Tensor], params: list[Tensor], beta: Tensor, complement: Tensor
) -> None:
    """The arithmetic of `ema_update`; beta and complement = 1 - beta are float32 [profiles]."""
    sources = [param.float() for param in params]
    for profile in range(len(shadows) // len(params)):
        chosen = shadows[profile * len(params) : (profile + 1) * len(params)]
        torch._foreach_mul_(chosen, beta[profile])
        torch._foreach_add_(chosen, torch._foreach_mul(sources, complement[profile]))


def check_ema_update(shadows: list[Tensor], params: list[Tensor], beta: Scalar) -> int:
    """Check the arguments of `ema_update` and return the number of profiles.

    Raises:
        ValueError: see `ema_update`.
    """
    profiles = beta.numel() if isinstance(beta, Tensor) else 1
    if len(shadows) != profiles * len(params):
        raise ValueError(
            f"ema_update: {len(shadows)} shadows for {len(params)} params and {profiles} betas; "
            "there must be one shadow per parameter and beta"
        )
    check_matching("ema_update", shadows=shadows, params=params * profiles)
    check_dtypes("ema_update", "shadows", shadows, (torch.float32,))
    check_dtypes("ema_update", "params", params, FLOATING)
    if not isinstance(beta, Tensor):
        check_range("ema_update", "beta", beta, 0.0, 1.0 + 1e-12)
    return profiles
