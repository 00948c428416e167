"""What the network is told about a clip.

Letters: B batch, C latent channels, T H W latent frames/rows/columns, M context tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class DataType(Enum):
    """Whether a batch holds single images or clips."""

    IMAGE = "image"
    VIDEO = "video"


@dataclass(frozen=True)
class Condition:
    """Everything that conditions one denoising call; change it with `dataclasses.replace`."""

    context: Tensor  # text embeddings [B, M, channels]
    context_mask: Tensor | None = None  # [B, M]; carried along, attention never uses it
    fps: Tensor | None = None  # frames per second [B]
    num_frames: Tensor | None = None  # pixel frames [B]
    image_size: Tensor | None = None  # target height, width, original height, width in pixels [B, 4]
    padding_mask: Tensor | None = None  # [B, 1, height, width] in pixels, 1 = padded
    video_cond_bool: bool | None = None  # whether the given frames are shown to the network
    data_type: DataType = DataType.VIDEO
    gt_latent: Tensor | None = None  # clean latent [B, C, T, H, W]
    frame_indicator: Tensor | None = None  # [1, 1, T, 1, 1], 1 = frame is given
    frame_mask: Tensor | None = None  # input channel [B, 1, T, H, W], 1 = frame is given
    augment_sigma: Tensor | None = None  # c_noise of the noise on the given frames [B]
    pose: Tensor | None = None  # camera pose channels [B, channels, T, H, W]
