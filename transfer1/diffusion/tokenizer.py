"""Tokenizers: pixels to latents and back.

`DCTVideoTokenizer` is the built-in `vae1`: a fixed linear transform that needs no download.
Released tokenizers load through `transfer1.diffusion.jit_tokenizer`.

Shapes: B batch, C = 3 colours, F frames, Y X pixel rows and columns; K latent channels, T H W
latent frames, rows and columns. Pixels are in [-1, 1].
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from functools import cache
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F

# Rows: brightness, red against blue, green against both. Orthonormal, so errors add up as in RGB.
OPPONENT_COLOURS = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)),
)


class VideoTokenizer(ABC):
    """What the model needs of a tokenizer.

    Latents come out in the dtype and on the device of the pixels, and pixels likewise.

    Attributes:
        latent_ch: K.
        spatial_compression_factor: Y / H = X / W.
        temporal_compression_factor: frames per latent frame, the first one aside.
        pixel_chunk_duration: frames of the clips it is used with.
        latent_chunk_duration: latent frames of such a clip.
    """

    latent_ch: int
    spatial_compression_factor: int
    temporal_compression_factor: int
    pixel_chunk_duration: int
    latent_chunk_duration: int

    @abstractmethod
    def encode(self, video_BCFYX: torch.Tensor) -> torch.Tensor:
        """Return the latent [B, K, T, H, W] of a video [B, 3, F, Y, X]."""

    @abstractmethod
    def decode(self, latent_BKTHW: torch.Tensor) -> torch.Tensor:
        """Return the video [B, 3, F, Y, X] of a latent [B, K, T, H, W]."""

    @classmethod
    @abstractmethod
    def count_latent_frames(cls, options: Any, num_pixel_frames: int) -> int:
        """Return T for F; ValueError if a video of F frames cannot be encoded.

        Args:
            options: a tokenizer, or its node in a configuration: what holds the attributes.
        """

    @abstractmethod
    def get_pixel_num_frames(self, num_latent_frames: int) -> int:
        """Return F for T; ValueError if a latent of T frames cannot be decoded."""

    def get_latent_num_frames(self, num_pixel_frames: int) -> int:
        """Return T for F; ValueError if a video of F frames cannot be encoded."""
        return self.count_latent_frames(self, num_pixel_frames)

    def check_video(self, video_BCFYX: torch.Tensor) -> None:
        """Raise ValueError unless the video is [B, 3, F, Y, X] with a size this tokenizer takes."""
        factor, shape = self.spatial_compression_factor, list(video_BCFYX.shape)
        if len(shape) != 5 or shape[1] != 3 or shape[3] % factor or shape[4] % factor:
            raise ValueError(
                f"tokenizer: a video of shape {shape}; give [B, 3, F, Y, X] with Y and X multiples "
                f"of {factor} (set by the resolution of the dataset)"
            )
        self.get_latent_num_frames(shape[2])

    def check_latent(self, latent_BKTHW: torch.Tensor) -> None:
        """Raise ValueError unless the latent is [B, K, T, H, W] with a T this tokenizer takes."""
        shape = list(latent_BKTHW.shape)
        if len(shape) != 5 or shape[1] != self.latent_ch:
            raise ValueError(
                f"tokenizer: a latent of shape {shape}; give [B, {self.latent_ch}, T, H, W]"
            )
        self.get_pixel_num_frames(shape[2])


class DCTVideoTokenizer(VideoTokenizer):
    """Orthonormal block transform that keeps the coefficients of most energy; causal in time.

    The first frame is encoded alone, then each group of `temporal_compression_factor` frames: 1 +
    t*k frames give 1 + k latent frames. A block is one frame (or one group) x s x s pixels. Its
    three colours are rotated to opponent colours, an orthonormal DCT-II runs over frames, rows and
    columns, and `latent_ch` of the coefficients are kept: those of most energy on real video.
    Which these are, their means and one scale stand in `vae1.json`, made by
    `python -m transfer1.diffusion.measure_vae1`; latents are (coefficient - mean) / scale, of about
    unit variance over all channels. Decoding is the transposed transform, the least-squares
    reconstruction from the kept coefficients.

    Args:
        latent_ch, spatial_compression_factor, temporal_compression_factor: choose the table.
        pixel_chunk_duration: frames of the clips it is used with; any 1 + t*k are encoded.

    Raises:
        ValueError: there is no table for these factors, or the duration is not 1 + t*k.
    """

    def __init__(
        self,
        latent_ch: int = 16,
        spatial_compression_factor: int = 8,
        temporal_compression_factor: int = 8,
        pixel_chunk_duration: int = 121,
    ) -> None:
        self.latent_ch = latent_ch
        self.spatial_compression_factor = spatial_compression_factor
        self.temporal_compression_factor = temporal_compression_factor
        self.pixel_chunk_duration = pixel_chunk_duration
        self.latent_chunk_duration = self.get_latent_num_frames(pixel_chunk_duration)
        name = table_name(temporal_compression_factor, spatial_compression_factor, latent_ch)
        tables = read_tables()
        if name not in tables:
            raise ValueError(
                f"tokenizer: no table for {name} (frames x rows x columns to channels); choose "
                f"{' or '.join(tables)}, or add one with python -m transfer1.diffusion.measure_vae1"
            )
        self._first = KeptCoefficients(1, spatial_compression_factor, tables[name]["first"])
        self._group = KeptCoefficients(
            temporal_compression_factor, spatial_compression_factor, tables[name]["group"]
        )

    def encode(self, video_BCFYX: torch.Tensor) -> torch.Tensor:
        self.check_video(video_BCFYX)
        video = video_BCFYX.float()
        parts = [self._first.encode(video[:, :, :1])]
        if video.shape[2] > 1:
            parts.append(self._group.encode(video[:, :, 1:]))
        return torch.cat(parts, dim=2).to(video_BCFYX.dtype)

    def decode(self, latent_BKTHW: torch.Tensor) -> torch.Tensor:
        self.check_latent(latent_BKTHW)
        latent = latent_BKTHW.float()
        parts = [self._first.decode(latent[:, :, :1])]
        if latent.shape[2] > 1:
            parts.append(self._group.decode(latent[:, :, 1:]))
        return torch.cat(parts, dim=2).to(latent_BKTHW.dtype)

    @classmethod
    def count_latent_frames(cls, options: Any, num_pixel_frames: int) -> int:
        groups, rest = divmod(num_pixel_frames - 1, options.temporal_compression_factor)
        if num_pixel_frames < 1 or rest:
            raise ValueError(
                f"tokenizer: a video of {num_pixel_frames} frames; give 1 + a multiple of "
                f"{options.temporal_compression_factor} frames (num_frames of the dataset)"
            )
        return 1 + groups

    def get_pixel_num_frames(self, num_latent_frames: int) -> int:
        if num_latent_frames < 1:
            raise ValueError(f"tokenizer: a latent of {num_latent_frames} frames; give 1 or more")
        return 1 + (num_latent_frames - 1) * self.temporal_compression_factor


class KeptCoefficients:
    """The transform of blocks of `frames` x `size` x `size` pixels to K scaled coefficients.

    Args:
        table: `rows`, K of (colour, frame, row, column, mean), and `scale`.
    """

    def __init__(self, frames: int, size: int, table: dict[str, Any]) -> None:
        self.stride = (frames, size, size)
        rows = table["rows"]
        colour, t, y, x = (torch.tensor([int(row[i]) for row in rows]) for i in range(4))
        basis = torch.einsum(
            "kc,kt,ky,kx->kctyx",
            torch.tensor(OPPONENT_COLOURS, dtype=torch.float64)[colour],
            dct_matrix(frames)[t],
            dct_matrix(size)[y],
            dct_matrix(size)[x],
        )
        self.scale: float = table["scale"]
        self._cpu = basis.float(), torch.tensor([row[4] for row in rows]).view(-1, 1, 1, 1)
        self._on_device = {torch.device("cpu"): self._cpu}

    def encode(self, video_BCFYX: torch.Tensor) -> torch.Tensor:
        basis, mean = self._constants(video_BCFYX.device)
        return (F.conv3d(video_BCFYX, basis, stride=self.stride) - mean) / self.scale

    def decode(self, latent_BKTHW: torch.Tensor) -> torch.Tensor:
        basis, mean = self._constants(latent_BKTHW.device)
        coefficients = latent_BKTHW * self.scale + mean
        return F.conv_transpose3d(coefficients, basis, stride=self.stride)

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return basis [K, 3, frames, size, size] and mean [K, 1, 1, 1] on a device."""
        if device not in self._on_device:
            basis, mean = self._cpu
            self._on_device[device] = basis.to(device), mean.to(device)
        return self._on_device[device]


def dct_matrix(size: int) -> torch.Tensor:
    """Return the orthonormal DCT-II, float64 [coefficient, sample]."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    sample = torch.arange(size, dtype=torch.float64)[None]
    matrix = torch.cos(math.pi * (sample + 0.5) * frequency / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def table_name(frames: int, size: int, channels: int) -> str:
    """Return the name in `vae1.json` of a block size."""
    return f"{frames}x{size}x{size}-{channels}"


@cache
def read_tables() -> dict[str, Any]:
    """Return the tables of `vae1.json`: name -> {"first": table, "group": table}."""
    return json.loads(resources.files(__package__).joinpath("vae1.json").read_text())["tables"]
