"""The built-in tokenizer on real video, and the class of the released one on small stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clips import moving_square, wheel_clip, write_video
from torch import nn

from transfer1.data import demo
from transfer1.data.resize import resize
from transfer1.data.video import Video
from transfer1.diffusion import measure_vae1
from transfer1.diffusion.debug_tokenizer import DummyJointImageVideoTokenizer
from transfer1.diffusion.jit_tokenizer import JITVideoTokenizer
from transfer1.diffusion.tokenizer import (
    OPPONENT_COLOURS,
    DCTVideoTokenizer,
    dct_matrix,
    read_tables,
    table_name,
)

FACTORS = (8, 4)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def dct_tokenizer(factor: int) -> DCTVideoTokenizer:
    return DCTVideoTokenizer(spatial_compression_factor=factor, temporal_compression_factor=factor)


def random_video(frames: int, height: int, width: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def psnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """In dB, for values in [-1, 1]."""
    return (10 * torch.log10(4 / (actual - expected).square().mean())).item()


# Built-in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", FACTORS)
def test_shapes_and_frame_counts(factor: int) -> None:
    tokenizer = dct_tokenizer(factor)
    video = random_video(1 + 2 * factor, 3 * factor, 5 * factor, batch=2)
    latent = tokenizer.encode(video)
    assert latent.shape == (2, 16, 3, 3, 5)
    assert tokenizer.decode(latent).shape == video.shape
    assert tokenizer.encode(video[:, :, :1]).shape == (2, 16, 1, 3, 5)
    assert tokenizer.latent_chunk_duration == 1 + 120 // factor
    for latent_frames in (1, 2, 7):
        frames = tokenizer.get_pixel_num_frames(latent_frames)
        assert tokenizer.get_latent_num_frames(frames) == latent_frames


@pytest.mark.parametrize("factor", FACTORS)
def test_causal_in_time(factor: int) -> None:
    """A latent frame depends on its own group of frames alone."""
    tokenizer, video = dct_tokenizer(factor), random_video(1 + 2 * factor, 16, 16)
    changed = video.clone()
    changed[:, :, 1 + factor :] += 0.5
    difference = (tokenizer.encode(changed) - tokenizer.encode(video)).abs().amax((0, 1, 3, 4))
    assert (difference[:2] == 0).all() and difference[2] > 0.1


@pytest.mark.parametrize("factor", FACTORS)
def test_latents_survive_a_round_trip(factor: int) -> None:
    """The kept coefficients are orthonormal: decoding and encoding again changes nothing."""
    tokenizer = dct_tokenizer(factor)
    latent = torch.randn(2, 16, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        tokenizer.encode(tokenizer.decode(latent)), latent, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("factor", FACTORS)
def test_definition(factor: int) -> None:
    """Every channel is the coefficient that its row in the table names, scaled."""
    video = random_video(1 + factor, factor, factor)
    latent = dct_tokenizer(factor).encode(video)[0, :, :, 0, 0].double()
    table = read_tables()[table_name(factor, factor, 16)]
    colours = torch.einsum(
        "kc,ctyx->ktyx", torch.tensor(OPPONENT_COLOURS, dtype=torch.float64), video[0].double()
    )
    for position, (part, frames) in enumerate(
        (("first", colours[:, :1]), ("group", colours[:, 1:]))
    ):
        coefficients = torch.einsum(
            "at,by,dx,ktyx->kabd",
            *(dct_matrix(n) for n in frames.shape[1:]),
            frames,
        )
        for channel, (colour, t, y, x, mean) in enumerate(table[part]["rows"]):
            expected = (coefficients[colour, t, y, x] - mean) / table[part]["scale"]
            assert latent[channel, position] == pytest.approx(expected.item(), abs=1e-4)


def test_transforms_are_orthonormal() -> None:
    for matrix in (dct_matrix(8), dct_matrix(1), torch.tensor(OPPONENT_COLOURS).double()):
        identity = torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-6)


def test_dtype_follows_the_input() -> None:
    """bfloat16 pixels are transformed in float32."""
    tokenizer, video = dct_tokenizer(8), random_video(9, 16, 16).bfloat16()
    latent = tokenizer.encode(video)
    assert latent.dtype == torch.bfloat16 == tokenizer.decode(latent).dtype
    torch.testing.assert_close(latent, tokenizer.encode(video.float()).bfloat16(), rtol=0, atol=0)


def test_wrong_inputs_are_named() -> None:
    tokenizer = dct_tokenizer(8)
    with pytest.raises(ValueError, match=r"a video of 8 frames; give 1 \+ a multiple of 8"):
        tokenizer.encode(random_video(8, 16, 16))
    with pytest.raises(ValueError, match=r"\[1, 3, 9, 12, 16\].*multiples of 8"):
        tokenizer.encode(random_video(9, 12, 16))
    with pytest.raises(ValueError, match=r"a latent of shape \[1, 8, 1, 2, 2\]; give \[B, 16, T"):
        tokenizer.decode(torch.zeros(1, 8, 1, 2, 2))
    with pytest.raises(ValueError, match=r"no table for 2x8x8-16.*choose 8x8x8-16 or 4x4x4-16"):
        DCTVideoTokenizer(temporal_compression_factor=2)
    with pytest.raises(ValueError, match=r"120 frames; give 1 \+ a multiple of 8"):
        DCTVideoTokenizer(pixel_chunk_duration=120)


# Reconstruction of clips that the tables were not measured on, in dB.
RECONSTRUCTION = {
    (8, "bikes"): 26.8,
    (4, "bikes"): 32.8,
    (8, "carphone"): 25.2,
    (4, "carphone"): 31.1,
}


@pytest.mark.parametrize(("factor", "name"), RECONSTRUCTION)
def test_reconstruction_of_held_out_video(
    factor: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "bikes":  # shot 2, at half its size
        frames = Video(wheel_clip("bikes.mp4")).read(range(76, 137))
    else:
        frames = Video(wheel_clip("carphone_pristine.mp4")).read(range(80, 120))
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2)
    clip = resize(clip, (136, 320)) if name == "bikes" else clip
    whole = 1 + (clip.shape[1] - 1) // factor * factor
    video = clip[None, :, :whole] / 127.5 - 1
    tokenizer = dct_tokenizer(factor)
    latent = tokenizer.encode(video)
    quality = psnr(tokenizer.decode(latent), video)
    with capsys.disabled():
        print(
            f"\nvae1 {factor}x{factor}x{factor} on held-out {name}, "
            f"{video.shape[4]}x{video.shape[3]}, {whole} frames: {quality:.2f} dB, "
            f"latent std {latent.std():.2f}"
        )
    assert quality >= RECONSTRUCTION[factor, name]
    assert 0.7 < latent.std() < 1.4


def test_measuring_a_table(tmp_path: Path) -> None:
    """The strongest coefficients come first, whatever the video."""
    path = write_video(tmp_path / "clip.mkv", moving_square(17, 32, 48))
    tables = measure_vae1.measure([path], [])
    assert tables.keys() == read_tables().keys()
    video = measure_vae1.read_video(path)
    for name, table in tables.items():
        first, group = table["first"]["rows"], table["group"]["rows"]
        assert len(first) == len(group) == 16
        assert group[0][:4] == first[0][:4] == [0, 0, 0, 0], name
    moments = measure_vae1.Moments(8, 8)
    moments.add(video)
    kept = moments.strongest(16, 1)
    energies = [moments.squares[0][position].item() for position in kept]
    assert energies == sorted(energies, reverse=True)
    assert tables["8x8x8-16"]["group"] == moments.table(kept)


@pytest.mark.slow
def test_the_tool_makes_the_committed_table(tmp_path: Path) -> None:
    wheel_clip("bikes.mp4")
    demo.prepare(tmp_path / "demo", max_width=640)  # as they ship
    content = json.loads(measure_vae1.TABLE.read_text())
    folder = tmp_path / "demo" / "train" / "videos"
    chosen_by, scaled_with = (
        [folder / n for n in content[k]] for k in ("chosen_by", "scaled_with")
    )
    tables = measure_vae1.measure(chosen_by, scaled_with)
    for name, table in content["tables"].items():
        for part, committed in table.items():
            measured = tables[name][part]
            assert measured["scale"] == pytest.approx(committed["scale"], rel=1e-3)
            torch.testing.assert_close(
                torch.tensor(measured["rows"]),
                torch.tensor(committed["rows"]),
                rtol=1e-3,
                atol=1e-3,
            )


def test_table_names_its_videos() -> None:
    content = json.loads(measure_vae1.TABLE.read_text())
    assert content["chosen_by"] and all("shot2" not in name for name in content["chosen_by"])
    shared = [row[:4] for row in content["tables"]["8x8x8-16"]["group"]["rows"]]
    first = [row[:4] for row in content["tables"]["8x8x8-16"]["first"]["rows"]]
    for channel, row in enumerate(shared):
        assert row not in first or first[channel] == row, "a shared coefficient has one channel"


# Released -----------------------------------------------------------------------------------------


class TinyEncoder(nn.Module):
    """Averages cells of 8 x 8 pixels and takes frames 0, 8, 16, ...; two latent channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, T, H, W = x[:, :, ::8].shape
        cells = x[:, :2, ::8].reshape(B, 2, T, H // 8, 8, W // 8, 8)
        return cells.mean(dim=6).mean(dim=4)


class TinyDecoder(nn.Module):
    """Repeats latents into cells; the third colour is the first. Gives a tuple, as some do."""

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(8, 2)], dim=2)
        video = frames.repeat_interleave(8, 3).repeat_interleave(8, 4)
        return torch.stack([video[:, 0], video[:, 1], video[:, 0]], dim=1), z


