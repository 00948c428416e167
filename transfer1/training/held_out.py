"""Does the model learn? Denoising loss on held-out clips at fixed noise levels with fixed noise.

Every clip is denoised with its own control and with the control of another clip; a network that
outputs zero gives the score to beat. The score is the EDM loss without log-variance (Karras et al.,
"Elucidating the design space of diffusion-based generative models", 2022, table 1): the mean of
lambda(sigma) * (x0 - prediction)^2.

Letters: B batch (1 here), C latent channels, T H W latent frames/rows/columns, N clips, S levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transfer1.diffusion.condition import Condition
from transfer1.diffusion.denoise import denoise
from transfer1.diffusion.draws import Draws
from transfer1.diffusion.edm import add_noise
from transfer1.diffusion.frame_condition import condition_on_frames
from transfer1.diffusion.loss import edm_loss
from transfer1.model.transfer import Transfer

from .step import StepOptions, read_hints, read_pixels


@dataclass(frozen=True)
class Clip:
    """One clip as the network sees it."""

    name: str
    pixels: Tensor  # [1, 3, frames, height, width] in [-1, 1]
    control: Tensor  # uint8 [1, 3, frames, height, width]
    latent: Tensor  # clean latent [1, C, T, H, W]
    condition: Condition  # full conditions, no frame given
    hints: list[Tensor]
    weights: list[Tensor] | None


@dataclass(frozen=True)
class Scores:
    """EDM loss per clip and noise level, each [N, S]."""

    zero: Tensor  # a network that outputs zero
    right: Tensor  # with the clip's own control
    wrong: Tensor  # with the control of another clip


def prepare(
    model: Transfer, batches: Iterable[Mapping[str, Any]], options: StepOptions
) -> list[Clip]:
    """Encode held-out batches, already on the device of the model, clip by clip.

    Raises:
        ValueError: fewer than two clips (there is no other control), or clips of different sizes.
    """
    assert options.hint is not None, "held-out scores compare controls"
    clips = []
    with torch.no_grad():
        for batch in batches:
            pixels, data_type = read_pixels(batch, options)
            if len(pixels) != 1:
                raise ValueError(
                    f"held-out clips are scored one by one, but a batch holds {len(pixels)}; "
                    "set dataloader_val.batch_size=1"
                )
            latent = model.tokenizer.encode(pixels).float() * options.sigma_data
            condition, _ = model.conditioner.pair(batch, data_type=data_type)
            if model.conditioner.frames is not None:
                frames = replace(model.conditioner.frames, condition_location="first_n")
                condition = condition_on_frames(condition, latent, frames, num_condition_t=0)
            hints, weights = read_hints(batch, pixels, model.tokenizer, options, draws=None)
            control = batch[options.hint.hint_key]
            clips.append(
                Clip(batch["clip_name"][0], pixels, control, latent, condition, hints, weights)
            )
    if len(clips) < 2 or len({clip.latent.shape for clip in clips}) > 1:
        raise ValueError(
            "held-out scores need two or more clips of one size, but dataloader_val gives "
            + (", ".join(f"{clip.name} {tuple(clip.latent.shape)}" for clip in clips) or "none")
        )
    return clips


def predict(
    model: Transfer, clip: Clip, hints: list[Tensor], sigma: float, seed: int, options: StepOptions
) -> tuple[Tensor, Tensor]:
    """Denoise a clip with the given hints; the noise depends on its name, the level and the seed.

    Returns:
        (prediction of x0, prediction of a network that outputs zero), float32 [1, C, T, H, W].
    """
    device = clip.latent.device
    noise = Draws(seed).normal(f"held-out noise, {clip.name}, sigma {sigma}", clip.latent.shape)
    level = torch.full((1,), sigma, device=device)
    noisy = add_noise(clip.latent, level, noise.to(device))
    with torch.no_grad():
        x0, zero = (
            denoise(network, options.scaling, noisy, level, clip.condition, dtype=options.dtype).x0
            for network in (
                lambda x, noise_level, given: model(x, noise_level, given, hints, clip.weights),
                lambda x, noise_level, given: torch.zeros_like(x),
            )
        )
    return x0, zero


def measure(
    model: Transfer,
    clips: Sequence[Clip],
    options: StepOptions,
    sigmas: Sequence[float],
    seeds: Sequence[int],
) -> Scores:
    """Score every clip at every noise level, averaged over one noise per seed.

    The model is put into evaluation mode meanwhile. No random number of the training is used.
    """
    was_training = model.training
    model.eval()
    scores = torch.zeros(3, len(clips), len(sigmas), dtype=torch.float64)
    for n, clip in enumerate(clips):
        other = clips[(n + 1) % len(clips)]
        for s, sigma in enumerate(sigmas):
            for seed in seeds:
                right, zero = predict(model, clip, clip.hints, sigma, seed, options)
                wrong, _ = predict(model, clip, other.hints, sigma, seed, options)
                level = torch.full((1,), sigma, device=clip.latent.device)
                for row, x0 in enumerate((zero, right, wrong)):
                    loss = edm_loss(clip.latent, x0, level, scaling=options.scaling)
                    scores[row, n, s] += loss.edm.double().cpu() / len(seeds)
    model.train(was_training)
    return Scores(*scores)


def verdict(scores: Scores) -> dict[str, bool]:
    """What a model that has learned to use its control must show, and whether it does."""
    zero, right, wrong = scores.zero.mean(0), scores.right.mean(0), scores.wrong.mean(0)
    return {
        "below the zero network at every noise level": bool((right < zero).all()),
        "at most 0.85 of the zero network in the mean": bool(right.mean() <= 0.85 * zero.mean()),
        "the right control beats another clip's on every clip": bool(
            (scores.right.mean(1) < scores.wrong.mean(1)).all()
        ),
        "the right control is at least 10 % better in the mean": bool(
            right.mean() <= 0.9 * wrong.mean()
        ),
    }
