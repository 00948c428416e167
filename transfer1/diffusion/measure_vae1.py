r"""Measure which coefficients the built-in tokenizer keeps, and write its table.

    python -m transfer1.data.demo --max-width 640 --out datasets/full
    python -m transfer1.diffusion.measure_vae1 datasets/full/train/videos/bikes_*.mp4 \
        --scale-with datasets/full/train/videos/carphone_*.mp4

All whole blocks of the videos, at their own size, are transformed. The coefficients with the
highest energy in the first videos are kept; their means and the scale are over all videos.
Channel 0 is the mean colour of the block. A coefficient that is constant in time has the same
channel in first frames and in groups, where both keep it.

Shapes: n blocks; a block [3, frames, size, size].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from transfer1.diffusion.tokenizer import OPPONENT_COLOURS, dct_matrix, table_name

TABLE = Path(__file__).with_name("vae1.json")
SIZES = ((8, 8), (4, 4))  # (frames, rows and columns) of a block
CHANNELS = 16

Position = tuple[int, int, int, int]  # colour, frame, row, column of a coefficient


class Moments:
    """Mean and mean square of the coefficients of blocks of one size, video by video."""

    def __init__(self, frames: int, size: int) -> None:
        self.frames, self.size = frames, size
        self.blocks: list[int] = []
        self.means: list[torch.Tensor] = []
        self.squares: list[torch.Tensor] = []

    def add(self, video_CFYX: torch.Tensor) -> None:
        """Add a video in [-1, 1]; frames, rows and columns beyond whole blocks are left out."""
        frames, size = self.frames, self.size
        groups, rows, columns = (
            n // block for n, block in zip(video_CFYX.shape[1:], (frames, size, size), strict=True)
        )
        mean = torch.zeros(3, frames, size, size, dtype=torch.float64)
        square = torch.zeros_like(mean)
        for i in range(groups):
            group = video_CFYX[:, i * frames : (i + 1) * frames, : rows * size, : columns * size]
            coefficients = torch.einsum(
                "kc,at,by,dx,ctiyjx->ijkabd",
                torch.tensor(OPPONENT_COLOURS),
                dct_matrix(frames).float(),
                dct_matrix(size).float(),
                dct_matrix(size).float(),
                group.reshape(3, frames, rows, size, columns, size),
            ).double()
            mean += coefficients.mean((0, 1)) / groups
            square += coefficients.square().mean((0, 1)) / groups
        self.blocks.append(groups * rows * columns)
        self.means.append(mean)
        self.squares.append(square)

    def strongest(self, number: int, videos: int) -> list[Position]:
        """Return the positions with the highest energy in the first `videos` videos, in order."""
        energy = sum(
            n * square for n, square in zip(self.blocks[:videos], self.squares, strict=False)
        )
        assert isinstance(energy, torch.Tensor)
        order = energy.flatten().argsort(descending=True)[:number].tolist()
        shape = tuple(energy.shape)
        positions = [map(int, np.unravel_index(i, shape)) for i in order]
        return [(colour, frame, row, column) for colour, frame, row, column in positions]

    def table(self, positions: Sequence[Position]) -> dict[str, Any]:
        """Return the positions, their means and one scale; every video has the same weight.

        One scale for all channels keeps the transform orthonormal up to a factor: an error of a
        latent is the same error of the pixels, whichever channel it is in.
        """
        mean = torch.stack(self.means).mean(0)
        variance = torch.stack(self.squares).mean(0) - mean.square()
        scale = sum(variance[p].item() for p in positions) / len(positions)
        rows = [[*p, round(mean[p].item(), 5)] for p in positions]
        return {"scale": round(scale**0.5, 5), "rows": rows}


def align(first: list[Position], group: list[Position]) -> list[Position]:
    """Order first-frame positions so that those shared with groups have the same channel."""
    rest = iter([position for position in first if position not in group])
    return [position if position in first else next(rest) for position in group]


def measure(videos: Sequence[Path], scale_with: Sequence[Path]) -> dict[str, Any]:
    """Return the tables for all block sizes."""
    moments = {(t, s): (Moments(1, s), Moments(t, s)) for t, s in SIZES}
    for path in (*videos, *scale_with):
        video = read_video(path)
        for first, group in moments.values():
            first.add(video)
            group.add(video)
    tables = {}
    for (frames, size), (first, group) in moments.items():
        kept = group.strongest(CHANNELS, len(videos))
        kept_first = align(first.strongest(CHANNELS, len(videos)), kept)
        tables[table_name(frames, size, CHANNELS)] = {
            "first": first.table(kept_first),
            "group": group.table(kept),
        }
    return tables


def read_video(path: Path) -> torch.Tensor:
    """Return all frames, float32 [3, F, Y, X] in [-1, 1]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the table of the built-in tokenizer.")
    parser.add_argument(
        "videos", nargs="+", type=Path, help="real videos to choose coefficients by"
    )
    parser.add_argument(
        "--scale-with",
        nargs="*",
        type=Path,
        default=[],
        help="further videos, for means and scale alone",
    )
    parser.add_argument(
        "--out", type=Path, default=TABLE, help="file to write (default: %(default)s)"
    )
    arguments = parser.parse_args()
    content = {
        "made_by": "python -m transfer1.diffusion.measure_vae1",
        "chosen_by": [video.name for video in arguments.videos],
        "scaled_with": [video.name for video in arguments.scale_with],
        "columns": "colour, frame, row, column, mean",
        "tables": measure(arguments.videos, arguments.scale_with),
    }
    text = json.dumps(content, indent=1)
    arguments.out.write_text(compact_rows(text) + "\n")
    print(f"{arguments.out}: written")


def compact_rows(text: str) -> str:
    """Put every innermost list of numbers on one line."""
    lines: list[str] = []
    for line in text.splitlines():
        joins = lines and (lines[-1].endswith("[") or lines[-1][-1] in "0123456789,")
        number = line.strip().rstrip(",").lstrip("-").replace(".", "").isdigit()
        if joins and (number or (line.strip() in ("]", "],") and lines[-1][-1].isdigit())):
            lines[-1] += (" " if lines[-1].endswith(",") else "") + line.strip()
        else:
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
