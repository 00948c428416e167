"""Positional embeddings: precision, limits, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfer1.model.layers import Grid
from transfer1.model.position import (
    FpsAwarePositionTable,
    LearnablePositionAxes,
    PositionTable,
    RotaryPosition1D,
    RotaryPosition3D,
    SinCosPositionAxes,
    rotary_table,
    split_width,
)

GRID = Grid(3, 4, 5)
LENGTHS = {"len_h": 8, "len_w": 8, "len_t": 8}


def test_width_of_a_released_head() -> None:
    assert split_width(128) == Grid(44, 42, 42)
    assert split_width(32) == Grid(12, 10, 10)


def test_token_order_is_frame_row_column() -> None:
    angles = RotaryPosition3D(32, **LENGTHS)(GRID, torch.tensor([24.0]))
    t, h, w = 2, 1, 3
    token = angles[(t * GRID.h + h) * GRID.w + w]
    # The lowest frequency index of every axis is 1, so the first angle is the position itself.
    assert [token[0].item(), token[6].item(), token[11].item()] == [t, h, w]


@pytest.mark.parametrize("fps", [24.0, 30.0, 29.97])
def test_angles_stay_float32_in_a_bfloat16_network(fps: float) -> None:
    """Neither casting the module nor asking twice changes a bit of the angles."""
    embedder = RotaryPosition3D(32, **LENGTHS, t_extrapolation_ratio=2.0)
    expected = embedder(GRID, torch.tensor([fps]))
    cast = embedder.to(torch.bfloat16)
    assert cast.seq.dtype == torch.bfloat16
    angles = cast(GRID, torch.tensor([fps]))
    assert angles.dtype == torch.float32
    assert torch.equal(angles, expected)
    assert rotary_table(angles).dtype == torch.float32


def test_one_dimensional_angles_ignore_the_frame_rate() -> None:
    embedder = RotaryPosition1D(16)
    assert torch.equal(embedder(GRID), embedder(GRID, torch.tensor([7.0])))
    assert embedder(GRID)[:, 0].tolist() == list(range(GRID.length))


def test_learnable_axes_have_unit_root_mean_square() -> None:
    embedder = LearnablePositionAxes(64, **LENGTHS)
    out = embedder(GRID)
    assert out.shape == (GRID.length, 64)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(GRID.length), atol=1e-3, rtol=0)


def test_fixed_tables_are_not_saved_and_learnable_ones_are() -> None:
    fixed = PositionTable(24, **LENGTHS, fixed=True, learnable=False)
    trained = PositionTable(24, **LENGTHS, fixed=True, learnable=True)
    assert not fixed.state_dict() and not list(fixed.parameters())
    assert list(trained.state_dict()) == ["pos_embed"]
    assert torch.equal(fixed(GRID), trained(GRID))
    assert not SinCosPositionAxes(24, **LENGTHS).state_dict()


def test_frame_rate_aware_table_takes_every_nth_frame() -> None:
    table = FpsAwarePositionTable(6, 2, 2, 4, min_fps=10, max_fps=30, fixed=False, learnable=True)
    grid = Grid(3, 2, 2)
    out = table(grid, torch.tensor([30.0, 10.0, 15.0])).unflatten(1, grid)
    for sample, stride in enumerate((1, 3, 2)):
        assert torch.equal(out[sample], table.pos_embed[0, : 3 * stride : stride])
    assert table(Grid(1, 2, 2)).shape == (4, 6)


@pytest.mark.parametrize(
    ("embedder", "grid", "fps", "message"),
    [
        (RotaryPosition3D(32, **LENGTHS), Grid(2, 9, 4), [24.0], "h = 9.*raise max_img_h"),
        (RotaryPosition3D(32, **LENGTHS), Grid(2, 4, 9), [24.0], "w = 9.*raise max_img_w"),
        (RotaryPosition3D(32, **LENGTHS), Grid(2, 4, 4), None, "2 latent frames.*put fps"),
        (
            RotaryPosition3D(32, **LENGTHS),
            Grid(2, 4, 4),
            [24.0, 30.0],
            r"\[24.0, 30.0\].*batch_size",
        ),
        (LearnablePositionAxes(24, **LENGTHS), Grid(9, 4, 4), None, "t = 9.*raise max_frames"),
        (SinCosPositionAxes(24, **LENGTHS), Grid(9, 4, 4), None, "t = 9.*raise max_frames"),
        (
            FpsAwarePositionTable(
                24, **LENGTHS, min_fps=10, max_fps=30, fixed=True, learnable=False
            ),
            Grid(5, 4, 4),
            [5.0],
            r"\[5.0\] outlast the table of 24 frames.*raise max_frames",
        ),
        (
            FpsAwarePositionTable(
                24, **LENGTHS, min_fps=10, max_fps=30, fixed=True, learnable=False
            ),
            Grid(5, 4, 4),
            None,
            "5 latent frames.*put fps",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_refusals(embedder: nn.Module, grid: Grid, fps: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(grid, None if fps is None else torch.tensor(fps))


def test_different_frame_rates_are_fine_for_images_and_single_samples() -> None:
    embedder = RotaryPosition3D(32, **LENGTHS)
    image = Grid(1, 4, 4)
    assert torch.equal(embedder(image, torch.tensor([10.0, 30.0])), embedder(image))
    clip = embedder(Grid(2, 4, 4), torch.tensor([12.0]))
    twice = embedder(Grid(3, 4, 4), torch.tensor([24.0]))
    assert torch.equal(clip[16:], twice[32:])  # frame 1 at 12 per second is frame 2 at 24


def test_a_head_too_narrow_for_three_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head of 8 .* lower num_heads"):
        RotaryPosition3D(8, **LENGTHS)
