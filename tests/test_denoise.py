"""Denoising with given frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transfer1.diffusion.condition import Condition, DataType
from transfer1.diffusion.denoise import Denoised, denoise
from transfer1.diffusion.draws import Draws
from transfer1.diffusion.edm import EDMScaling
from transfer1.diffusion.frame_condition import (
    FrameConditioning,
    augment_frames,
    condition_on_frames,
    crop_latent,
    frame_indicator,
)

SHAPE = (2, 3, 4, 2, 5)
SIGMA = torch.tensor([2.0, 0.5])
SCALING = EDMScaling()


def condition(flag: bool = True, data_type: DataType = DataType.VIDEO) -> Condition:
    return Condition(torch.zeros(2, 1, 1), video_cond_bool=flag, data_type=data_type)


def latents() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


class Recorder:
    """A network that keeps what it was called with."""

    def __call__(self, x: Tensor, noise_level: Tensor, condition: Condition) -> Tensor:
        self.x, self.noise_level, self.condition = x, noise_level, condition
        return torch.ones_like(x)


def run(flag: bool = True, given: int = 1, **options: Any) -> tuple[Recorder, Denoised, Condition]:
    clean, x_t = latents()
    frames = FrameConditioning(condition_location="first_n", **options)
    prepared = condition_on_frames(condition(flag), clean, frames, num_condition_t=given)
    network = Recorder()
    denoised = denoise(network, SCALING, x_t, SIGMA, prepared, frames, Draws(seed=0))
    return network, denoised, prepared


def test_without_frames_it_is_the_preconditioned_network() -> None:
    _, x_t = latents()
    network = Recorder()
    denoised = denoise(network, SCALING, x_t, SIGMA, condition())
    c_skip, c_out, c_in, c_noise = (c.reshape(-1, 1, 1, 1, 1) for c in SCALING(SIGMA))
    torch.testing.assert_close(network.x, c_in * x_t)
    torch.testing.assert_close(network.noise_level, c_noise.flatten())
    torch.testing.assert_close(denoised.x0, c_skip * x_t + c_out)
    torch.testing.assert_close(x_t - SIGMA.reshape(-1, 1, 1, 1, 1) * denoised.eps, denoised.x0)
    assert denoised.log_variance is None


def test_given_frames_are_shown_and_cost_nothing() -> None:
    clean, x_t = latents()
    network, denoised, prepared = run(given=2, augment_sigma_sample_multiplier=1e-6)
    assert torch.equal(denoised.x0[:, :, :2], clean[:, :, :2])
    assert torch.equal(denoised.x0[:, :, 2:], denoised.x0_network[:, :, 2:])
    c_in = SCALING(SIGMA).c_in.reshape(-1, 1, 1, 1, 1)
    # Hardly any noise: the network sees the clean frames at the scale of noiseless data.
    noiseless = SCALING(torch.tensor([1e-6])).c_in
    torch.testing.assert_close(network.x[:, :, :2], noiseless * clean[:, :, :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(network.x[:, :, 2:], c_in * x_t[:, :, 2:])
    assert prepared.frame_mask is not None
    assert prepared.frame_mask[0, 0, :, 0, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("kind", "sees_noise"),
    [("zero_condition_region_condition_mask", False), ("noise_x_condition_region", True)],
)
def test_withheld_frames(kind: str, sees_noise: bool) -> None:
    _, x_t = latents()
    network, _, prepared = run(flag=False, cfg_unconditional_type=kind)
    c_in = SCALING(SIGMA).c_in.reshape(-1, 1, 1, 1, 1)
    expected = c_in * x_t[:, :, :1] if sees_noise else torch.zeros_like(x_t[:, :, :1])
    torch.testing.assert_close(network.x[:, :, :1], expected)
    assert prepared.frame_mask is not None and prepared.frame_mask.abs().max() == 0


def test_loss_can_see_the_given_frames() -> None:
    clean, _ = latents()
    _, denoised, _ = run(compute_loss_for_condition_region=True)
    assert torch.equal(denoised.x0, denoised.x0_network)
    assert torch.equal(denoised.x0_replaced[:, :, :1], clean[:, :, :1])


def test_images_have_no_given_frames() -> None:
    _, x_t = latents()
    plain, framed = Recorder(), Recorder()
    image = condition(data_type=DataType.IMAGE)
    expected = denoise(plain, SCALING, x_t, SIGMA, image)
    actual = denoise(framed, SCALING, x_t, SIGMA, image, FrameConditioning())
    assert torch.equal(framed.x, plain.x)
    assert torch.equal(actual.x0, expected.x0)


def test_only_the_network_input_has_the_model_precision() -> None:
    _, x_t = latents()
    network = Recorder()
    denoised = denoise(
        network,
        SCALING,
        x_t.bfloat16(),
        SIGMA.bfloat16(),
        condition(),
        log_variance=lambda noise_level: noise_level[:, None],
        dtype=torch.bfloat16,
    )
    assert network.x.dtype == torch.bfloat16
    assert network.noise_level.dtype == torch.float32
    assert denoised.x0.dtype == denoised.eps.dtype == torch.float32
    assert denoised.log_variance is not None and denoised.log_variance.dtype == torch.float32


def test_fixed_augmentation_ends_where_the_sample_is_as_clean() -> None:
    clean, _ = latents()
    frames = FrameConditioning(condition_location="first_n", condition_on_augment_sigma=True)
    frames = frames.at_inference(sigma=1.0)
    prepared = condition_on_frames(condition(), clean, frames, num_condition_t=2)
    assert prepared.frame_indicator is not None
    before = prepared.frame_indicator.clone()
    augmented = augment_frames(prepared, SIGMA, frames, SCALING)
    assert augmented.indicator[:, 0, :, 0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(prepared.frame_indicator, before)
    assert augmented.noise_level is not None
    assert augmented.noise_level.tolist() == [0.0, 0.0]  # c_noise(1) is ln(1) / 4
    other = augment_frames(prepared, SIGMA, frames.at_inference(sigma=0.3), SCALING)
    assert other.noise_level is not None
    torch.testing.assert_close(other.noise_level, torch.tensor([0.3, 0.3]).log() / 4)


def test_network_is_told_the_augmentation_only_on_request() -> None:
    told, _, prepared = run(condition_on_augment_sigma=True)
    assert told.condition.augment_sigma is not None
    assert told.condition.augment_sigma.shape == (2,)
    assert prepared.augment_sigma is None, "the condition was changed"
    untold, _, _ = run()
    assert untold.condition.augment_sigma is None


def test_given_frames_are_drawn_once_per_batch() -> None:
    frames = FrameConditioning(
        first_random_n_num_condition_t_min=1, first_random_n_num_condition_t_max=3
    )
    counts = {int(frame_indicator(4, frames, Draws(0, i)).sum()) for i in range(40)}
    assert counts == {1, 2, 3}
    frames = FrameConditioning(condition_location="random", random_conditon_rate=0.25)
    given = torch.cat([frame_indicator(8, frames, Draws(0, i)).flatten() for i in range(100)])
    assert given.mean() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("count", [None, -1])
def test_first_n_needs_a_number(count: int | None) -> None:
    frames = FrameConditioning(condition_location="first_n")
    with pytest.raises(ValueError, match=f"num_condition_t.*got {count}"):
        frame_indicator(4, frames, num_condition_t=count)


def test_crop_takes_a_window() -> None:
    latent = torch.arange(6.0).reshape(1, 1, 6, 1, 1)
    starts = {int(crop_latent(latent, 4, Draws(0, i)).flatten()[0]) for i in range(30)}
    assert starts == {0, 1, 2}
    assert crop_latent(latent, 4, Draws(0)).diff(dim=2).unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="window of 7 latent frames from a clip of 6"):
        crop_latent(latent, 7, Draws(0))
