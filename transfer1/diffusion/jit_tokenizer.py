"""The released video tokenizer: TorchScript encoder and decoder, latents standardised.

Shapes: B batch, F frames, Y X pixel rows and columns; K latent channels, T H W latent frames, rows
and columns; n chunks of P frames (latents of Q frames).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from transfer1.diffusion.tokenizer import VideoTokenizer


class JITVideoTokenizer(VideoTokenizer):
    """Encodes a video in chunks of `pixel_chunk_duration` frames, each on its own.

    A chunk of P frames gives Q = (P - 1) / t + 1 latent frames; latents are (encoder(x) - mean) /
    std with one mean and one std per channel and latent frame of the chunk.

    Args:
        enc_fp, dec_fp: TorchScript files of the encoder and the decoder.
        mean_std_fp: file of a pair (mean, std), each with K * at least Q values.
        latent_ch: K.
        is_bf16: run encoder and decoder in bfloat16, otherwise in float32.
        spatial_compression_factor, temporal_compression_factor: of the released files.
        pixel_chunk_duration: P.
        max_enc_batch_size, max_dec_batch_size: chunks that go through the network together.
        spatial_resolution, name: say in messages which released files these are.

    Raises:
        ValueError: a file is missing or unfit, or P is not 1 + a multiple of t.
    """

    def __init__(
        self,
        enc_fp: str,
        dec_fp: str,
        mean_std_fp: str,
        latent_ch: int = 16,
        is_bf16: bool = True,
        spatial_compression_factor: int = 8,
        temporal_compression_factor: int = 8,
        pixel_chunk_duration: int = 121,
        max_enc_batch_size: int = 8,
        max_dec_batch_size: int = 4,
        spatial_resolution: str = "720",
        name: str = "cosmos_1_0_diffusion_tokenizer",
    ) -> None:
        if pixel_chunk_duration < 1 or (pixel_chunk_duration - 1) % temporal_compression_factor:
            raise ValueError(
                f"tokenizer.pixel_chunk_duration={pixel_chunk_duration}: give 1 + a multiple of "
                f"temporal_compression_factor={temporal_compression_factor}"
            )
        self.title = f"{name} ({spatial_resolution})"
        self.latent_ch = latent_ch
        self.spatial_compression_factor = spatial_compression_factor
        self.temporal_compression_factor = temporal_compression_factor
        self.pixel_chunk_duration = pixel_chunk_duration
        self.latent_chunk_duration = (pixel_chunk_duration - 1) // temporal_compression_factor + 1
        self.max_enc_batch_size = max_enc_batch_size
        self.max_dec_batch_size = max_dec_batch_size
        self.dtype = torch.bfloat16 if is_bf16 else torch.float32
        self._encoder = self._load_network(enc_fp, "enc_fp")
        self._decoder = self._load_network(dec_fp, "dec_fp")
        self._mean, self._std = self._load_moments(mean_std_fp)

    @torch.no_grad()
    def encode(self, video_BCFYX: torch.Tensor) -> torch.Tensor:
        self.check_video(video_BCFYX)
        chunks = split_frames(video_BCFYX, self.pixel_chunk_duration)
        latents = self._run(self._encoder, chunks.to(self.dtype), self.max_enc_batch_size)
        expected = [self.latent_ch, self.latent_chunk_duration]
        if list(latents.shape[1:3]) != expected:
            raise ValueError(
                f"tokenizer {self.title}: the encoder gives {list(latents.shape[1:3])} channels "
                f"and frames for a chunk, the configuration says {expected}"
            )
        latents = (latents.float() - self._mean.to(latents.device)) / self._std.to(latents.device)
        return join_frames(latents, video_BCFYX.shape[0]).to(video_BCFYX.dtype)

    @torch.no_grad()
    def decode(self, latent_BKTHW: torch.Tensor) -> torch.Tensor:
        self.check_latent(latent_BKTHW)
        chunks = split_frames(latent_BKTHW, self.latent_chunk_duration).float()
        chunks = chunks * self._std.to(chunks.device) + self._mean.to(chunks.device)
        video = self._run(self._decoder, chunks.to(self.dtype), self.max_dec_batch_size)
        return join_frames(video, latent_BKTHW.shape[0]).to(latent_BKTHW.dtype)

    @classmethod
    def count_latent_frames(cls, options: Any, num_pixel_frames: int) -> int:
        duration = options.pixel_chunk_duration
        chunks = whole_chunks(num_pixel_frames, duration, "a video", duration)
        return chunks * ((duration - 1) // options.temporal_compression_factor + 1)

    def get_pixel_num_frames(self, num_latent_frames: int) -> int:
        duration = self.pixel_chunk_duration
        return duration * whole_chunks(
            num_latent_frames, self.latent_chunk_duration, "a latent", duration
        )

    @staticmethod
    def _run(network: torch.nn.Module, chunks: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Run the network over [n, ...] in batches, on the device of the chunks."""
        network.to(chunks.device)
        outputs = [network(batch) for batch in chunks.split(batch_size)]
        return torch.cat([out[0] if isinstance(out, tuple) else out for out in outputs])

    def _load_network(self, path: str, option: str) -> torch.nn.Module:
        self._require(path, option)
        try:
            network = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer.{option}={path}: not a TorchScript file ({error})"
            ) from error
        return network.to(self.dtype).eval()

    def _load_moments(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and std, float32 [1, K, Q, 1, 1]."""
        self._require(path, "mean_std_fp")
        K, Q = self.latent_ch, self.latent_chunk_duration
        try:
            moments = torch.load(path, map_location="cpu", weights_only=True)
            sizes = [moment.numel() for moment in moments]
        except Exception as error:  # a foreign file may fail in nearly any way
            raise ValueError(
                f"tokenizer.mean_std_fp={path}: not a pair of tensors ({error})"
            ) from error
        if len(sizes) != 2 or any(size % K or size < K * Q for size in sizes):
            raise ValueError(
                f"tokenizer.mean_std_fp={path}: holds tensors of {sizes} values; expected two "
                f"(mean, std), each of latent_ch={K} rows of at least {Q} latent frames"
            )
        mean, std = (m.float().reshape(K, -1)[:, :Q].reshape(1, K, Q, 1, 1) for m in moments)
        return mean, std

    def _require(self, path: str, option: str) -> None:
        if not Path(path).is_file():
            raise ValueError(
                f"tokenizer.{option}={path}: no such file. Download encoder.jit, decoder.jit and "
                f"mean_std.pt of {self.title}, or choose the built-in tokenizer=vae1"
            )


def whole_chunks(frames: int, duration: int, what: str, pixel_chunk_duration: int) -> int:
    """Return how many chunks of `duration` frames there are; ValueError unless they are whole."""
    if frames < 1 or frames % duration:
        raise ValueError(
            f"tokenizer: {what} of {frames} frames; give a multiple of {duration} "
            f"(tokenizer.pixel_chunk_duration={pixel_chunk_duration})"
        )
    return frames // duration


def split_frames(clip_BCTHW: torch.Tensor, duration: int) -> torch.Tensor:
    """Cut the frame axis into chunks: [B, C, c*duration, H, W] -> [B*c, C, duration, H, W]."""
    B, C, T, H, W = clip_BCTHW.shape
    chunks = clip_BCTHW.reshape(B, C, T // duration, duration, H, W).transpose(1, 2)
    return chunks.reshape(-1, C, duration, H, W)


def join_frames(chunks_nCTHW: torch.Tensor, batch: int) -> torch.Tensor:
    """Undo `split_frames`: [B*c, C, T, H, W] -> [B, C, c*T, H, W]."""
    _, C, T, H, W = chunks_nCTHW.shape
    return chunks_nCTHW.reshape(batch, -1, C, T, H, W).transpose(1, 2).reshape(batch, C, -1, H, W)
