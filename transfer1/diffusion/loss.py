"""The training loss and its weights.

Letters: B batch, C latent channels, T H W latent frames/rows/columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .edm import EDMScaling, per_sample


class EDMLoss(NamedTuple):
    """The loss and its parts; plain means are scalars."""

    total: Tensor  # what is differentiated, []
    mse: Tensor  # mean squared error of x0, masked, []
    edm: Tensor  # mean of edm_elements, []
    edm_elements: Tensor  # squared error weighted by noise level and sample, [B, C, T, H, W]
    elements: Tensor  # what `total` reduces, [B, C*T*H*W]


def edm_loss(
    x0: Tensor,
    prediction: Tensor,
    sigma_B: Tensor,
    *,
    scaling: EDMScaling,
    log_variance: Tensor | None = None,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduce: str = "mean",
    scale: float = 1.0,
) -> EDMLoss:
    """Weighted squared error of a denoised latent, in float32.

    Args:
        x0: clean latent [B, C, T, H, W].
        prediction: the denoiser's x0, same shape.
        sigma_B: noise levels [B].
        log_variance: learned log-variance per sample [B, 1]; None = no uncertainty weighting.
        mask: factor on the squared error, broadcastable to x0.
        sample_weight: factor per sample [B].
        reduce: "mean" over all elements, or "sum" over elements and mean over the batch.
        scale: factor on the total.

    Raises:
        ValueError: unknown `reduce`.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"model.loss_reduce={reduce}: choose mean or sum")
    squared_error = (x0.float() - prediction.float()) ** 2
    if mask is not None:
        squared_error = squared_error * mask
    weight_B = scaling.loss_weight(sigma_B)
    if sample_weight is not None:
        weight_B = weight_B * sample_weight
    edm_elements = squared_error * per_sample(weight_B, x0)
    elements = edm_elements.flatten(1)
    if log_variance is not None:
        elements = uncertainty_weighted_loss(elements, log_variance.float())
    total = elements.mean() if reduce == "mean" else elements.sum(1).mean()
    return EDMLoss(scale * total, squared_error.mean(), edm_elements.mean(), edm_elements, elements)


def uncertainty_weighted_loss(loss: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood up to constants of errors with a learned variance: l / v + ln v.

    Kendall and Gal 2017, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer
    Vision?", eq. 8. `log_variance` broadcasts against `loss`.
    """
    return loss * torch.exp(-log_variance) + log_variance


def loss_mask(
    batch: Mapping[str, Any], weights: Mapping[str, float], size: tuple[int, int]
) -> Tensor:
    """Factor on the squared error from the masks of a batch, float32 [B, 1, 1, H, W].

    Starts at 1. Where a mask is not zero, mask * weight replaces what earlier masks have set; the
    region of a mask of weight 0 stays 0 whatever comes after. The weight of `human_face_mask` is
    multiplied by 1 - `skip_face` [B] of the batch if that is given. Resized bilinearly.

    Args:
        batch: masks [B, 1, height, width] by name; absent ones count as zeros.
        weights: mask name -> weight, in order of application.
        size: rows and columns of the latent.

    Raises:
        ValueError: the batch has none of the masks, or a mask of another shape.
    """
    masks = {name: batch[name].float() for name in weights if name in batch}
    if not masks:
        raise ValueError(
            f"model.loss_masking names {sorted(weights)}, but the batch has none of them; "
            "add them to the dataset or set model.loss_mask_enabled=false"
        )
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 4:
        raise ValueError(f"loss masks must all be [B, 1, height, width], got {shapes}")
    factor = torch.ones_like(next(iter(masks.values())))
    excluded = torch.zeros_like(factor, dtype=torch.bool)
    for name, mask in masks.items():
        weight = torch.full_like(mask[:, :1, :1, :1], weights[name])
        if name == "human_face_mask" and "skip_face" in batch:
            weight = weight * (1 - per_sample(batch["skip_face"].float(), mask))
        factor = torch.where(mask != 0, mask * weight, factor)
        excluded |= (mask != 0) & (weight == 0)
    factor = factor.masked_fill(excluded, 0.0)
    if factor.shape[-2:] != size:
        factor = F.interpolate(factor, size, mode="bilinear", antialias=True)
    return factor.unsqueeze(2)


def sample_weight(
    batch: Mapping[str, Any], aesthetic: bool = False, camera_weight: float | None = None
) -> Tensor | None:
    """Factor on the loss of each sample, float32 [B]; None if all are 1.

    Args:
        batch: with `aesthetic_weight` [B] if `aesthetic`, `camera_attributes` [B, n] if
            `camera_weight` is given.
        aesthetic: use the aesthetic weight.
        camera_weight: factor for samples whose camera attributes from the second on do not add up
            to 0, that is, whose camera moves.
    """
    weight = batch["aesthetic_weight"].float() if aesthetic else None
    if camera_weight is not None:
        moving = (batch["camera_attributes"][:, 1:].sum(1) != 0).float()
        camera = 1 + moving * (camera_weight - 1)
        weight = camera if weight is None else weight * camera
    return weight
