"""Frames that are given to the network clean, or nearly so, instead of being generated.

Letters: B batch, C latent channels, T H W latent frames/rows/columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .draws import Draws
from .edm import EDMScaling, NoiseDistribution, per_sample, seeded_normal

if TYPE_CHECKING:
    from .condition import Condition

LOCATIONS = ("first_n", "first_random_n", "random")
CORRUPTIONS = ("noise_with_sigma", "noise_with_sigma_fixed")
UNCONDITIONAL_TYPES = ("zero_condition_region_condition_mask", "noise_x_condition_region")


@dataclass(frozen=True)
class FrameConditioning:
    """Which latent frames are given and how; the fields are keys of `conditioner.video_cond_bool`.

    Attributes:
        compute_loss_for_condition_region: let the loss see the network's own x0 of given frames.
        condition_location: given frames: "first_n" (n from the caller), "first_random_n" (n drawn
            once per batch) or "random" (every frame by itself, once per batch).
        random_conditon_rate: probability of a frame under "random" (spelled so in configurations).
        first_random_n_num_condition_t_max, first_random_n_num_condition_t_min: bounds of n.
        cfg_unconditional_type: what the network sees in place of given frames that are withheld:
            zeros, or the noisy latent.
        apply_corruption_to_condition_region: noise on given frames: drawn per sample (training), or
            of the fixed level augment_sigma_in_inference.
        apply_corruption_to_condition_region_sigma_value: levels by frame; configurations carry it,
            neither corruption above uses it.
        condition_on_augment_sigma: tell the network the noise level of the given frames.
        augment_sigma_sample_p_mean, augment_sigma_sample_p_std, augment_sigma_sample_multiplier:
            distribution of the drawn level: log-normal times the multiplier.
        add_pose_condition: refused, camera poses are not supported.
        sample_tokens_start_from_p_or_i: train on a random window of longer latents (`crop_latent`).
        normalize_condition_latent: standardise every given frame per sample and channel.
        augment_sigma_in_inference, augment_seed: level and noise under "noise_with_sigma_fixed".
    """

    compute_loss_for_condition_region: bool = False
    condition_location: str = "first_random_n"
    random_conditon_rate: float = 0.5
    first_random_n_num_condition_t_max: int = 4
    first_random_n_num_condition_t_min: int = 0
    cfg_unconditional_type: str = "zero_condition_region_condition_mask"
    apply_corruption_to_condition_region: str = "noise_with_sigma"
    apply_corruption_to_condition_region_sigma_value: Sequence[float] = ()
    condition_on_augment_sigma: bool = False
    augment_sigma_sample_p_mean: float = 0.0
    augment_sigma_sample_p_std: float = 1.0
    augment_sigma_sample_multiplier: float = 4.0
    add_pose_condition: bool = False
    sample_tokens_start_from_p_or_i: bool = False
    normalize_condition_latent: bool = False
    augment_sigma_in_inference: float = 0.001
    augment_seed: int = 1

    def __post_init__(self) -> None:
        choices = {
            "condition_location": LOCATIONS,
            "apply_corruption_to_condition_region": CORRUPTIONS,
            "cfg_unconditional_type": UNCONDITIONAL_TYPES,
        }
        prefix = "model.conditioner.video_cond_bool"
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{prefix}.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}"
                )
        low = self.first_random_n_num_condition_t_min
        high = self.first_random_n_num_condition_t_max
        if not 0 <= low <= high:
            raise ValueError(
                f"{prefix}.first_random_n_num_condition_t_min={low} and ..._max={high}: "
                "need 0 <= min <= max"
            )
        if self.add_pose_condition:
            raise ValueError(f"{prefix}.add_pose_condition=true: camera poses are not supported")

    def at_inference(self, sigma: float = 0.001, seed: int = 1) -> FrameConditioning:
        """The same with noise of a fixed level and seed on the given frames."""
        return dataclasses.replace(
            self,
            apply_corruption_to_condition_region="noise_with_sigma_fixed",
            augment_sigma_in_inference=sigma,
            augment_seed=seed,
        )


class AugmentedFrames(NamedTuple):
    """Given frames as the network shall see them."""

    latent: Tensor  # takes the place of x_t at given frames, [B, C, T, H, W]
    indicator: Tensor  # [1 or B, 1, T, 1, 1], 1 = given
    noise_level: Tensor | None  # c_noise of the augmentation [B], 0 where no frame is given


def condition_on_frames(
    condition: Condition,
    latent: Tensor,
    frames: FrameConditioning,
    draws: Draws | None = None,
    num_condition_t: int | None = None,
) -> Condition:
    """The condition with its clean latent, the indicator of given frames and their input mask.

    Args:
        latent: clean latent [B, C, T, H, W].
        draws: purposes "num_condition_t" ("first_random_n") and "condition_indicator" ("random").
        num_condition_t: number of given frames; needed by, and only used by "first_n".
    """
    indicator = frame_indicator(latent.shape[2], frames, draws, num_condition_t).to(latent)
    B, _, T, H, W = latent.shape
    shown = indicator if condition.video_cond_bool else torch.zeros_like(indicator)
    return dataclasses.replace(
        condition,
        gt_latent=latent,
        frame_indicator=indicator,
        frame_mask=shown.expand(B, 1, T, H, W),
    )


def frame_indicator(
    num_frames: int,
    frames: FrameConditioning,
    draws: Draws | None = None,
    num_condition_t: int | None = None,
) -> Tensor:
    """1 for given latent frames, shared by the batch; float32 [1, 1, T, 1, 1] on the CPU.

    Raises:
        ValueError: "first_n" without a number of frames.
    """
    if frames.condition_location == "random":
        assert draws is not None, "the given frames are drawn"
        given = draws.uniform_once("condition_indicator", num_frames) < frames.random_conditon_rate
    else:
        if frames.condition_location == "first_n":
            count = num_condition_t
            if count is None or count < 0:
                raise ValueError(
                    "condition_location=first_n needs num_condition_t, the number of given latent "
                    f"frames, at least 0; got {num_condition_t}"
                )
        else:
            assert draws is not None, "the number of given frames is drawn"
            low = frames.first_random_n_num_condition_t_min
            high = frames.first_random_n_num_condition_t_max
            count = draws.integer("num_condition_t", low, high + 1)
        given = torch.arange(num_frames) < count
    return given.float().reshape(1, 1, num_frames, 1, 1)


def augment_frames(
    condition: Condition,
    sigma_B: Tensor,
    frames: FrameConditioning,
    scaling: EDMScaling,
    draws: Draws | None = None,
) -> AugmentedFrames:
    """Noise on the given frames, scaled so that c_in(sigma) makes of it c_in(augmentation sigma).

    Under "noise_with_sigma_fixed" a sample whose own noise level has come down to that of the
    augmentation has no given frames any more: from there on they are denoised with the rest.

    Args:
        condition: of `condition_on_frames`; it is not changed.
        sigma_B: noise level of x_t [B].
        draws: purposes "augment_sigma" and "augment_noise" under "noise_with_sigma".
    """
    clean, indicator = condition.gt_latent, condition.frame_indicator
    assert clean is not None and indicator is not None, "condition_on_frames comes first"
    clean = clean.float()
    if frames.normalize_condition_latent:
        clean = normalize_frames(clean)
    if frames.apply_corruption_to_condition_region == "noise_with_sigma_fixed":
        augment_sigma_B = torch.full_like(sigma_B.float(), frames.augment_sigma_in_inference)
        noise = seeded_normal(clean.shape, frames.augment_seed)
        indicator = indicator * per_sample(augment_sigma_B < sigma_B, clean)
    else:
        assert draws is not None, "the noise of given frames is drawn"
        distribution = NoiseDistribution(
            frames.augment_sigma_sample_p_mean, frames.augment_sigma_sample_p_std
        )
        augment_sigma_B = distribution.sigma(draws.uniform("augment_sigma", len(clean)))
        augment_sigma_B = augment_sigma_B.to(clean.device) * frames.augment_sigma_sample_multiplier
        noise = draws.normal("augment_noise", clean.shape)
    augmented = clean + per_sample(augment_sigma_B, clean) * noise.to(clean.device)
    coefficients = scaling(augment_sigma_B)
    rescaled = augmented * per_sample(coefficients.c_in / scaling(sigma_B).c_in, clean)
    noise_level = None
    if frames.condition_on_augment_sigma:
        noise_level = coefficients.c_noise * indicator.flatten(1).amax(1)
    return AugmentedFrames(rescaled, indicator, noise_level)


def normalize_frames(latent: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance over the pixels of every sample, channel and frame."""
    mean = latent.mean((3, 4), keepdim=True)
    return (latent - mean) / latent.std((3, 4), keepdim=True)


def crop_latent(latent: Tensor, length: int, draws: Draws) -> Tensor:
    """A window of `length` frames of [B, C, T, H, W], one start per batch (purpose "frame_start").

    Raises:
        ValueError: the latent is shorter than the window.
    """
    if latent.shape[2] < length:
        raise ValueError(f"a window of {length} latent frames from a clip of {latent.shape[2]}")
    start = draws.integer("frame_start", 0, latent.shape[2] - length + 1)
    return latent[:, :, start : start + length]