def released_files(folder: Path) -> dict[str, str]:
    paths = {name: str(folder / name) for name in ("encoder.jit", "decoder.jit", "mean_std.pt")}
    torch.jit.script(TinyEncoder()).save(paths["encoder.jit"])
    torch.jit.script(TinyDecoder()).save(paths["decoder.jit"])
    mean = torch.arange(2 * 5, dtype=torch.float32).reshape(1, 2, 5, 1, 1)
    torch.save((mean, mean + 2), paths["mean_std.pt"])
    return {
        "enc_fp": paths["encoder.jit"],
        "dec_fp": paths["decoder.jit"],
        "mean_std_fp": paths["mean_std.pt"],
    }


def test_released_layout(tmp_path: Path) -> None:
    files = released_files(tmp_path)
    tokenizer = JITVideoTokenizer(**files, latent_ch=2, is_bf16=False, pixel_chunk_duration=17)
    video = random_video(34, 16, 24, batch=2)
    latent = tokenizer.encode(video)
    assert tokenizer.latent_chunk_duration == 3 and latent.shape == (2, 2, 6, 2, 3)
    # The second chunk starts over: its first latent frame is frame 17, with the first mean and std.
    for position, frame, column in ((0, 0, 0), (2, 16, 2), (3, 17, 0), (4, 25, 1)):
        for channel in range(2):
            mean = video[:, channel, frame, :8, :8].mean((1, 2))
            offset = 5 * channel + column
            expected = (mean - offset) / (offset + 2)
            torch.testing.assert_close(latent[:, channel, position, 0, 0], expected)
    decoded = tokenizer.decode(latent)
    assert decoded.shape == video.shape
    torch.testing.assert_close(tokenizer.encode(decoded), latent)


