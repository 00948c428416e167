"""One training step: what it reads, draws and refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import FRAMES, HEIGHT, WIDTH, tiny_batch, tiny_config

from transfer1.config import instantiate
from transfer1.diffusion.condition import DataType
from transfer1.diffusion.draws import Draws
from transfer1.model.transfer import Transfer
from transfer1.training.step import (
    Loss,
    StepOptions,
    compute_loss,
    draw_hint_mask,
    encode_hint,
    normalize_pixels,
)

KEY = "control_input_edge"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transfer, StepOptions]:
    config = tiny_config(tmp_path_factory.mktemp("job"))
    torch.manual_seed(0)
    model = instantiate(config.model_obj, config=config)
    return model, StepOptions.from_config(config.model, torch.float32)


def step(
    built: tuple[Any, StepOptions], batch: dict[str, Any], draws: Draws, **change: Any
) -> Loss:
    model, options = built
    options = dataclasses.replace(options, **change)
    return compute_loss(model, model.tokenizer, model.conditioner, batch, draws, options)


def hint_options(options: StepOptions, **change: Any) -> StepOptions:
    return dataclasses.replace(options, hint=dataclasses.replace(options.hint, **change))


def test_a_step_leaves_the_batch_alone(built: Any) -> None:
    batch = tiny_batch()
    before = {name: value.clone() for name, value in batch.items()}
    step(built, batch, Draws(0))
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_only_the_control_branch_gets_gradients(built: Any) -> None:
    model = built[0]
    model.zero_grad()
    step(built, tiny_batch(), Draws(0)).total.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(name.startswith("net.") for name in with_gradient)


def test_micro_steps_of_one_update_draw_different_noise(built: Any) -> None:
    batch = tiny_batch()
    first, second, again = (step(built, batch, Draws(0, 3, micro)) for micro in (0, 1, 0))
    assert not torch.equal(first.noisy, second.noisy)
    assert not torch.equal(first.sigma, second.sigma)
    assert torch.equal(first.noisy, again.noisy)
    assert not torch.equal(first.noisy[0] - first.latent[0], first.noisy[1] - first.latent[1])


def test_sigma_of_clips_grows_with_their_latent_frames(built: Any) -> None:
    batch = tiny_batch()
    plain = step(built, batch, Draws(0), adjust_video_noise=False)
    adjusted = step(built, batch, Draws(0), adjust_video_noise=True)
    assert torch.allclose(adjusted.sigma, plain.sigma * plain.latent.shape[2] ** 0.5)


def test_images_train_without_given_frames(built: Any) -> None:
    batch = tiny_batch()
    batch["images_1024"] = batch.pop("video")[:, :, 0]
    batch[KEY] = batch[KEY][:, :, 0]
    loss = step(built, batch, Draws(0), adjust_video_noise=True)
    assert loss.condition.data_type is DataType.IMAGE
    assert loss.latent.shape[2] == 1
    assert loss.condition.frame_mask is None
    assert torch.allclose(loss.sigma, step(built, batch, Draws(0), adjust_video_noise=False).sigma)
    assert loss.total.isfinite()


def test_evaluation_neither_drops_conditions_nor_the_branch(built: Any) -> None:
    model, options = built
    batch = tiny_batch(conditions=2)
    always = hint_options(options, hint_dropout_rate=1.0, hint_mask=(True, True))
    model.base_model.requires_grad_(True)
    try:
        trained = step(built, batch, Draws(0), hint=always.hint)
        model.eval()
        evaluated = step(built, batch, Draws(0), hint=always.hint)
        full = step(built, batch, Draws(1), hint=hint_options(options, hint_dropout_rate=0.0).hint)
    finally:
        model.train()
        model.base_model.requires_grad_(False)
    assert torch.equal(evaluated.hints[0], full.hints[0])
    assert not torch.equal(evaluated.hints[0], trained.hints[0])


def test_the_branch_is_dropped_per_sample_only_when_the_base_learns(built: Any) -> None:
    model, _ = built
    kept: list[Any] = []
    handle = model.register_forward_pre_hook(lambda module, args: kept.append(args[-1]))
    try:
        step(built, tiny_batch(), Draws(0))
        model.base_model.requires_grad_(True)
        step(built, tiny_batch(batch=16), Draws(0))
        with torch.no_grad():
            step(built, tiny_batch(), Draws(0))
    finally:
        handle.remove()
        model.base_model.requires_grad_(False)
    assert kept[0] is None
    assert sorted(set(kept[1].tolist())) == [0.0, 1.0]
    assert kept[2] is None


def test_gray_hints_are_the_mean_over_colours(built: Any) -> None:
    model, options = built
    hint = normalize_pixels(tiny_batch()[KEY], KEY)
    gray = hint.mean(dim=1, keepdim=True).expand_as(hint)
    actual = encode_hint(hint, model.tokenizer, hint_options(options, grayscale=True))
    assert torch.equal(actual, encode_hint(gray, model.tokenizer, options))
    assert not torch.equal(actual, encode_hint(hint, model.tokenizer, options))


def test_dropped_conditions_are_black_before_the_tokenizer(built: Any) -> None:
    model, options = built
    hint = normalize_pixels(tiny_batch(conditions=2)[KEY], KEY)
    first, second = hint.split(3, dim=1)
    masked = encode_hint(hint, model.tokenizer, options, mask=[True, False])
    black = encode_hint(torch.zeros_like(second), model.tokenizer, options)
    kept = encode_hint(first, model.tokenizer, options)
    assert torch.equal(masked, torch.cat([kept, black], dim=1))


def test_dropout_keeps_at_least_one_condition() -> None:
    masks = [draw_hint_mask(3, 0.7, Draws(0, iteration)) for iteration in range(60)]
    assert all(any(mask) for mask in masks)
    assert {sum(mask) for mask in masks} >= {1, 2}
    alone = [mask.index(True) for mask in masks if sum(mask) == 1]
    assert set(alone) == {0, 1, 2}


def test_several_weights_make_one_hint_per_condition(built: Any) -> None:
    model, options = built
    batch = tiny_batch(conditions=2) | {"control_weight": torch.tensor([0.25, 0.5])}
    always = hint_options(options, hint_dropout_rate=0.0)
    loss = step(built, batch, Draws(0), hint=always.hint)
    assert len(loss.hints) == 2
    hint = normalize_pixels(batch[KEY], KEY)
    for index, actual in enumerate(loss.hints):
        mask = [index == 0, index == 1]
        assert torch.equal(actual, encode_hint(hint, model.tokenizer, options, mask=mask))
    batch["control_weight"] = torch.ones(3)
    with pytest.raises(ValueError, match="3 weights for 2 conditions"):
        step(built, batch, Draws(0))


def test_weighted_conditions_are_dropped_too_but_never_all(built: Any) -> None:
    _, options = built
    batch = tiny_batch(conditions=2) | {"control_weight": [0.2, 0.3]}
    often = hint_options(options, hint_dropout_rate=0.7)
    seen = set()
    for iteration in range(12):
        draws = Draws(0, iteration)
        kept = draw_hint_mask(2, 0.7, draws)
        loss = step(built, batch, draws, hint=often.hint)
        assert len(loss.hints) == sum(kept) >= 1
        seen.add(tuple(kept))
    assert len(seen) == 3


LATENT = (3, 2, 2)  # of the tiny clips: frames, rows, columns
TOKENS = (3, 1, 1)


@pytest.mark.parametrize("size", [(FRAMES, HEIGHT, WIDTH), LATENT, TOKENS], ids=str)
def test_maps_that_are_constant_act_as_their_number(built: Any, size: tuple[int, ...]) -> None:
    """At the resolution of pixels, of the latent or of the tokens; also as one tensor."""
    model, options = built
    randomize_zero_blocks(model)
    batch = tiny_batch(conditions=2)
    always = hint_options(options, hint_dropout_rate=0.0).hint
    numbers = step(built, batch | {"control_weight": [0.2, 0.5]}, Draws(0), hint=always).total
    maps = [torch.full((1, 1, *size), value) for value in (0.2, 0.5)]
    for given in (maps, torch.stack(maps), [maps[0], 0.5]):
        total = step(built, batch | {"control_weight": given}, Draws(0), hint=always).total
        torch.testing.assert_close(total, numbers)
    both = step(built, batch | {"control_weight": [2.0, 5.0]}, Draws(0), hint=always).total
    shared = step(built, batch | {"control_weight": [2 / 7, 5 / 7]}, Draws(0), hint=always).total
    torch.testing.assert_close(both, shared)
    assert both != numbers


def test_weights_per_sample(built: Any) -> None:
    """What a loader makes of one weight per control in each sample."""
    model, options = built
    randomize_zero_blocks(model)
    always = hint_options(options, hint_dropout_rate=0.0).hint
    batch = tiny_batch(batch=2, conditions=2)

    def x0(weight: Any) -> torch.Tensor:
        return step(built, batch | {"control_weight": weight}, Draws(0), hint=always).denoised.x0

    together = x0(torch.tensor([[0.1, 0.6], [0.8, 0.2]]))
    for sample, weight in enumerate([[0.1, 0.6], [0.8, 0.2]]):
        torch.testing.assert_close(together[sample], x0(weight)[sample])


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 3, 2, 2), (2, 2, 2, 2, 2, 2, 2)], ids=str)
def test_weights_of_a_wrong_shape_are_named(built: Any, shape: tuple[int, ...]) -> None:
    batch = tiny_batch(conditions=2) | {"control_weight": torch.ones(shape)}
    with pytest.raises(ValueError, match="weight"):
        step(built, batch, Draws(0))


def randomize_zero_blocks(model: Any) -> None:
    """As after some training; otherwise no hint has an effect."""
    for parameter in model.net.zero_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))


def test_the_weight_of_a_single_hint_counts(built: Any) -> None:
    randomize_zero_blocks(built[0])
    batch = tiny_batch()
    losses = [
        step(built, batch | {"control_weight": weight}, Draws(0)).total for weight in (0.0, 1.0)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == step(built, batch, Draws(0)).total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "exactly one of 'video'"),
        ({"images_1024": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "exactly one of 'video'"),
        ({KEY: None}, "lacks the control video 'control_input_edge'"),
        ({"video": torch.zeros(2, 3, FRAMES, HEIGHT, WIDTH)}, "expected uint8"),
        ({"video": torch.zeros(2, 1, FRAMES, HEIGHT, WIDTH, dtype=torch.uint8)}, "1 channels"),
        ({KEY: torch.zeros(2, 3, 9, HEIGHT, WIDTH, dtype=torch.uint8)}, "as the clip has"),
        ({KEY: torch.zeros(2, 4, FRAMES, HEIGHT, WIDTH, dtype=torch.uint8)}, "multiple of 3"),
    ],
)
def test_a_wrong_batch_is_named(built: Any, change: dict[str, Any], message: str) -> None:
    batch = {name: v for name, v in {**tiny_batch(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        step(built, batch, Draws(0))


def test_a_hint_mask_of_the_wrong_length_is_named(built: Any) -> None:
    model, options = built
    hint = normalize_pixels(tiny_batch(conditions=2)[KEY], KEY)
    options = hint_options(options, hint_dropout_rate=0.5, hint_mask=(True,))
    with pytest.raises(ValueError, match="hint_mask has 1 entries"):
        encode_hint(hint, model.tokenizer, options)


def test_a_base_without_control_trains_alone(built: Any) -> None:
    whole, options = built
    model = Transfer(whole.base, None, whole.conditioner, whole.tokenizer)
    model.requires_grad_(True)
    try:
        loss = step((model, dataclasses.replace(options, hint=None)), tiny_batch(), Draws(0))
        loss.total.backward()
        assert all(p.grad is not None for p in model.base.blocks.parameters())
    finally:
        whole.base.requires_grad_(False)
    assert loss.hints == []
