"""Every option of `model` that changes a training step, set by its key and seen to act.

The formulas behind the options are checked against recorded numbers elsewhere; here each is
switched on by its key, and the step must change in the way that the key promises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HEIGHT, OVERRIDES, WIDTH, changed, composed, tiny_batch
from torch import Tensor

from transfer1.config import instantiate
from transfer1.diffusion.condition import DataType
from transfer1.diffusion.draws import Draws
from transfer1.model.transfer import Transfer
from transfer1.training.step import Loss, StepOptions, compute_loss

# Masks by name can only be added when a configuration is composed.
MASKS = ("+model.loss_masking.sky=1.0", "+model.loss_masking.human_face_mask=1.0")


@dataclass(frozen=True)
class Step:
    """A model built from a configuration and the loss of one batch."""

    model: Any
    batch: dict[str, Any]
    loss: Loss


def randomize(model: Transfer) -> None:
    """Weights that all matter; those of a fresh model make every block an identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def step(tmp_path: Path) -> Callable[..., Step]:
    def run(*overrides: str, weights: dict[str, Tensor] | None = None, **batch: Any) -> Step:
        """One step with these overrides, `batch` added to the usual one (None takes away)."""
        config = changed(composed((*OVERRIDES, *MASKS)), [f"job.path_local={tmp_path}", *overrides])
        torch.manual_seed(0)
        model = instantiate(config.model_obj, config=config)
        randomize(model)
        if weights is not None:
            model.load_state_dict(weights)
        entries = {**tiny_batch(), **batch}
        entries = {name: value for name, value in entries.items() if value is not None}
        options = StepOptions.from_config(config.model, torch.float32)
        loss = compute_loss(model, model.tokenizer, model.conditioner, entries, Draws(0), options)
        return Step(model, entries, loss)

    return run


def both(name: str, value: object) -> list[str]:
    """One argument of base and control branch."""
    return [f"model.{net}.{name}={value}" for net in ("net", "net_ctrl")]


def test_sum_is_mean_times_the_elements_of_a_sample(step: Callable[..., Step]) -> None:
    mean = step("model.loss_reduce=mean").loss
    total = step("model.loss_reduce=sum").loss
    assert torch.allclose(total.total, mean.total * mean.latent[0].numel())
    assert torch.equal(total.terms["edm_loss"], mean.terms["edm_loss"])


def test_loss_scale_is_a_factor_on_the_total_alone(step: Callable[..., Step]) -> None:
    plain, scaled = step().loss, step("model.loss_scale=4.0").loss
    assert torch.allclose(scaled.total, 4 * plain.total)
    assert torch.equal(scaled.terms["mse_loss"], plain.terms["mse_loss"])


def test_log_variance_weighs_the_loss(step: Callable[..., Step]) -> None:
    plain = step("model.loss_add_logvar=false")
    assert torch.allclose(plain.loss.total.detach(), plain.loss.terms["edm_loss"])
    weighed = step("model.loss_add_logvar=true").loss
    log_variance = weighed.denoised.log_variance
    assert log_variance is not None and log_variance.abs().min() > 0
    assert not torch.allclose(weighed.total, plain.loss.total)


def test_masked_regions_cost_nothing(step: Callable[..., Step]) -> None:
    """A mask of weight 0 over everything leaves the log-variance alone; weight 3 counts thrice."""
    mask = torch.ones(2, 1, HEIGHT, WIDTH)
    on = ("model.loss_mask_enabled=true", "model.loss_add_logvar=false")
    plain = step("model.loss_add_logvar=false").loss.total
    assert step(*on, "model.loss_masking.sky=0.0", sky=mask).loss.total == 0
    thrice = step(*on, "model.loss_masking.sky=3.0", sky=mask).loss.total
    assert torch.allclose(thrice, 3 * plain)
    off = step("model.loss_add_logvar=false", "model.loss_masking.sky=0.0", sky=mask)
    assert torch.equal(off.loss.total, plain)


def test_faces_can_be_skipped_per_sample(step: Callable[..., Step]) -> None:
    mask = torch.ones(2, 1, HEIGHT, WIDTH)
    on = ("model.loss_mask_enabled=true", "model.loss_masking.human_face_mask=2.0")
    skipped = step(
        *on,
        "model.loss_add_logvar=false",
        human_face_mask=mask,
        skip_face=torch.tensor([1.0, 1.0]),
    )
    assert skipped.loss.total == 0


