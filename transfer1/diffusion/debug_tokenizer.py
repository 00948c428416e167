"""A tokenizer without learned weights, for checks of the training flow against known numbers.

Shapes: B batch, C = 3 colours, F frames, Y X pixel rows and columns; K latent channels, T H W
latent frames, rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from transfer1.diffusion.tokenizer import VideoTokenizer


class DummyJointImageVideoTokenizer(VideoTokenizer):
    """Trilinear resizing of axes that are swapped into place; single frames are images.

    A chunk of P = `pixel_chunk_duration` frames gives `latent_chunk_duration` latent frames. On
    the way the frame axis of a video has K entries, one per latent channel.
    """

    def __init__(
        self,
        name: str = "dummy_joint_image_video",
        pixel_ch: int = 3,
        latent_ch: int = 16,
        pixel_chunk_duration: int = 17,
        latent_chunk_duration: int = 3,
        spatial_compression_factor: int = 16,
        temporal_compression_factor: int = 8,
        spatial_resolution: str = "720",
    ) -> None:
        self.pixel_ch = pixel_ch
        self.latent_ch = latent_ch
        self.pixel_chunk_duration = pixel_chunk_duration
        self.latent_chunk_duration = latent_chunk_duration
        self.spatial_compression_factor = spatial_compression_factor
        self.temporal_compression_factor = temporal_compression_factor

    def encode(self, video_BCFYX: torch.Tensor) -> torch.Tensor:
        self.check_video(video_BCFYX)
        frames, height, width = video_BCFYX.shape[2:]
        size = height // self.spatial_compression_factor, width // self.spatial_compression_factor
        if frames == 1:
            return trilinear(video_BCFYX.transpose(1, 2), (self.latent_ch, *size)).transpose(1, 2)
        small_BHWTC = trilinear(video_BCFYX, (self.latent_ch, *size)).permute(0, 3, 4, 2, 1)
        channels_last = (size[1], self.get_latent_num_frames(frames), self.latent_ch)
        return trilinear(small_BHWTC, channels_last).permute(0, 4, 3, 1, 2)

    def decode(self, latent_BKTHW: torch.Tensor) -> torch.Tensor:
        self.check_latent(latent_BKTHW)
        frames, height, width = latent_BKTHW.shape[2:]
        size = height * self.spatial_compression_factor, width * self.spatial_compression_factor
        if frames == 1:
            return trilinear(latent_BKTHW.transpose(1, 2), (self.pixel_ch, *size)).transpose(1, 2)
        pixel_frames = self.get_pixel_num_frames(frames)
        latent_BHWTK = latent_BKTHW.permute(0, 3, 4, 2, 1)
        small_BHWFC = trilinear(latent_BHWTK, (width, pixel_frames, self.pixel_ch))
        return trilinear(small_BHWFC.permute(0, 4, 3, 1, 2), (pixel_frames, *size))

    @classmethod
    def count_latent_frames(cls, options: Any, num_pixel_frames: int) -> int:
        chunk, becomes = options.pixel_chunk_duration, options.latent_chunk_duration
        return scale_frames(num_pixel_frames, chunk, becomes)

    def get_pixel_num_frames(self, num_latent_frames: int) -> int:
        return scale_frames(
            num_latent_frames, self.latent_chunk_duration, self.pixel_chunk_duration
        )


def scale_frames(frames: int, per_chunk: int, becomes: int) -> int:
    """Frames of whole chunks on the other side; a single frame stays one."""
    if frames == 1:
        return 1
    if frames < 1 or frames % per_chunk:
        raise ValueError(f"tokenizer: {frames} frames; give 1 or a multiple of {per_chunk}")
    return frames // per_chunk * becomes


def trilinear(x_BCTHW: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Resize the last three axes, with pixel centres at half positions."""
    return F.interpolate(x_BCTHW, size=size, mode="trilinear", align_corners=False)
