"""One training step: from a batch to a loss, in the order of the original.

Nothing here holds state, edits the batch or calls backward.

Letters: B batch, F H W pixel frames/rows/columns, C latent channels, K conditions stacked on the
channels of a hint. A latent is [B, C, t, h, w]; pixels are [B, 3, F, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transfer1.config import instantiate
from transfer1.diffusion.condition import Condition, Conditioner, DataType
from transfer1.diffusion.corruption import PixelCorruptor
from transfer1.diffusion.denoise import Denoised, denoise
from transfer1.diffusion.draws import Draws
from transfer1.diffusion.edm import EDMScaling, NoiseDistribution, add_noise, draw_noise
from transfer1.diffusion.frame_condition import condition_on_frames, crop_latent
from transfer1.diffusion.loss import edm_loss, loss_mask, sample_weight
from transfer1.diffusion.tokenizer import VideoTokenizer
from transfer1.model.transfer import Transfer

RGB = 3


@dataclass(frozen=True)
class HintOptions:
    """How control videos become latents; the fields are keys of `model` and `model.hint_key`."""

    hint_key: str
    grayscale: bool = False
    hint_dropout_rate: float = 0.0  # chance of each condition to be blacked out, where K > 1
    hint_mask: Sequence[bool] = (True,)  # which conditions are used outside training
    pixel_corruptor: PixelCorruptor | None = None  # applied to the hint in training


@dataclass(frozen=True)
class StepOptions:
    """What `compute_loss` needs of the configuration; the fields are keys of `model`."""

    hint: HintOptions | None  # None: a base network without control
    sde: NoiseDistribution
    sigma_data: float = 0.5
    input_data_key: str = "video"
    input_image_key: str = "images_1024"
    adjust_video_noise: bool = False  # sigma of clips grows with sqrt(latent frames)
    loss_add_logvar: bool = True
    loss_reduce: str = "mean"
    loss_scale: float = 1.0
    loss_masking: Mapping[str, float] | None = None  # None: loss_mask_enabled is off
    aesthetic: bool = False
    camera_weight: float | None = None
    latent_frames: int | None = None  # longer latents are cropped to this many frames
    dtype: torch.dtype = torch.float32  # of the network's input

    @property
    def scaling(self) -> EDMScaling:
        return EDMScaling(self.sigma_data)

    @classmethod
    def from_config(cls, model: Any, dtype: torch.dtype) -> StepOptions:
        """Read the config node `model`."""
        hint = None
        if model.net_ctrl is not None and model.hint_key is not None:
            hint = HintOptions(
                hint_key=model.hint_key.hint_key,
                grayscale=model.hint_key.grayscale,
                hint_dropout_rate=model.hint_dropout_rate,
                hint_mask=tuple(model.hint_mask),
                pixel_corruptor=instantiate(model.pixel_corruptor),
            )
        camera = model.camera_sample_weight
        return cls(
            hint=hint,
            sde=instantiate(model.sde),
            sigma_data=model.sigma_data,
            input_data_key=model.input_data_key,
            input_image_key=model.input_image_key,
            adjust_video_noise=model.adjust_video_noise,
            loss_add_logvar=model.loss_add_logvar,
            loss_reduce=model.loss_reduce,
            loss_scale=model.loss_scale,
            loss_masking=dict(model.loss_masking or {}) if model.loss_mask_enabled else None,
            aesthetic=model.aesthetic_finetuning.enabled,
            camera_weight=camera.weight if camera.enabled else None,
            latent_frames=model.latent_shape[1],
            dtype=dtype,
        )


@dataclass(frozen=True)
class Loss:
    """Outcome of a step: `total` is differentiated, `terms` are detached numbers to report."""

    total: Tensor  # []
    terms: dict[str, Tensor]
    latent: Tensor  # clean latent x0 [B, C, t, h, w]
    noisy: Tensor  # x_t
    sigma: Tensor  # [B]
    condition: Condition
    hints: list[Tensor]  # each [B, K*C, t, h, w]; empty without control
    denoised: Denoised


def compute_loss(
    model: Transfer,
    tokenizer: VideoTokenizer,
    conditioner: Conditioner,
    batch: Mapping[str, Any],
    draws: Draws,
    options: StepOptions,
) -> Loss:
    """Encode, condition, noise, denoise, compare.

    Outside training (`model.training` false) the hint is neither dropped nor corrupted and every
    control block is used.

    Raises:
        ValueError: the batch holds none or both of the video and image keys, lacks the hint, or a
            tensor has another shape or dtype than the step takes.
    """
    pixels, data_type = read_pixels(batch, options)
    with torch.no_grad():
        latent = tokenizer.encode(pixels).float() * options.sigma_data
    condition = conditioner(batch, draws, data_type)
    is_video = data_type is DataType.VIDEO
    frames = conditioner.frames if is_video else None
    hints, weights = read_hints(
        batch, pixels, tokenizer, options, draws if model.training else None
    )
    if frames is not None:
        if options.latent_frames and frames.sample_tokens_start_from_p_or_i:
            # The draw has a key, so that clip and hints get the same window.
            latent, *hints = (
                crop_latent(whole, options.latent_frames, draws) for whole in (latent, *hints)
            )
        condition = condition_on_frames(condition, latent, frames, draws)

    stretch = is_video and options.adjust_video_noise
    multiplier = math.sqrt(latent.shape[2]) if stretch else 1.0
    sigma, noise = draw_noise(options.sde, latent.shape, draws, multiplier)
    sigma, noise = sigma.to(latent.device), noise.to(latent.device)
    noisy = add_noise(latent, sigma, noise)
    keep = draw_control_branch(model, draws, len(latent)) if hints else None
    inputs = [hint.to(options.dtype) for hint in hints]
    denoised = denoise(
        lambda x, noise_level, given: model(x, noise_level, given, inputs, weights, keep),
        options.scaling,
        noisy,
        sigma,
        condition,
        frames=frames,
        draws=draws,
        log_variance=model.log_variance,
        dtype=options.dtype,
    )

    loss = edm_loss(
        latent,
        denoised.x0,
        sigma,
        scaling=options.scaling,
        log_variance=denoised.log_variance if options.loss_add_logvar else None,
        mask=_mask(batch, options, latent),
        sample_weight=sample_weight(batch, options.aesthetic, options.camera_weight),
        reduce=options.loss_reduce,
        scale=options.loss_scale,
    )
    terms = {"loss": loss.total, "edm_loss": loss.edm, "mse_loss": loss.mse}
    return Loss(
        total=loss.total,
        terms={name: value.detach() for name, value in terms.items()},
        latent=latent,
        noisy=noisy,
        sigma=sigma,
        condition=condition,
        hints=hints,
        denoised=denoised,
    )


def read_pixels(batch: Mapping[str, Any], options: StepOptions) -> tuple[Tensor, DataType]:
    """Return the clip or the images of a batch in [-1, 1], [B, 3, F, H, W], and which it is."""
    present = [key for key in (options.input_data_key, options.input_image_key) if key in batch]
    if len(present) != 1:
        raise ValueError(
            f"a batch holds exactly one of {options.input_data_key!r} (clips) and "
            f"{options.input_image_key!r} (images); this one holds {sorted(batch)}. The names are "
            "set by model.input_data_key and model.input_image_key"
        )
    is_video = present[0] == options.input_data_key
    pixels = normalize_pixels(batch[present[0]], present[0])
    if pixels.shape[1] != RGB:
        raise ValueError(f"batch[{present[0]!r}] has {pixels.shape[1]} channels, expected {RGB}")
    return pixels, DataType.VIDEO if is_video else DataType.IMAGE


def normalize_pixels(pixels: Tensor, name: str) -> Tensor:
    """Map uint8 [B, channels, F, H, W] (images: without F) to float32 [-1, 1] with frames."""
    if pixels.dtype != torch.uint8 or pixels.ndim not in (4, 5):
        raise ValueError(
            f"batch[{name!r}] is {pixels.dtype} of shape {tuple(pixels.shape)}; expected uint8 "
            "[batch, channels, frames, height, width], or without frames for images"
        )
    if pixels.ndim == 4:
        pixels = pixels.unsqueeze(2)
    return pixels.float() / 127.5 - 1.0


def read_hints(
    batch: Mapping[str, Any],
    pixels: Tensor,
    tokenizer: VideoTokenizer,
    options: StepOptions,
    draws: Draws | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the hint latents of a batch and a weight for each, from `control_weight` if present.

    A single hint holds all conditions. Several weights make one hint per condition, in which the
    others are black, so that the network can weigh them one by one; in training, conditions that
    are dropped are left out.
    """
    if options.hint is None:
        return [], None
    key = options.hint.hint_key
    if key not in batch:
        raise ValueError(
            f"the batch lacks the control video {key!r} (model.hint_key); it holds {sorted(batch)}"
        )
    hint = normalize_pixels(batch[key], key)
    if hint.shape[2:] != pixels.shape[2:] or hint.shape[1] % RGB:
        raise ValueError(
            f"batch[{key!r}] has shape {tuple(hint.shape)}; expected a multiple of {RGB} channels "
            f"and frames, height, width {tuple(pixels.shape[2:])} as the clip has"
        )
    if draws is not None and options.hint.pixel_corruptor is not None:
        hint = options.hint.pixel_corruptor(hint, draws)
    conditions = hint.shape[1] // RGB
    weights = read_weights(batch, conditions, key)
    if len(weights) == 1:
        return [encode_hint(hint, tokenizer, options, draws)], weights
    used = [True] * conditions
    if draws is not None and options.hint.hint_dropout_rate > 0:
        used = draw_hint_mask(conditions, options.hint.hint_dropout_rate, draws)
    chosen = [index for index in range(conditions) if used[index]]
    only = torch.eye(conditions, dtype=torch.bool).tolist()
    hints = [encode_hint(hint, tokenizer, options, mask=only[index]) for index in chosen]
    return hints, [weights[index] for index in chosen]


