"""Damage to control videos: what each kind does, and that its draws belong to the sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import moving_square
from tiny import composed, tiny_batch, tiny_config
from torch import Tensor

from transfer1.config import instantiate
from transfer1.config.messages import group_options
from transfer1.diffusion.corruption import Blur, Compression, Downscale, Noise, PixelCorruptor
from transfer1.diffusion.draws import Draws
from transfer1.training.step import StepOptions, compute_loss

ROOT_OVERRIDES = ("net=tiny_fa", "net_ctrl=tiny_fa")


def pixels(batch: int = 3, conditions: int = 1) -> Tensor:
    """Clips [B, 3K, 4, 40, 56] in [-1, 1]; no side but the width is a multiple of 16."""
    frames = moving_square(4 * batch * conditions, 40, 56)
    clips = torch.from_numpy(frames).reshape(batch, conditions, 4, 40, 56, 3)
    return clips.permute(0, 1, 5, 2, 3, 4).flatten(1, 2).float() / 127.5 - 1


ALWAYS = (
    Blur(1.0, 3.0, probability=1),
    Compression(10, 60, probability=1),
    Noise(0.05, 0.2, probability=1),
    Downscale(1.5, 4.0, probability=1),
)


@pytest.mark.parametrize("corruptor", ALWAYS, ids=lambda c: type(c).__name__)
def test_each_sample_has_draws_of_its_own(corruptor: PixelCorruptor) -> None:
    """A clip is damaged in the same way alone, in a batch, and with other conditions beside it."""
    clips = pixels(conditions=2)
    whole = corruptor(clips, Draws(5, samples=[4, 7, 9]))
    assert whole.shape == clips.shape and whole.abs().max() <= 1
    alone = corruptor(clips[1:2], Draws(5, samples=[7]))
    assert torch.allclose(whole[1], alone[0], atol=1e-6)
    if not isinstance(corruptor, Noise):  # its noise has as many values as the clip
        first = corruptor(clips[1:2, :3], Draws(5, samples=[7]))
        assert torch.allclose(whole[1, :3], first[0], atol=1e-6)
    elsewhere = corruptor(clips[1:2], Draws(5, samples=[8]))
    assert (whole[1] - elsewhere[0]).abs().max() > 1e-3
    later = corruptor(clips[1:2], Draws(5, iteration=1, samples=[7]))
    assert (whole[1] - later[0]).abs().max() > 1e-3


@pytest.mark.parametrize("corruptor", ALWAYS, ids=lambda c: type(c).__name__)
def test_more_of_it_is_worse(corruptor: PixelCorruptor) -> None:
    clips = pixels(batch=2)
    amounts = torch.linspace(corruptor.low, corruptor.high, 2)
    damaged = corruptor.damage(clips[:1].expand(2, -1, -1, -1, -1), amounts, Draws(0))
    errors = (damaged - clips[:1]).square().mean((1, 2, 3, 4))
    worse, better = (0, 1) if isinstance(corruptor, Compression) else (1, 0)
    assert errors[worse] > 1.2 * errors[better] > 0


def test_only_the_chosen_share_is_damaged() -> None:
    clips = pixels(batch=1).expand(64, -1, -1, -1, -1)
    damaged = Noise(0.1, 0.1, probability=0.25)(clips, Draws(0))
    share = (damaged != clips).flatten(1).any(1).float().mean()
    assert 0.1 < share < 0.4
    assert torch.equal(Noise(0.1, 0.1, probability=0)(clips, Draws(0)), clips)


def test_blur_is_that_of_opencv() -> None:
    frame = moving_square(1, 40, 56)[0]
    clip = torch.from_numpy(frame).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    ours = Blur(2.0, 2.0).damage(clip, torch.tensor([2.0]), Draws(0))
    theirs = cv2.GaussianBlur(
        frame.astype(np.float32) / 127.5 - 1, (13, 13), 2.0, borderType=cv2.BORDER_REPLICATE
    )
    assert np.abs(ours[0, :, 0].permute(1, 2, 0).numpy() - theirs).max() < 1e-5


@pytest.mark.parametrize("quality", [10, 40, 80])
def test_compression_is_that_of_jpeg(quality: int) -> None:
    """Nearly the picture of a real encoder, which rounds to whole numbers on the way."""
    frame = moving_square(1, 40, 56)[0]
    clip = torch.from_numpy(frame).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    ours = Compression(10, 90).damage(clip, torch.tensor([float(quality)]), Draws(0)).clamp(-1, 1)
    full_chroma = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, *full_chroma]
    encoded = cv2.imencode(".jpg", frame[..., ::-1], options)[1]
    theirs = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)
    levels = (ours[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    between = np.square(levels - theirs).mean()
    lost = np.square(frame - theirs).mean()
    assert between < 0.05 * lost + 0.5, (between, lost)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blur(0.0, 1.0), "low=0.0, high=1.0: need 0.1 <= low <= high"),
        (lambda: Compression(50, 20), "low=50, high=20: need 1 <= low <= high <= 100"),
        (lambda: Compression(50, 101), "<= 100"),
        (lambda: Downscale(0.5, 2), "need 1.0 <= low"),
        (lambda: Noise(0.1, 0.2, probability=1.5), "probability=1.5"),
    ],
)
def test_wrong_options(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_group_has_them_all() -> None:
    compose_once = composed(ROOT_OVERRIDES)
    assert compose_once.model.pixel_corruptor is None
    assert group_options("pixel_corruptor") == ["blur", "downscale", "jpeg", "noise", "none"]
    for name in ("blur", "downscale", "jpeg", "noise"):
        node = composed((*ROOT_OVERRIDES, f"pixel_corruptor={name}")).model.pixel_corruptor
        assert isinstance(instantiate(node), PixelCorruptor)
    assert composed((*ROOT_OVERRIDES, "pixel_corruptor=none")).model.pixel_corruptor is None


def test_hints_are_damaged_in_training_only(tmp_path: Path) -> None:
    """With one weight or several, and only the hint; the clip itself stays as it is."""
    noise = "{_target_: transfer1.diffusion.corruption.Noise, low: 0.5, high: 0.5, probability: 1}"
    plain = tiny_config(tmp_path, "model.hint_mask=[true,true]")
    torch.manual_seed(0)
    model = instantiate(plain.model_obj, config=plain)
    noisy = tiny_config(tmp_path, "model.hint_mask=[true,true]", f"model.pixel_corruptor={noise}")
    for weights in (None, torch.ones(2)):
        batch: dict[str, Any] = tiny_batch(conditions=2)
        if weights is not None:
            batch["control_weight"] = weights
        losses = {}
        for training in (True, False):
            model.train(training)
            for config in (plain, noisy):
                options = StepOptions.from_config(config.model, torch.float32)
                losses[training, config is noisy] = compute_loss(
                    model, model.tokenizer, model.conditioner, batch, Draws(0), options
                )
        assert torch.equal(losses[True, True].latent, losses[True, False].latent)
        for with_noise, without in zip(
            losses[True, True].hints, losses[True, False].hints, strict=True
        ):
            assert not torch.allclose(with_noise, without, atol=0.05)
        for with_noise, without in zip(
            losses[False, True].hints, losses[False, False].hints, strict=True
        ):
            assert torch.equal(with_noise, without)