def test_weights_of_samples(step: Callable[..., Step]) -> None:
    """Aesthetic weight and moving camera multiply; either alone is switched on by its key."""
    plain = step("model.loss_add_logvar=false").loss.total
    twice = {"aesthetic_weight": torch.full((2,), 2.0)}
    moving = {"camera_attributes": torch.tensor([[0.0, 1.0], [7.0, 2.0]])}
    aesthetic = ("model.loss_add_logvar=false", "model.aesthetic_finetuning.enabled=true")
    assert torch.allclose(step(*aesthetic, **twice).loss.total, 2 * plain)
    camera = ("model.camera_sample_weight.enabled=true", "model.camera_sample_weight.weight=3.0")
    assert torch.allclose(step(*aesthetic, *camera, **twice, **moving).loss.total, 6 * plain)
    still = {"camera_attributes": torch.tensor([[5.0, 0.0], [7.0, 0.0]])}
    quiet = step("model.loss_add_logvar=false", *camera, **still).loss.total
    assert torch.allclose(quiet, plain)
    assert torch.equal(step("model.loss_add_logvar=false", **twice, **moving).loss.total, plain)


def test_noise_of_clips_grows_with_their_latent_frames(step: Callable[..., Step]) -> None:
    plain = step("model.adjust_video_noise=false").loss
    adjusted = step("model.adjust_video_noise=true").loss
    assert torch.allclose(adjusted.sigma, plain.sigma * 3**0.5)


def test_images_train_the_same_model(step: Callable[..., Step]) -> None:
    """Under the key of `input_image_key`: one latent frame, no given frames, no adjusted noise."""
    batch = tiny_batch()
    image = {
        "stills": batch["video"][:, :, 0],
        "control_input_edge": batch["control_input_edge"][:, :, 0],
        "video": None,
    }
    result = step("model.input_image_key=stills", "model.adjust_video_noise=true", **image)
    assert result.loss.condition.data_type is DataType.IMAGE
    assert result.loss.latent.shape[2] == 1 and result.loss.condition.frame_mask is None
    result.loss.total.backward()
    assert result.model.net.zero_blocks["block0"].weight.grad.abs().max() > 0
    plain = step("model.input_image_key=stills", "model.adjust_video_noise=false", **image)
    assert torch.equal(plain.loss.sigma, result.loss.sigma)


def test_the_key_of_clips_is_free(step: Callable[..., Step]) -> None:
    clip = tiny_batch()["video"]
    renamed = step("model.input_data_key=clip", clip=clip, video=None)
    assert torch.equal(renamed.loss.total, step().loss.total)


@pytest.mark.parametrize("column", [None, 0, 1, 2, 3])
def test_additional_timestamps_reach_the_output(
    step: Callable[..., Step], column: int | None
) -> None:
    """fps and each column of image_size, also with low-rank modulation and for gradients."""
    name = {None: "fps", 0: "h", 1: "w", 2: "org_h", 3: "org_w"}[column]
    overrides = both(f"additional_timestamp_channels.{name}", 16)
    overrides += both("extra_per_block_abs_pos_emb", "false")
    usual = step(*overrides)
    change: dict[str, Tensor] = {"fps": torch.full((2,), 12.0)}
    if column is not None:
        change = {"image_size": usual.batch["image_size"].clone()}
        change["image_size"][:, column] *= 2
    changed = step(*overrides, **change)
    assert not torch.allclose(usual.loss.denoised.x0, changed.loss.denoised.x0)
    usual.loss.total.backward()
    embedder = usual.model.net.additional_timestamp_embedder[name]
    assert all(parameter.grad.abs().max() > 0 for parameter in embedder.parameters())