def test_released_batches_and_precision(tmp_path: Path) -> None:
    files = released_files(tmp_path)
    video = random_video(17, 16, 16, batch=5)
    options = {"latent_ch": 2, "pixel_chunk_duration": 17}
    whole = JITVideoTokenizer(**files, **options, is_bf16=False)
    parts = JITVideoTokenizer(
        **files, **options, is_bf16=False, max_enc_batch_size=2, max_dec_batch_size=1
    )
    sizes: list[int] = []
    parts._encoder = Spy(parts._encoder, sizes)
    parts._decoder = Spy(parts._decoder, sizes)
    latent = whole.encode(video)
    torch.testing.assert_close(parts.encode(video), latent, rtol=0, atol=0)
    torch.testing.assert_close(parts.decode(latent), whole.decode(latent), rtol=0, atol=0)
    assert sizes == [2, 2, 1, 1, 1, 1, 1, 1]
    low = JITVideoTokenizer(**files, **options, is_bf16=True)
    assert low.encode(video).dtype == torch.float32
    torch.testing.assert_close(low.encode(video), latent, rtol=0.05, atol=0.05)


class Spy(nn.Module):
    """Notes the batch sizes that go through a network."""

    def __init__(self, network: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.network, self.sizes = network, sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(x.shape[0])
        return self.network(x)


def test_released_files_are_checked(tmp_path: Path) -> None:
    files = released_files(tmp_path)
    options = {"latent_ch": 2, "pixel_chunk_duration": 17}
    with pytest.raises(ValueError, match=r"enc_fp=absent\.jit: no such file.*tokenizer=vae1"):
        JITVideoTokenizer(**{**files, "enc_fp": "absent.jit"}, **options)
    with pytest.raises(ValueError, match=r"dec_fp=.*mean_std\.pt: not a TorchScript file"):
        JITVideoTokenizer(**{**files, "dec_fp": files["mean_std_fp"]}, **options)
    (tmp_path / "text.pt").write_text("not tensors")
    with pytest.raises(ValueError, match=r"mean_std_fp=.*text\.pt: not a pair of tensors"):
        JITVideoTokenizer(**{**files, "mean_std_fp": str(tmp_path / "text.pt")}, **options)
    with pytest.raises(ValueError, match=r"mean_std_fp=.*\[10, 10\] values.*latent_ch=2 rows"):
        JITVideoTokenizer(**files, latent_ch=2, pixel_chunk_duration=49)
    with pytest.raises(ValueError, match=r"pixel_chunk_duration=18: give 1 \+ a multiple"):
        JITVideoTokenizer(**files, latent_ch=2, pixel_chunk_duration=18)
    tokenizer = JITVideoTokenizer(**files, **options)
    with pytest.raises(ValueError, match=r"a video of 18 frames; give a multiple of 17"):
        tokenizer.encode(random_video(18, 16, 16))


def test_dummy_tokenizer_takes_whole_chunks() -> None:
    tokenizer = DummyJointImageVideoTokenizer()
    assert tokenizer.get_latent_num_frames(34) == 6 and tokenizer.get_latent_num_frames(1) == 1
    with pytest.raises(ValueError, match=r"18 frames; give 1 or a multiple of 17"):
        tokenizer.encode(random_video(18, 16, 16))