def read_weights(batch: Mapping[str, Any], conditions: int, key: str) -> list[Tensor]:
    """Return `control_weight` of a batch: one weight for all conditions, or one for each.

    Each is a number [], a number per sample [B], or a map over space and time. `control_weight` is
    a number, a map, a list of such weights, a tensor [K] of numbers, [B, K] of numbers per sample
    (what a loader makes of [K] in its samples), or [K, B or 1, 1, frames, rows, columns] of maps.

    Raises:
        ValueError: any other shape, or not as many weights as conditions.
    """
    given = batch.get("control_weight", 1.0)
    if isinstance(given, Sequence):
        weights = [torch.as_tensor(weight) for weight in given]
    else:
        weight = torch.as_tensor(given)
        if weight.ndim == 2:
            weight = weight.T
        weights = list(weight) if weight.ndim in (1, 2, 6) else [weight]
    samples = len(batch[key])
    for weight in weights:
        if weight.ndim not in (0, 1, 5) or (weight.ndim == 1 and len(weight) != samples):
            raise ValueError(
                f"control_weight holds a weight of shape {tuple(weight.shape)} for a batch of "
                f"{samples}; give a number, [batch] numbers, or a map [batch or 1, 1, frames, "
                f"rows, columns] for each of {conditions} conditions"
            )
    if len(weights) not in (1, conditions):
        raise ValueError(
            f"control_weight holds {len(weights)} weights for {conditions} conditions in {key!r}"
        )
    return weights