def test_the_noise_of_given_frames_is_told(step: Callable[..., Step]) -> None:
    frames = "model.conditioner.video_cond_bool"
    overrides = [
        *both("add_augment_sigma_embedding", "true"),
        f"{frames}.condition_on_augment_sigma=true",
        f"{frames}.first_random_n_num_condition_t_min=1",
    ]
    quiet = step(*overrides, f"{frames}.augment_sigma_sample_p_std=0.0")
    levels = quiet.loss.condition
    assert quiet.model.base.augment_sigma_embedder is not None
    assert levels.frame_indicator is not None and levels.frame_indicator.sum() >= 1
    without = step(
        f"{frames}.first_random_n_num_condition_t_min=1",
        f"{frames}.augment_sigma_sample_p_std=0.0",
    )
    told = quiet.model.state_dict().keys() - without.model.state_dict().keys()
    assert told and all("augment_sigma_embedder" in name for name in told)
    same = {k: v for k, v in quiet.model.state_dict().items() if k not in told}
    untold = step(
        f"{frames}.first_random_n_num_condition_t_min=1",
        f"{frames}.augment_sigma_sample_p_std=0.0",
        weights=same,
    )
    assert not torch.allclose(untold.loss.denoised.x0, quiet.loss.denoised.x0)


@pytest.mark.parametrize("kind", ["learnable", "sincos"])
def test_extra_positions(step: Callable[..., Step], kind: str) -> None:
    """Added in every block: learned ones have parameters that learn, fixed ones none."""
    overrides = both("extra_per_block_abs_pos_emb_type", kind)
    result = step(*overrides)
    names = [name for name, _ in result.model.net.named_parameters() if "extra_pos" in name]
    assert bool(names) == (kind == "learnable")
    if names:
        result.loss.total.backward()
        assert result.model.net.extra_pos_embedder.pos_emb_h.grad.abs().max() > 0
        return
    without = step(*both("extra_per_block_abs_pos_emb", "false"), weights=result.model.state_dict())
    assert not torch.allclose(without.loss.denoised.x0, result.loss.denoised.x0)


def test_legacy_patches_are_the_same_numbers(step: Callable[..., Step]) -> None:
    """A convolution whose weight is the linear one in another shape."""
    linear = step(*both("legacy_patch_emb", "false"))
    state = linear.model.state_dict()
    legacy = step(*both("legacy_patch_emb", "true"))
    shapes = {name: tensor.shape for name, tensor in legacy.model.state_dict().items()}
    renamed = {}
    for name, tensor in state.items():
        is_patch = name.endswith(("x_embedder.proj.1.weight", "x_embedder2.proj.1.weight"))
        key = name.replace("proj.1.weight", "proj.weight") if is_patch else name
        renamed[key] = tensor.reshape(shapes[key])
    same = step(*both("legacy_patch_emb", "true"), weights=renamed)
    torch.testing.assert_close(same.loss.total, linear.loss.total, rtol=1e-5, atol=1e-6)


def test_how_given_frames_are_shown(step: Callable[..., Step]) -> None:
    frames = "model.conditioner.video_cond_bool"
    given = f"{frames}.first_random_n_num_condition_t_min=2"
    plain = step(given).loss
    mask = plain.condition.frame_mask
    assert mask is not None and mask[:, :, :2].all() and not mask[:, :, 2:].any()
    assert torch.equal(plain.denoised.x0[:, :, :2], plain.latent[:, :, :2])
    whole = step(given, f"{frames}.compute_loss_for_condition_region=true").loss
    assert not torch.equal(whole.denoised.x0[:, :, :2], whole.latent[:, :, :2])
    normalized = step(given, f"{frames}.normalize_condition_latent=true").loss
    assert not torch.equal(normalized.denoised.x0_network, plain.denoised.x0_network)
    every = step(f"{frames}.condition_location=random", f"{frames}.random_conditon_rate=1.0").loss
    assert every.condition.frame_mask is not None and every.condition.frame_mask.all()
    withheld = step(given, f"{frames}.dropout_rate=1.0").loss
    assert withheld.condition.frame_mask is not None
    assert not withheld.condition.frame_mask.any()


def test_longer_clips_are_cropped(step: Callable[..., Step]) -> None:
    """Clip and hint to the same window of `latent_shape` frames, only on request."""
    crop = "model.conditioner.video_cond_bool.sample_tokens_start_from_p_or_i=true"
    whole = step().loss
    part = step("model.latent_shape=[16,2,2,2]", crop).loss
    assert part.latent.shape[2] == part.hints[0].shape[2] == 2
    starts = [
        start
        for start in (0, 1)
        if torch.equal(part.latent, whole.latent[:, :, start : start + 2])
        and torch.equal(part.hints[0], whole.hints[0][:, :, start : start + 2])
    ]
    assert len(starts) == 1
    with pytest.raises(ValueError, match="a window of 4 latent frames from a clip of 3"):
        step("model.latent_shape=[16,4,2,2]", crop)
