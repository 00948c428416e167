"""How many training clips one worker makes in a second, for every control.

    python -m bench.data [--video FILE] [--frames N] [--control NAME ...] [--json FILE]
    python -m bench.data --blurs [--video FILE]

A clip is decoded, its control made, both resized to the 720 frame, in one thread as in a worker of
the loader. Without --video, one of 1280 x 720 is made up. Stored controls are stand-ins of the same
size: the video itself, five masks, two people. `--blurs` shows what the faster blurs of `vis` cost
in fidelity.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch

from transfer1.data.controls import CONTROLS, StoredControl
from transfer1.data.controls.blur import Bilateral, Blur, Gaussian
from transfer1.data.controls.rle import encode
from transfer1.data.controls.vis import Softening
from transfer1.data.dataset import TransferDataset
from transfer1.data.sampler import SampleKey
from transfer1.data.text import T5_CHANNELS
from transfer1.data.video import Video

from .timing import describe, machine, markdown

HEIGHT, WIDTH = 720, 1280
EXACT = "vis, exact"
COLUMNS: dict[str, Callable[[Any], str]] = {
    "control": str,
    "s per clip": "{:.2f}".format,
    "slowest": "{:.2f}".format,
    "clips/s": "{:.3f}".format,
    "decoding": "{:.0%}".format,
}
BLUR_COLUMNS: dict[str, Callable[[Any], str]] = {
    "blurs": str,
    "downscale": str,
    "factor": str,
    "exact s per frame": "{:.3f}".format,
    "fast s per frame": "{:.3f}".format,
    "PSNR": "{:.1f}".format,
}
BLURS: dict[str, list[Blur]] = {
    "bilateral": [Bilateral(30, 150, 100)],
    "bilateral x 3": [Bilateral(20, 120, 60, 3)],
    "bilateral x 2 + gaussian": [Bilateral(45, 250, 140, 2), Gaussian()],
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.data", description=(__doc__ or "").split("\n")[0]
    )
    names = [*CONTROLS, EXACT]
    parser.add_argument("--video", type=Path, help="a video to use, best of 720 lines")
    parser.add_argument("--frames", type=int, default=121, help="frames per clip (%(default)s)")
    parser.add_argument("--samples", type=int, default=5, help="clips per control (%(default)s)")
    parser.add_argument("--control", nargs="+", choices=names, default=names[:-1], metavar="NAME")
    parser.add_argument("--blurs", action="store_true", help="compare the blurs of vis instead")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    facts = machine("cpu") | {"opencv": cv2.__version__}
    print(describe(facts), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        video = options.video or made_up_video(Path(folder) / "made_up.mp4", options.frames)
        if options.blurs:
            rows, columns = time_blurs(video), BLUR_COLUMNS
        else:
            write_dataset(Path(folder), video)
            rows, columns = [], COLUMNS
            for name in options.control:
                rows.append(time_control(Path(folder), name, options.frames, options.samples))
                print(f"{name}: {rows[-1]['s per clip']:.2f} s per clip", file=sys.stderr)
    print(markdown(rows, columns))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


def time_control(folder: Path, name: str, frames: int, samples: int) -> dict[str, Any]:
    """Row of one control: samples of different random draws, as training makes them."""
    exact = name == EXACT
    control = "vis" if exact else name
    dataset = TransferDataset(
        str(folder),
        frames,
        hint_key=f"control_input_{control}",
        control_options={"vis": {"exact": True}} if exact else None,
    )
    decoding = seconds(partial(dataset.clips[0].video.read, range(frames)))
    keys = [SampleKey(0, 0, position) for position in range(samples)]
    times = [seconds(partial(dataset.__getitem__, key)) for key in keys]
    reads = 1 + any(source.path.suffix == ".mp4" for source in dataset.clips[0].stored.values())
    mean = statistics.mean(times)
    return {
        "control": name,
        "s per clip": mean,
        "slowest": max(times),
        "clips/s": 1 / mean,
        "decoding": reads * decoding / mean,
    }


def time_blurs(video: Path) -> list[dict[str, Any]]:
    """Rows of blurs of one frame: exact and fast, and how much they differ."""
    frame = Video(video).read([0])
    rows = []
    for name, blurs in BLURS.items():
        for downscale in (1, 2):
            for factor in (4, 8, 16):
                softening = Softening(blurs, downscale, factor)
                exact, fast = softening(frame), softening.fast()(frame)
                error = np.square(exact.astype(float) - fast).mean()
                rows.append(
                    {
                        "blurs": name,
                        "downscale": downscale,
                        "factor": factor,
                        "exact s per frame": seconds(partial(softening, frame)),
                        "fast s per frame": seconds(partial(softening.fast(), frame)),
                        "PSNR": 10 * np.log10(255**2 / error) if error else float("inf"),
                    }
                )
    return rows


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def made_up_video(path: Path, frames: int) -> Path:
    """Write a video of a texture that drifts, 1280 x 720."""
    noise = np.random.default_rng(0).random((2 * HEIGHT, 2 * WIDTH, 3), np.float32)
    texture = sum(cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (2, 8, 32))
    low, high = np.percentile(texture, (1, 99))
    texture = np.clip((texture - low) / (high - low) * 255, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for t in range(frames):
            image = np.ascontiguousarray(texture[t : t + HEIGHT, 2 * t : 2 * t + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_dataset(folder: Path, source: Path) -> None:
    """Make a dataset of one clip, with a file of every stored control."""
    video = Video(source)
    for name in ("videos", *(c.folder for c in CONTROLS.values() if issubclass(c, StoredControl))):
        (folder / name).mkdir()
        if name not in ("seg", "keypoint"):
            (folder / name / "clip.mp4").symlink_to(source.resolve())
    shape = (video.num_frames, video.height, video.width)
    masks = []
    for i in range(5):
        mask = np.zeros(shape, bool)
        top, left = i * shape[1] // 8, i * shape[2] // 8
        mask[:, top : top + shape[1] // 3, left : left + shape[2] // 3] = True
        data = {"counts": encode(mask), "size": [mask.size, 1]}
        rle = {"data": data, "mask_shape": list(shape)}
        masks.append({"phrase": f"thing {i}", "segmentation_mask_rle": rle})
    points = np.random.default_rng(0).uniform(0.2, 1, (2, 133, 3))
    people = [{"body-keypoints": p[:91], "hand-keypoints": p[91:]} for p in points]
    (folder / "t5_xxl").mkdir()
    for path, content in (
        ("seg/clip.pickle", masks),
        ("keypoint/clip.pickle", dict.fromkeys(range(shape[0]), people)),
        ("t5_xxl/clip.pickle", [np.zeros((20, T5_CHANNELS), np.float32)]),
    ):
        (folder / path).write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    main()
