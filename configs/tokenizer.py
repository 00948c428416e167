"""Group `tokenizer`: video to latents and back."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L

RELEASED = "checkpoints/nvidia/Cosmos-Tokenize1-CV8x8x8-720p"


def register() -> None:
    """Store the options of `tokenizer`."""
    store = ConfigStore.instance().store
    for name, node in (
        ("vae1", L("transfer1.diffusion.tokenizer.DCTVideoTokenizer")()),
        (
            "cosmos_diffusion_tokenizer_res720_comp8x8x8_t121_ver092624",
            L("transfer1.diffusion.jit_tokenizer.JITVideoTokenizer")(
                enc_fp=f"{RELEASED}/encoder.jit",
                dec_fp=f"{RELEASED}/decoder.jit",
                mean_std_fp=f"{RELEASED}/mean_std.pt",
                latent_ch=16,
                is_bf16=True,
                spatial_compression_factor=8,
                temporal_compression_factor=8,
                pixel_chunk_duration=121,
                max_enc_batch_size=8,
                max_dec_batch_size=4,
                spatial_resolution="720",
            ),
        ),
        (
            "debug_tokenizer",
            L("transfer1.diffusion.debug_tokenizer.DummyJointImageVideoTokenizer")(),
        ),
    ):
        store(group="tokenizer", package="model.tokenizer", name=name, node=node)
