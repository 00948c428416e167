"""The training loss and its weights."""

from __future__ import annotations

import pytest
import torch

from transfer1.diffusion.edm import EDMScaling
from transfer1.diffusion.loss import (
    edm_loss,
    loss_mask,
    sample_weight,
    uncertainty_weighted_loss,
)

SHAPE = (3, 2, 2, 4, 5)


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, prediction = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return x0, prediction, torch.tensor([0.1, 1.0, 7.0])


def test_perfect_prediction_costs_nothing(latents) -> None:
    x0, _, sigma = latents
    assert edm_loss(x0, x0, sigma, scaling=EDMScaling()).total == 0


def test_zero_network_output_scores_about_one() -> None:
    """The loss weight undoes c_out: predicting c_skip x_t leaves errors of unit variance."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(64, 4, 4, 8, 8, generator=generator) for _ in range(2))
    scaling, sigma = EDMScaling(sigma_data=1.0), torch.logspace(-2, 2, 64)
    x_t = x0 + sigma.reshape(-1, 1, 1, 1, 1) * noise
    prediction = scaling(sigma).c_skip.reshape(-1, 1, 1, 1, 1) * x_t
    assert edm_loss(x0, prediction, sigma, scaling=scaling).edm == pytest.approx(1.0, abs=0.01)


def test_sum_is_mean_times_elements_of_a_sample(latents) -> None:
    mean = edm_loss(*latents, scaling=EDMScaling(), log_variance=torch.ones(3, 1), scale=2.0)
    total = edm_loss(*latents, scaling=EDMScaling(), log_variance=torch.ones(3, 1), reduce="sum")
    torch.testing.assert_close(total.total, mean.total / 2.0 * (2 * 2 * 4 * 5))
    assert torch.equal(total.mse, mean.mse)


def test_unknown_reduction_names_the_key(latents) -> None:
    with pytest.raises(ValueError, match=r"model\.loss_reduce=median.*mean or sum"):
        edm_loss(*latents, scaling=EDMScaling(), reduce="median")


def test_uncertainty_is_best_at_the_log_of_the_loss() -> None:
    log_variance = torch.zeros(1, requires_grad=True)
    loss = torch.tensor([0.3])
    values = uncertainty_weighted_loss(loss, loss.log() + torch.linspace(-1, 1, 21))
    assert values.argmin() == 10
    uncertainty_weighted_loss(loss, log_variance).backward()
    torch.testing.assert_close(log_variance.grad, torch.tensor([1 - 0.3]))


def test_mask_and_sample_weight_scale_the_error(latents) -> None:
    x0, prediction, sigma = latents
    plain = edm_loss(x0, prediction, sigma, scaling=EDMScaling())
    mask = torch.ones(3, 1, 1, 4, 5)
    mask[1] = 0.0
    weight = torch.tensor([2.0, 1.0, 1.0])
    loss = edm_loss(x0, prediction, sigma, scaling=EDMScaling(), mask=mask, sample_weight=weight)
    torch.testing.assert_close(loss.edm_elements[0], 2 * plain.edm_elements[0])
    assert loss.edm_elements[1].abs().max() == 0
    torch.testing.assert_close(loss.edm_elements[2], plain.edm_elements[2])


def test_loss_is_float32_for_bfloat16_latents(latents) -> None:
    x0, prediction, sigma = (tensor.bfloat16() for tensor in latents)
    loss = edm_loss(x0, prediction, sigma, scaling=EDMScaling())
    assert loss.total.dtype == torch.float32
    expected = edm_loss(x0.float(), prediction.float(), sigma.float(), scaling=EDMScaling())
    assert torch.equal(loss.total, expected.total)


def test_later_masks_win_and_zero_weights_win_always() -> None:
    face, hand, padding = torch.zeros(3, 1, 1, 1, 4).unbind()
    face[..., :2], hand[..., 1:3], padding[..., 2:] = 1, 1, 1
    batch = {"human_face_mask": face, "padding": padding, "hand_mask": hand}
    weights = {"human_face_mask": 2.0, "padding": 0.0, "hand_mask": 4.0, "absent": 3.0}
    assert loss_mask(batch, weights, (1, 4)).flatten().tolist() == [2, 4, 0, 0]
    batch["skip_face"] = torch.ones(1)
    assert loss_mask(batch, weights, (1, 4)).flatten().tolist() == [0, 0, 0, 0]


def test_mask_is_resized_to_the_latent() -> None:
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, :, 8:] = 1
    factor = loss_mask({"hand_mask": mask}, {"hand_mask": 3.0}, (2, 4))
    assert factor.shape == (2, 1, 1, 2, 4)
    torch.testing.assert_close(factor[0, 0, 0, 0, [0, 3]], torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "batch has none of them"),
        ({"a": torch.zeros(1, 1, 2, 2), "b": torch.zeros(1, 1, 3, 2)}, r"\(1, 1, 3, 2\)"),
    ],
)
def test_unusable_masks_are_named(batch, message) -> None:
    with pytest.raises(ValueError, match=message):
        loss_mask(batch, {"a": 1.0, "b": 2.0}, (2, 2))


def test_sample_weights() -> None:
    batch = {
        "aesthetic_weight": torch.tensor([1.0, 2.0]),
        "camera_attributes": torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.5, 0.0]]),
    }
    assert sample_weight(batch) is None
    assert sample_weight(batch, aesthetic=True).tolist() == [1.0, 2.0]
    assert sample_weight(batch, camera_weight=5.0).tolist() == [1.0, 5.0]
    assert sample_weight(batch, aesthetic=True, camera_weight=5.0).tolist() == [1.0, 10.0]
