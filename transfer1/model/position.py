"""Positional embeddings of the token grid: rotary angles, and tables added to the tokens.

Whatever precision the network is cast to, angles and frequencies are computed in float32 or better.

Letters: B batch, t h w token frames/rows/columns, L = t*h*w tokens, D width, K head size,
R = K / 2 rotary pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import EPS, Grid

BASE_FPS = 24  # frame rate at which one latent frame is one step of the temporal position
AXES = ("t", "h", "w")
LENGTH_OPTIONS = {"t": "max_frames", "h": "max_img_h", "w": "max_img_w"}


def split_width(width: int) -> Grid:
    """How many components of a vector tell frame, row and column: a third each, kept even."""
    spatial = width // 6 * 2
    return Grid(width - 2 * spatial, spatial, spatial)


def frequencies(width: int, theta: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """theta ** (-2i / width) for i = 0 ... width/2 - 1, float64."""
    index = torch.arange(width // 2, dtype=torch.float64, device=device)
    return theta ** (-2 * index / width)


def check_grid(grid: Grid, limits: Grid, axes: tuple[str, ...] = AXES) -> None:
    """Refuse a grid that is larger than the positions that the network knows.

    Raises:
        ValueError: names the axis, both sizes and the option to raise.
    """
    for axis in axes:
        size, limit = getattr(grid, axis), getattr(limits, axis)
        if size > limit:
            raise ValueError(
                f"the token grid {tuple(grid)} (frames, rows, columns) has {axis} = {size}, but "
                f"positions end at {limit}: raise {LENGTH_OPTIONS[axis]} of the network"
            )


def require_uniform_fps(fps_B: Tensor, grid: Grid) -> None:
    """All samples of a batch share one table of angles, so they must have one frame rate.

    Values on an accelerator are checked there, without waiting for it.

    Raises:
        ValueError: different rates in a batch of clips (of several frames each).
    """
    if grid.t == 1 or fps_B.numel() == 1:
        return
    uniform = (fps_B == fps_B[0]).all()
    message = "rotary positions need one frame rate per batch"
    if not fps_B.is_cpu or torch.compiler.is_compiling():
        torch._assert_async(uniform, message)
    elif not uniform:
        raise ValueError(
            f"{message}, got fps {fps_B.tolist()}: group clips by frame rate or set "
            "dataloader_train.batch_size=1"
        )


class Rotary(nn.Module):
    """A positional embedding that turns queries and keys; `forward` gives the angles."""

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class RotaryPosition1D(Rotary):
    """One axis over the flattened token index; the frame rate does not enter."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        """Return angles, float32 [L, R]."""
        device = None if fps_B is None else fps_B.device
        position = torch.arange(grid.length, dtype=torch.float32, device=device)
        return torch.outer(position, frequencies(self.head_dim, device=device).float())


class RotaryPosition3D(Rotary):
    """Separate angles for frame, row and column, the frame's measured in time at 24 per second.

    An extrapolation ratio r stretches an axis by raising the base to 10000 * r ** (n / (n - 2)),
    n being the axis's share of the head.
    """

    seq: Tensor

    def __init__(
        self,
        head_dim: int,
        len_h: int,
        len_w: int,
        len_t: int,
        h_extrapolation_ratio: float = 1.0,
        w_extrapolation_ratio: float = 1.0,
        t_extrapolation_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.limits = Grid(len_t, len_h, len_w)
        self.widths = split_width(head_dim)
        if min(self.widths) <= 2:
            raise ValueError(
                f"rope3d splits a head of {head_dim} into {tuple(self.widths)} for frames, rows "
                "and columns, but each needs more than 2: lower num_heads or raise model_channels"
            )
        ratios = (t_extrapolation_ratio, h_extrapolation_ratio, w_extrapolation_ratio)
        self.thetas = [
            10000.0 * ratio ** (n / (n - 2)) for ratio, n in zip(ratios, self.widths, strict=True)
        ]
        # Released checkpoints hold this buffer. Nothing reads it: a cast network rounds it.
        self.register_buffer("seq", torch.arange(max(self.limits), dtype=torch.float32))

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        """Return angles, float32 [L, R]: frame, row and column parts.

        Args:
            grid: token grid.
            fps_B: frames per second; None only for single images.

        Raises:
            ValueError: too many rows or columns, several frames without a frame rate, or samples of
                different frame rates.
        """
        check_grid(grid, self.limits, axes=("h", "w"))
        if fps_B is None and grid.t > 1:
            raise ValueError(
                f"a clip of {grid.t} latent frames needs its frame rate: put fps into the batch "
                "and the conditioner (fps=None is for single images)"
            )
        device = self.seq.device
        positions = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
        if fps_B is not None:
            require_uniform_fps(fps_B, grid)
            positions[0] = positions[0] / fps_B.flatten()[0].float() * BASE_FPS
        angles = [
            torch.outer(position, frequencies(n, theta, device).float())
            for position, n, theta in zip(positions, self.widths, self.thetas, strict=True)
        ]
        shaped = (angles[0][:, None, None], angles[1][None, :, None], angles[2][None, None, :])
        return torch.cat([part.expand(*grid, -1) for part in shaped], dim=-1).flatten(0, 2)


def rotary_table(angles_LR: Tensor) -> Tensor:
    """Cosines and sines of rotary angles, as `qk_norm_rope` takes them: float32 [2, L, R]."""
    return torch.stack([angles_LR.cos(), angles_LR.sin()])


def sincos(position: Tensor, width: int) -> Tensor:
    """concat(sin(p w_j), cos(p w_j)), w_j = 10000 ** (-2j / width); computed in float64.

    Returns:
        float32 [*position.shape, width].
    """
    angles = position.double()[..., None] * frequencies(width)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def outer_sum(part_tD: Tensor, part_hD: Tensor, part_wD: Tensor) -> Tensor:
    """Sum of one vector per frame, per row and per column: [L, D]."""
    return (part_tD[:, None, None] + part_hD[None, :, None] + part_wD[None, None]).flatten(0, 2)


class LearnablePositionAxes(nn.Module):
    """One learned vector per frame, row and column; their sum is scaled to root mean square 1."""

    def __init__(self, model_channels: int, len_h: int, len_w: int, len_t: int) -> None:
        super().__init__()
        self.limits = Grid(len_t, len_h, len_w)
        self.pos_emb_h = nn.Parameter(torch.empty(len_h, model_channels))
        self.pos_emb_w = nn.Parameter(torch.empty(len_w, model_channels))
        self.pos_emb_t = nn.Parameter(torch.empty(len_t, model_channels))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        """Return [L, D] in the dtype of the parameters."""
        check_grid(grid, self.limits)
        total_LD = outer_sum(
            self.pos_emb_t[: grid.t], self.pos_emb_h[: grid.h], self.pos_emb_w[: grid.w]
        )
        norm = torch.linalg.vector_norm(total_LD, dim=-1, keepdim=True, dtype=torch.float32)
        return total_LD / (EPS + norm / total_LD.shape[-1] ** 0.5).to(total_LD.dtype)


class SinCosPositionAxes(nn.Module):
    """Fixed sines and cosines of frame, row and column, each in its own share of the width."""

    pos_emb_t: Tensor
    pos_emb_h: Tensor
    pos_emb_w: Tensor

    def __init__(
        self,
        model_channels: int,
        len_h: int,
        len_w: int,
        len_t: int,
        h_extrapolation_ratio: float = 1.0,
        w_extrapolation_ratio: float = 1.0,
        t_extrapolation_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.limits = Grid(len_t, len_h, len_w)
        ratios = (t_extrapolation_ratio, h_extrapolation_ratio, w_extrapolation_ratio)
        widths = split_width(model_channels)
        for axis, length, ratio, width in zip(AXES, self.limits, ratios, widths, strict=True):
            table = sincos(torch.arange(length) / ratio, width)
            self.register_buffer(f"pos_emb_{axis}", table, persistent=False)

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        """Return [L, D]."""
        check_grid(grid, self.limits)
        parts = (
            self.pos_emb_t[: grid.t, None, None],
            self.pos_emb_h[None, : grid.h, None],
            self.pos_emb_w[None, None, : grid.w],
        )
        return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)


def sincos_table(model_channels: int, len_h: int, len_w: int, len_t: int) -> Tensor:
    """Sines and cosines of all three axes for every position: float32 [1, len_t, len_h, len_w, D].

    The original numbers the positions in the order column, row, frame and then reads them as row,
    column, frame. Where len_h and len_w differ, rows and columns are therefore mixed. Networks were
    trained with these values, so they stay.
    """
    spatial = model_channels // 3 // 2 * 2
    columns, rows, frames = torch.meshgrid(
        torch.arange(len_w), torch.arange(len_h), torch.arange(len_t), indexing="ij"
    )
    first, second, third = (
        axis.reshape(len_h, len_w, len_t).permute(2, 0, 1) for axis in (columns, rows, frames)
    )
    parts = (
        sincos(first, spatial),
        sincos(second, spatial),
        sincos(third, model_channels - 2 * spatial),
    )
    return torch.cat(parts, dim=-1)[None]


class PositionTable(nn.Module):
    """One vector per frame, row and column of the largest clip; smaller clips use its corner.

    Args:
        model_channels: width D.
        len_h: rows of the largest token grid.
        len_w: columns of the largest token grid.
        len_t: frames of the largest token grid.
        fixed: start from sines and cosines instead of small random numbers.
        learnable: whether training changes the table (then it is saved in checkpoints).
    """

    pos_embed: Tensor

    def __init__(
        self,
        model_channels: int,
        len_h: int,
        len_w: int,
        len_t: int,
        fixed: bool,
        learnable: bool,
    ) -> None:
        super().__init__()
        self.limits = Grid(len_t, len_h, len_w)
        if fixed:
            table = sincos_table(model_channels, len_h, len_w, len_t)
        else:
            table = torch.empty(1, len_t, len_h, len_w, model_channels)
            nn.init.trunc_normal_(table, std=0.02)
        if learnable:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table, persistent=False)

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        """Return [L, D]."""
        check_grid(grid, self.limits)
        return self.pos_embed[0, : grid.t, : grid.h, : grid.w].flatten(0, 2)


class FpsAwarePositionTable(PositionTable):
    """A table sampled at `max_fps`: a slower clip takes every int(max_fps / fps)-th frame of it."""

    def __init__(
        self,
        model_channels: int,
        len_h: int,
        len_w: int,
        len_t: int,
        min_fps: int,
        max_fps: int,
        fixed: bool,
        learnable: bool,
    ) -> None:
        frames = len_t * int(max_fps / min_fps)
        super().__init__(model_channels, len_h, len_w, frames, fixed, learnable)
        self.max_fps = max_fps

    def forward(self, grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        """Return [B, L, D], for single images [L, D].

        Raises:
            ValueError: a clip without a frame rate, or one that outlasts the table.
        """
        if grid.t == 1:
            return super().forward(grid)
        if fps_B is None:
            raise ValueError(
                f"a clip of {grid.t} latent frames needs its frame rate: put fps into the batch "
                "and the conditioner"
            )
        check_grid(grid, self.limits)
        stride_B = (self.max_fps / fps_B.float()).long()
        frame_Bt = torch.arange(grid.t, device=fps_B.device) * stride_B[:, None]
        if fps_B.is_cpu and not torch.compiler.is_compiling() and (frame_Bt >= self.limits.t).any():
            raise ValueError(
                f"clips of {grid.t} latent frames at fps {fps_B.tolist()} outlast the table of "
                f"{self.limits.t} frames at {self.max_fps} fps: raise max_frames or lower min_fps"
            )
        return self.pos_embed[0, frame_Bt, : grid.h, : grid.w].flatten(1, 3)


def build_position(
    name: str,
    width: int,
    head_dim: int,
    lengths: Mapping[str, int],
    ratios: Mapping[str, Any],
    fps: Mapping[str, int],
    learnable: bool,
) -> nn.Module:
    """The network's positional embedding, rotary or added to the tokens once.

    Raises:
        ValueError: unknown name.
    """

    def table(fixed: bool) -> nn.Module:
        return PositionTable(width, **lengths, fixed=fixed, learnable=learnable or not fixed)

    def fps_aware_table(fixed: bool) -> nn.Module:
        return FpsAwarePositionTable(
            width, **lengths, **fps, fixed=fixed, learnable=learnable or not fixed
        )

    return _choose(
        "pos_emb_cls",
        name,
        {
            "rope3d": lambda: RotaryPosition3D(head_dim, **lengths, **ratios),
            "rope": lambda: RotaryPosition1D(head_dim),
            "sincos": lambda: table(fixed=True),
            "learnable": lambda: table(fixed=False),
            "sincos_fps_aware": lambda: fps_aware_table(fixed=True),
            "learnable_fps_aware": lambda: fps_aware_table(fixed=False),
        },
    )


def build_extra_position(
    name: str, width: int, lengths: Mapping[str, int], ratios: Mapping[str, Any]
) -> nn.Module:
    """The absolute position that is added at the start of every block.

    Raises:
        ValueError: unknown name.
    """
    return _choose(
        "extra_per_block_abs_pos_emb_type",
        name,
        {
            "sincos": lambda: SinCosPositionAxes(width, **lengths, **ratios),
            "learnable": lambda: LearnablePositionAxes(width, **lengths),
        },
    )


def _choose(option: str, name: str, builders: Mapping[str, Callable[[], nn.Module]]) -> nn.Module:
    if name not in builders:
        raise ValueError(f"{option}={name!r}: choose one of {', '.join(builders)}")
    return builders[name]()
