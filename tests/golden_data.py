"""Golden runs of the tokenizer without weights."""

from __future__ import annotations

import torch
from goldens import Run, compare, handles

from transfer1.diffusion.debug_tokenizer import DummyJointImageVideoTokenizer


@handles(("video_cond", "tokenizer"))
def check_tokenizer(run: Run) -> None:
    """Latents and reconstructions of a video and an image; the model's encode halves the latent."""
    inputs, outputs = run.group("input"), run.group("output")
    tokenizer = DummyJointImageVideoTokenizer(
        pixel_chunk_duration=inputs["video"].shape[2],
        latent_chunk_duration=outputs["latent"].shape[2],
        latent_ch=outputs["latent"].shape[1],
    )
    latent = tokenizer.encode(inputs["video"])
    image_latent = tokenizer.encode(inputs["image"])
    actual = {
        "latent": latent,
        "model_encode": latent * 0.5,
        "decoded": thin(tokenizer.decode(latent), outputs["decoded"].shape[2]),
        "image_latent": image_latent,
        "image_decoded": tokenizer.decode(image_latent),
    }
    assert set(outputs) <= set(actual), f"unknown outputs: {sorted(set(outputs) - set(actual))}"
    for name, expected in outputs.items():
        compare(actual[name], expected, name)


def thin(video_BCFYX: torch.Tensor, frames: int) -> torch.Tensor:
    """Take every s-th frame, so that `frames` remain: long outputs are recorded with gaps."""
    return video_BCFYX[:, :, :: -(-video_BCFYX.shape[2] // frames)]
