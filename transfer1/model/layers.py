"""Embeddings and heads around the transformer blocks.

Attribute names that form checkpoint keys (`linear_1`, `proj.1`, `adaLN_modulation.2`, ...) are
those of released checkpoints.

Letters: B batch, C channels, T H W latent frames/rows/columns, t h w the token grid,
L = t*h*w tokens, D width, P values of one patch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels import Ops

EPS = 1e-6  # of every norm of the network


class Grid(NamedTuple):
    """Number of tokens along frames, rows and columns; tokens are ordered in this order."""

    t: int
    h: int
    w: int

    @property
    def length(self) -> int:
        return self.t * self.h * self.w


class Timesteps(nn.Module):
    """Sinusoidal features of a scalar: cosines, then sines, of frequencies 1 down to 1/10000."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_frequencies = num_channels // 2

    def forward(self, scalar_B: Tensor) -> Tensor:
        """Return [B, 2 * (num_channels // 2)] in the dtype of the input, computed in float32."""
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=scalar_B.device)
        frequencies = torch.exp(-math.log(10000) / self.num_frequencies * index)
        angles = scalar_B.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(scalar_B.dtype)


class TimestepEmbedding(nn.Module):
    """MLP on time features.

    With `use_adaln_lora` the features themselves condition the network and the MLP gives the
    modulation [B, 3D] that all sublayers share; without, the MLP gives the conditioning vector.
    """

    def __init__(self, in_features: int, out_features: int, use_adaln_lora: bool) -> None:
        super().__init__()
        self.use_adaln_lora = use_adaln_lora
        outputs = 3 * out_features if use_adaln_lora else out_features
        self.linear_1 = nn.Linear(in_features, out_features, bias=not use_adaln_lora)
        self.linear_2 = nn.Linear(out_features, outputs, bias=not use_adaln_lora)

    def forward(self, features_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (conditioning vector, shared modulation or None)."""
        features_BD = features_BD.to(self.linear_1.weight.dtype)
        output = self.linear_2(F.silu(self.linear_1(features_BD)))
        return (features_BD, output) if self.use_adaln_lora else (output, None)


def time_embedder(width: int, use_adaln_lora: bool) -> nn.Sequential:
    """Scalar [B] -> features -> `TimestepEmbedding`."""
    return nn.Sequential(Timesteps(width), TimestepEmbedding(width, width, use_adaln_lora))


def modulation_layers(width: int, outputs: int, lora_dim: int | None) -> nn.Sequential:
    """A bias-free linear layer of the activated conditioning vector, low-rank with `lora_dim`.

    Released checkpoints number the SiLU as layer 0. A network computes it once, for all sublayers.
    """
    if lora_dim is None:
        return nn.Sequential(nn.Identity(), nn.Linear(width, outputs, bias=False))
    return nn.Sequential(
        nn.Identity(),
        nn.Linear(width, lora_dim, bias=False),
        nn.Linear(lora_dim, outputs, bias=False),
    )


class PatchEmbed(nn.Module):
    """One bias-free linear layer per patch, flattened in the order channel, frame, row, column.

    `legacy_patch_emb` stores the weight as that of a convolution, under the key and in the shape of
    older checkpoints; the numbers are the same.
    """

    def __init__(
        self,
        spatial_patch_size: int,
        temporal_patch_size: int,
        in_channels: int,
        out_channels: int,
        legacy_patch_emb: bool,
    ) -> None:
        super().__init__()
        self.patch = (temporal_patch_size, spatial_patch_size, spatial_patch_size)
        self.proj: nn.Module
        if legacy_patch_emb:
            self.proj = nn.Conv3d(in_channels, out_channels, self.patch, self.patch, bias=False)
        else:
            linear = nn.Linear(in_channels * math.prod(self.patch), out_channels, bias=False)
            self.proj = nn.Sequential(nn.Identity(), linear)

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix [D, P], whichever way it is stored."""
        layer = self.proj[1] if isinstance(self.proj, nn.Sequential) else self.proj
        return layer.get_parameter("weight").flatten(1)

    def grid(self, x_BCTHW: Tensor) -> Grid:
        """The token grid of a latent.

        Raises:
            ValueError: frames, rows or columns are not a multiple of the patch size.
        """
        for axis, size, patch in zip("THW", x_BCTHW.shape[2:], self.patch, strict=True):
            if size % patch:
                option = "patch_temporal" if axis == "T" else "patch_spatial"
                raise ValueError(
                    f"latent of shape {tuple(x_BCTHW.shape)}: {axis} = {size} is not a multiple of "
                    f"the patch size {patch}; pad the latent or change {option} of the network"
                )
        return Grid(
            *(size // patch for size, patch in zip(x_BCTHW.shape[2:], self.patch, strict=True))
        )

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Return tokens [B, L, D]."""
        t, h, w = self.grid(x_BCTHW)
        patches = rearrange(
            x_BCTHW, "B C (t pt) (h ph) (w pw) -> B (t h w) (C pt ph pw)", t=t, h=h, w=w
        )
        return F.linear(patches, self.weight)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a bias-free linear layer to the values of one output patch."""

    def __init__(self, width: int, patch_values: int, lora_dim: int | None, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.linear = nn.Linear(width, patch_values, bias=False)
        self.adaLN_modulation = modulation_layers(width, 2 * width, lora_dim)

    def forward(self, x_BLD: Tensor, emb_BD: Tensor, adaln_lora_B3D: Tensor | None) -> Tensor:
        """Return [B, L, P]; of the shared modulation, shift and scale are used."""
        modulation = self.adaLN_modulation(emb_BD)
        if adaln_lora_B3D is not None:
            modulation = modulation + adaln_lora_B3D[:, : modulation.shape[1]]
        shift_BD, scale_BD = modulation.chunk(2, dim=-1)
        return self.linear(self.ops.adaln_modulate(x_BLD, shift_BD, scale_BD, EPS))


def unpatchify(patches_BLP: Tensor, grid: Grid, patch_temporal: int, patch_spatial: int) -> Tensor:
    """Put output patches back in place.

    The values of an output patch are ordered row, column, frame, channel: not the order of
    `PatchEmbed`.

    Returns:
        [B, C, T, H, W].
    """
    return rearrange(
        patches_BLP,
        "B (t h w) (ph pw pt C) -> B C (t pt) (h ph) (w pw)",
        t=grid.t,
        h=grid.h,
        w=grid.w,
        pt=patch_temporal,
        ph=patch_spatial,
        pw=patch_spatial,
    )


class FourierFeatures(nn.Module):
    """Random features sqrt(2) * cos(scalar * freqs + phases); both buffers are saved."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, scalar_B: Tensor) -> Tensor:
        """Return float32 [B, num_channels]."""
        angles = scalar_B.float()[:, None] * self.freqs.float() + self.phases.float()
        return math.sqrt(2) * angles.cos()


class LogVariance(nn.Sequential):
    """The learned log-variance of the loss as a function of the noise level."""

    def __init__(self, num_channels: int = 128) -> None:
        super().__init__(FourierFeatures(num_channels), nn.Linear(num_channels, 1, bias=False))

    def forward(self, noise_level_B: Tensor) -> Tensor:
        """Return [B, 1] in the dtype of the head's weight."""
        features, head = self
        return head(features(noise_level_B).to(head.weight.dtype))