def encode_hint(
    hint: Tensor,
    tokenizer: VideoTokenizer,
    options: StepOptions,
    draws: Draws | None = None,
    mask: Sequence[bool] | None = None,
) -> Tensor:
    """Encode a normalised hint [B, 3K, F, H, W] to [B, K*C, t, h, w], condition by condition.

    Args:
        draws: given in training: conditions are dropped at random, at least one stays.
        mask: which conditions to use; given or not, they are black before the tokenizer otherwise.
            Without it `hint_mask` counts outside training, where several conditions were trained
            with dropout (the original's rule).
    """
    assert options.hint is not None
    given = options.hint
    groups = list(hint.split(RGB, dim=1))
    if given.grayscale:
        groups = [group.mean(dim=1, keepdim=True).expand_as(group) for group in groups]
    if mask is None and len(groups) > 1 and given.hint_dropout_rate > 0:
        if draws is not None:
            mask = draw_hint_mask(len(groups), given.hint_dropout_rate, draws)
        else:
            mask = _checked_hint_mask(given, len(groups))
    if mask is not None:
        groups = [
            group if keep else torch.zeros_like(group)
            for group, keep in zip(groups, mask, strict=True)
        ]
    with torch.no_grad():
        latents = [tokenizer.encode(group).float() * options.sigma_data for group in groups]
    return torch.cat(latents, dim=1)


def draw_hint_mask(conditions: int, rate: float, draws: Draws) -> list[bool]:
    """Draw which conditions stay in this batch; where none would, one that is drawn stays."""
    keep = (draws.uniform_once("hint_dropout", conditions) > rate).tolist()
    if not any(keep):
        keep[draws.integer("hint_keep", 0, conditions)] = True
    return keep


def draw_control_branch(model: Transfer, draws: Draws, batch: int) -> Tensor | None:
    """Draw which samples use the control branch [B]; None (all of them) unless the base learns."""
    base_learns = any(parameter.requires_grad for parameter in model.base.parameters())
    if model.net is None or not (torch.is_grad_enabled() and model.training and base_learns):
        return None
    return draws.bernoulli("control_branch", 1.0 - model.net.dropout_ctrl_branch, batch)


def _checked_hint_mask(options: HintOptions, conditions: int) -> Sequence[bool]:
    if len(options.hint_mask) != conditions:
        raise ValueError(
            f"model.hint_mask has {len(options.hint_mask)} entries, but {options.hint_key!r} holds "
            f"{conditions} conditions"
        )
    return options.hint_mask


def _mask(batch: Mapping[str, Any], options: StepOptions, latent: Tensor) -> Tensor | None:
    if options.loss_masking is None:
        return None
    return loss_mask(batch, options.loss_masking, (latent.shape[-2], latent.shape[-1]))
