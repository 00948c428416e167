"""One denoising call: preconditioning around the network, with frames that are given.

Letters: B batch, C latent channels, T H W latent frames/rows/columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .condition import Condition, DataType
from .draws import Draws
from .edm import EDMScaling, per_sample
from .frame_condition import FrameConditioning, augment_frames

# (x [B, C, T, H, W], noise level [B], condition) -> [B, C, T, H, W]
Network = Callable[[Tensor, Tensor, Condition], Tensor]


class Denoised(NamedTuple):
    """Predictions of one call, float32 [B, C, T, H, W] unless said otherwise."""

    x0: Tensor  # clean latent: what the loss compares
    eps: Tensor  # noise that belongs to x0
    log_variance: Tensor | None  # of the loss, [B, 1]
    x0_network: Tensor  # clean latent from the network alone
    x0_replaced: Tensor  # the same with the given frames put in: what sampling uses


def denoise(
    network: Network,
    scaling: EDMScaling,
    x_t: Tensor,
    sigma_B: Tensor,
    condition: Condition,
    frames: FrameConditioning | None = None,
    draws: Draws | None = None,
    log_variance: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Denoised:
    """Predict the clean latent of `x_t`.

    Args:
        network: called once, with c_in x and c_noise; nothing but its input x has `dtype`.
        x_t: noisy latent [B, C, T, H, W].
        sigma_B: its noise levels [B].
        condition: of `condition_on_frames` if there are `frames`.
        frames: how given frames are shown; None, and images, have none.
        draws: of the noise on given frames.
        log_variance: head on c_noise, [B] -> [B, 1].
        dtype: precision of the network's input; None keeps float32.
    """
    x_t = x_t.float()
    coefficients = scaling(sigma_B)
    indicator, noisy = None, x_t
    if frames is not None and condition.data_type is DataType.VIDEO:
        augmented = augment_frames(condition, sigma_B, frames, scaling, draws)
        indicator = augmented.indicator.float()
        condition = dataclasses.replace(
            condition, frame_indicator=indicator, augment_sigma=augmented.noise_level
        )
        if condition.video_cond_bool:
            shown = augmented.latent
        elif frames.cfg_unconditional_type == "noise_x_condition_region":
            shown = x_t
        else:
            shown = torch.zeros_like(x_t)
        noisy = indicator * shown + (1 - indicator) * x_t

    c_skip, c_out, c_in = (per_sample(c, x_t) for c in coefficients[:3])
    output = network((c_in * noisy).to(dtype or x_t.dtype), coefficients.c_noise, condition)
    x0_network = c_skip * noisy + c_out * output.float()
    x0_replaced = x0_network
    if indicator is not None:
        assert condition.gt_latent is not None, "condition_on_frames comes first"
        x0_replaced = indicator * condition.gt_latent.float() + (1 - indicator) * x0_network
    whole_loss = frames is not None and frames.compute_loss_for_condition_region
    x0 = x0_network if whole_loss else x0_replaced
    return Denoised(
        x0=x0,
        eps=(x_t - x0) / per_sample(sigma_B.float(), x_t),
        log_variance=None if log_variance is None else log_variance(coefficients.c_noise),
        x0_network=x0_network,
        x0_replaced=x0_replaced,
    )
