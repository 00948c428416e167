"""The control branch: batches, several hints, weights, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from goldens import compare
from tiny_model import CONTROL, TINY, sample_of, tiny_control, tiny_dit, tiny_inputs
from torch import Tensor, nn

from transfer1.model.control import (
    ControlEncoder,
    normalize_weights,
    resize_weight_map,
    weights_per_hint,
)
from transfer1.model.layers import Grid

LATENT, TOKENS = Grid(3, 4, 6), Grid(3, 2, 3)


def hints(count: int, batch: int = 2, channels: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, channels, *LATENT, generator=generator) for _ in range(count)]


def compare_residuals(actual: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert actual.keys() == expected.keys() == {0, 1}
    for index, value in expected.items():
        compare(actual[index], value, f"residual of block {index}")


def scaled(residuals: dict[int, Tensor], factor: float | Tensor) -> dict[int, Tensor]:
    return {index: residual * factor for index, residual in residuals.items()}


def test_fresh_control_changes_nothing() -> None:
    encoder = ControlEncoder(**TINY, **CONTROL)
    residuals = encoder(*tiny_inputs(), hints(1))
    assert all(not residual.any() for residual in residuals.values())


def test_a_batch_with_padding_masks_gives_what_its_samples_give() -> None:
    encoder = tiny_control()
    x, noise_level, condition = tiny_inputs(batch=3)
    (hint,) = hints(1, batch=3)
    together = encoder(x, noise_level, condition, [hint])
    for i in range(3):
        one = slice(i, i + 1)
        alone = encoder(x[one], noise_level[one], sample_of(condition, i), [hint[one]])
        compare_residuals({k: v[one] for k, v in together.items()}, alone)


def test_the_padding_mask_reaches_the_hint() -> None:
    encoder = tiny_control()
    _, _, condition = tiny_inputs()
    (hint,) = hints(1)
    inverted = replace(condition, padding_mask=1 - condition.padding_mask)
    assert not torch.equal(
        encoder.encode_hint(hint, condition), encoder.encode_hint(hint, inverted)
    )


def test_several_hints_add_up_in_training_too() -> None:
    encoder = tiny_control()
    inputs = tiny_inputs()
    first, second = hints(2)
    expected = scaled(encoder(*inputs, [first]), 0.3)
    for index, residual in scaled(encoder(*inputs, [second]), -1.5).items():
        expected[index] = expected[index] + residual
    compare_residuals(encoder(*inputs, [first, second], [0.3, -1.5]), expected)

    out = tiny_dit()(*inputs, encoder(*inputs, [first, second], torch.tensor([0.3, -1.5])))
    out.square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert without and all(name.startswith("final_layer.") for name in without)


def test_a_smaller_hint_is_padded_with_zeros() -> None:
    encoder = tiny_control()
    inputs = tiny_inputs()
    (hint,) = hints(1, channels=4)
    padded = torch.cat([hint, torch.zeros(2, 2, *LATENT)], dim=1)
    compare_residuals(encoder(*inputs, [hint]), encoder(*inputs, [padded]))


@pytest.mark.parametrize(
    "weights",
    [0.25, torch.tensor(0.25), torch.tensor([0.25]), [0.25], torch.full((1, 1, 1, 3, 2, 3), 0.25)],
    ids=["number", "0-d", "1-d", "list", "map"],
)
def test_weights_of_one_hint(weights: Any) -> None:
    encoder = tiny_control()
    inputs = tiny_inputs()
    expected = scaled(encoder(*inputs, hints(1)), 0.25)
    compare_residuals(encoder(*inputs, hints(1), weights), expected)


def test_a_map_weighs_every_token_of_every_sample() -> None:
    encoder = tiny_control()
    inputs = tiny_inputs()
    weight = torch.rand(2, 1, *TOKENS, requires_grad=True)
    plain = encoder(*inputs, hints(1))
    weighted = encoder(*inputs, hints(1), [weight])
    compare_residuals(weighted, scaled(plain, weight.flatten(1)[..., None]))
    weighted[1].sum().backward()
    assert weight.grad is not None and weight.grad.abs().min() > 0


def test_dropped_samples_get_no_control() -> None:
    encoder = tiny_control()
    inputs = tiny_inputs()
    plain = encoder(*inputs, hints(1))
    kept = encoder(*inputs, hints(1), keep_B=torch.tensor([1.0, 0.0]))
    for index, residual in kept.items():
        assert torch.equal(residual[0], plain[index][0])
        assert not residual[1].any()


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_activation_checkpointing_is_bitwise_the_same(mode: str) -> None:
    gradients = []
    for chosen in ("none", mode):
        encoder = tiny_control(activation_checkpoint=chosen)
        residuals = encoder(*tiny_inputs(), hints(2))
        sum(residual.square().sum() for residual in residuals.values()).backward()
        named = encoder.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_table_positions_are_added_to_the_hint_too() -> None:
    encoder = tiny_control(pos_emb_cls="sincos", extra_per_block_abs_pos_emb=False)
    x, noise_level, condition = tiny_inputs()
    condition = replace(condition, padding_mask=torch.zeros(2, 1, 32, 48))
    position = encoder.embed_inputs(x, noise_level, condition).token_position
    assert position is not None
    constant = torch.ones(2, 6, *LATENT)
    tokens = encoder.encode_hint(constant, condition, position)
    assert not torch.allclose(tokens[:, :1].expand_as(tokens), tokens)


def test_map_at_token_resolution_is_used_as_it_is() -> None:
    weight = torch.rand(1, 1, *TOKENS)
    assert resize_weight_map(weight, LATENT, TOKENS) is weight


def test_map_at_latent_resolution_is_averaged_over_patches() -> None:
    weight = torch.rand(2, 1, *LATENT)
    expected = F.avg_pool3d(weight, (1, 2, 2))
    compare(resize_weight_map(weight, LATENT, TOKENS), expected, "tokens")


def test_map_at_pixel_resolution_keeps_the_first_frame_apart() -> None:
    """Frame 0 gives the first latent frame; frames 1 to 16 give the other two."""
    frames = torch.zeros(1, 1, 17, 32, 48)
    frames[:, :, 0] = 1.0
    frames[:, :, 9:] = 0.5
    out = resize_weight_map(frames, LATENT, TOKENS)
    assert out.shape == (1, 1, *TOKENS)
    assert [out[0, 0, t].unique().item() for t in range(3)] == [1.0, 0.0, 0.5]


def test_map_of_an_image() -> None:
    out = resize_weight_map(torch.full((1, 1, 1, 32, 48), 0.7), Grid(1, 4, 6), Grid(1, 2, 3))
    compare(out, torch.full((1, 1, 1, 2, 3), 0.7), "image")


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 3, 3, 3),
        (1, 1, 2, 4, 6),
        (1, 1, 16, 32, 48),
        (1, 1, 1, 32, 48),
        (1, 1, 17, 32, 24),
        (1, 2, 3, 4, 6),
        (1, 3, 4, 6),
    ],
    ids=str,
)
def test_maps_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(3, 2, 3\) \(tokens\), \(3, 4, 6\) \(latent\)"):
        resize_weight_map(torch.rand(shape), LATENT, TOKENS)


def test_normalized_numbers_share_one() -> None:
    assert normalize_weights([0.3, 0.4]) == [0.3, 0.4]
    assert normalize_weights([1.0, 3.0]) == [0.25, 0.75]


def test_normalized_maps_share_one_at_every_voxel() -> None:
    first = torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 1, 3, 1, 1)
    for weight, expected in zip(
        normalize_weights([first, 0.5]), ([0.0, 0.5, 0.8], [0.5, 0.5, 0.2]), strict=True
    ):
        compare(torch.as_tensor(weight).flatten(), torch.tensor(expected), "weights")
    with pytest.raises(ValueError, match="give all maps of a clip one shape"):
        normalize_weights([first, torch.rand(1, 1, 3, 2, 2)])


def test_refusals() -> None:
    encoder = tiny_control()
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match=r"7 channels.*at most 6: raise model.net_ctrl.hint_chann"):
        encoder(*inputs, hints(1, channels=7))
    with pytest.raises(ValueError, match="2 control weights for 1 hints"):
        encoder(*inputs, hints(1), [0.5, 0.5])
    with pytest.raises(ValueError, match="for a batch of 2: its first axis must be 1"):
        encoder(*inputs, hints(1), [torch.rand(3, 1, *TOKENS)])
    with pytest.raises(
        ValueError, match="num_control_blocks=4 must lie between 1 and num_blocks=3"
    ):
        ControlEncoder(**TINY, num_control_blocks=4)
    assert weights_per_hint(None, 2) == [1.0, 1.0]


def test_hint_gain_scales_the_initial_hint_layers() -> None:
    """The layers that start at zero stay there; every other weight of the hint grows."""
    plain, strong = (
        [layer for layer in fresh_control(gain).input_hint_block if isinstance(layer, nn.Linear)]
        for gain in (1.0, 3.0)
    )
    for before, after in zip(plain, strong, strict=True):
        torch.testing.assert_close(after.weight, 3.0 * before.weight)
    assert not strong[-1].weight.any() and strong[0].weight.any()


def fresh_control(hint_gain: float) -> ControlEncoder:
    torch.manual_seed(0)
    return ControlEncoder(**{**TINY, **CONTROL}, hint_gain=hint_gain)
