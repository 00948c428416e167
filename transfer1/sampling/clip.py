"""A clip from noise: hints, conditions, guidance and solver together.

Letters: B batch, C latent channels, T H W latent frames/rows/columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transfer1.diffusion.condition import DataType
from transfer1.diffusion.denoise import denoise
from transfer1.diffusion.draws import Draws
from transfer1.diffusion.frame_condition import condition_on_frames
from transfer1.diffusion.sampler import initial_noise, sample
from transfer1.model.transfer import Transfer
from transfer1.training.step import StepOptions, read_hints

from .guidance import GuidedNetwork

NO_FRAME_SIGMA = 1000.0  # the original's level of noise on given frames where none is given


@dataclass(frozen=True)
class SampleOptions:
    """How a clip is sampled.

    Attributes:
        num_steps, solver, sigma_min, s_churn: see `diffusion.sampler.sample`.
        sigma_max: noise level of the start; None: that of `model.sde`.
        guidance: 0 = no guidance.
        seed: of the initial noise, the same on every device.
        augment_sigma: level of the noise on given frames.
        batched: see `GuidedNetwork`.
    """

    num_steps: int = 35
    solver: str = "2ab"
    sigma_min: float = 0.002
    sigma_max: float | None = None
    s_churn: float = 0.0
    guidance: float = 0.0
    seed: int = 1
    augment_sigma: float = 0.001
    batched: bool = True


@torch.no_grad()
def sample_clip(
    model: Transfer,
    batch: Mapping[str, Any],
    options: StepOptions,
    sampling: SampleOptions,
    shape: Sequence[int],
    given_latent: Tensor | None = None,
    num_given: int = 0,
    start_latent: Tensor | None = None,
    data_type: DataType = DataType.VIDEO,
) -> Tensor:
    """Sample a batch of latents; the model is in evaluation mode meanwhile.

    Args:
        batch: as for training, without the clip. `neg_t5_text_embeddings` and `neg_t5_text_mask`
            are the text to guide away from; a true `use_none_hint` leaves the uncondition without
            hint.
        shape: of the latents, [B, C, T, H, W].
        given_latent: clean latent whose first `num_given` frames are shown to the network.
        start_latent: clean latent that noise of level sigma_max is added to, instead of zero: a
            partially noised clip.
        data_type: images have no given frames.

    Returns:
        Clean latents as the network knows them, float32; the tokenizer decodes them divided by
        `options.sigma_data`.

    Raises:
        ValueError: given frames for a model that takes none, or latents of another shape.
    """
    frames = model.conditioner.frames if data_type is DataType.VIDEO else None
    if num_given and (frames is None or given_latent is None):
        raise ValueError(
            f"num_given={num_given}: given frames need given_latent and a model that takes them "
            "(conditioner=video_cond or an experiment with frame conditioning)"
        )
    for name, latent in (("given_latent", given_latent), ("start_latent", start_latent)):
        if latent is not None and tuple(latent.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(latent.shape)}, expected {tuple(shape)}")
    sigma_max = options.sde.sigma_max if sampling.sigma_max is None else sampling.sigma_max
    noise = initial_noise(shape, sigma_max, sampling.seed)

    was_training = model.training
    model.eval()
    try:
        hints: list[Tensor] = []
        weights: list[Tensor] | None = None
        if options.hint is not None and options.hint.hint_key in batch:
            pixels = batch[options.hint.hint_key]  # the hint is as long as the clip will be
            hints, weights = read_hints(batch, pixels, model.tokenizer, options, draws=None)
        has_negative = any(key.startswith("neg_") for key in batch)
        condition, uncondition = model.conditioner.pair(batch, data_type, has_negative)
        x_t = noise.to(condition.context.device)
        if start_latent is not None:
            x_t = x_t + start_latent.to(x_t)
        if frames is not None:
            sigma = sampling.augment_sigma if num_given else NO_FRAME_SIGMA
            frames = dataclasses.replace(frames, condition_location="first_n").at_inference(sigma)
            clean = torch.zeros_like(x_t) if given_latent is None else given_latent.to(x_t)
            # Frames are shown to both predictions alike: guidance is about the text.
            condition = dataclasses.replace(condition, video_cond_bool=True)
            condition = condition_on_frames(condition, clean, frames, num_condition_t=num_given)
        network = GuidedNetwork(
            model,
            uncondition,
            [hint.to(options.dtype) for hint in hints],
            weights,
            sampling.guidance,
            use_none_hint=bool(batch.get("use_none_hint", False)),
            batched=sampling.batched,
        )

        def x0(x: Tensor, sigma_B: Tensor) -> Tensor:
            return denoise(
                network, options.scaling, x, sigma_B, condition, frames, dtype=options.dtype
            ).x0_replaced

        return sample(
            x0,
            x_t,
            num_steps=sampling.num_steps,
            sigma_min=sampling.sigma_min,
            sigma_max=sigma_max,
            solver=sampling.solver,
            s_churn=sampling.s_churn,
            draws=Draws(sampling.seed),
        )
    finally:
        model.train(was_training)
