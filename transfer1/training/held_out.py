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


def encode(model: Transfer, batch: Mapping[str, Any], options: StepOptions) -> Clip:
    """Encode a batch of one clip, already on the device of the model.

    Raises:
        ValueError: a batch of several clips.
    """
    assert options.hint is not None, "held-out scores compare controls"
    pixels, data_type = read_pixels(batch, options)
    if len(pixels) != 1:
        raise ValueError(
            f"held-out clips are scored one by one, but a batch holds {len(pixels)}; "
            "set dataloader_val.batch_size=1"
        )
    with torch.no_grad():
        latent = model.tokenizer.encode(pixels).float() * options.sigma_data
        condition, _ = model.conditioner.pair(batch, data_type=data_type)
        if model.conditioner.frames is not None:
            frames = replace(model.conditioner.frames, condition_location="first_n")
            condition = condition_on_frames(condition, latent, frames, num_condition_t=0)
        hints, weights = read_hints(batch, pixels, model.tokenizer, options, draws=None)
    control = batch[options.hint.hint_key]
    return Clip(batch["clip_name"][0], pixels, control, latent, condition, hints, weights)


def prepare(
    model: Transfer, batches: Iterable[Mapping[str, Any]], options: StepOptions
) -> list[Clip]:
    """Encode the clips that are scored against each other.

    Raises:
        ValueError: fewer than two clips (there is no other control), or clips of different sizes.
    """
    clips = [encode(model, batch, options) for batch in batches]
    if len(clips) < 2 or len({clip.latent.shape for clip in clips}) > 1:
        raise ValueError(
            "held-out scores need two or more clips of one size, but dataloader_val gives "
            + (", ".join(f"{clip.name} {tuple(clip.latent.shape)}" for clip in clips) or "none")
        )
    return clips


def predict(
    model: Transfer,
    clip: Clip,
    hints: Sequence[list[Tensor] | None],
    sigma: float,
    seed: int,
    options: StepOptions,
) -> list[Tensor]:
    """Denoise a clip once per entry of `hints`; None stands for a network that outputs zero.

    All predictions start from one noise, which depends on the name of the clip, the level and the
    seed; no random number of the training is used. The model is in evaluation mode meanwhile.

    Returns:
        predictions of x0, float32 [1, C, T, H, W].
    """
    noise = Draws(seed).normal(f"held-out noise, {clip.name}, sigma {sigma}", clip.latent.shape)
    level = clip.latent.new_full((1,), sigma)
    noisy = add_noise(clip.latent, level, noise.to(clip.latent.device))

    def x0(given_hints: list[Tensor] | None) -> Tensor:
        def network(x: Tensor, noise_level: Tensor, condition: Condition) -> Tensor:
            if given_hints is None:
                return torch.zeros_like(x)
            return model(x, noise_level, condition, given_hints, clip.weights)

        return denoise(
            network, options.scaling, noisy, level, clip.condition, dtype=options.dtype
        ).x0

    was_training = model.training
    model.eval()
    with torch.no_grad():
        predictions = [x0(given) for given in hints]
    model.train(was_training)
    return predictions


def measure(
    model: Transfer,
    clips: Sequence[Clip],
    options: StepOptions,
    sigmas: Sequence[float],
    seeds: Sequence[int],
) -> Scores:
    """Score every clip at every noise level, averaged over one noise per seed."""
    scores = torch.zeros(3, len(clips), len(sigmas), dtype=torch.float64)
    for n, clip in enumerate(clips):
        other = clips[(n + 1) % len(clips)]
        hints = [None, clip.hints, other.hints]
        for s, sigma in enumerate(sigmas):
            level = clip.latent.new_full((1,), sigma)
            for seed in seeds:
                for row, x0 in enumerate(predict(model, clip, hints, sigma, seed, options)):
                    loss = edm_loss(clip.latent, x0, level, scaling=options.scaling)
                    scores[row, n, s] += loss.edm.double().cpu() / len(seeds)
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
