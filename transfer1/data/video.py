"""Exact frame reading with PyAV.

Frame `i` of a file is the `i`-th frame in presentation order when the file is decoded from its
start. Files of the MP4 family whose header knows their frames are read by seeking to the key frame
before the first wanted frame and decoding forward; all others are decoded from the start.

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class _Index:
    """Timestamps of all frames in presentation order, and (pts, dts) of the key frames."""

    frames: list[int]
    key_frames: list[tuple[int, int]]


class Video:
    """One video file: its header, read at construction, and its frames, read on demand.

    Args:
        path: the file.
        keep_frames: decode the whole file at the first reading and keep it in memory.

    Attributes:
        path: the file.
        num_frames: frames in the file (counted by decoding when the header does not say).
        fps: average frame rate of the container, 24 if it has none.
        height, width: size in pixels.

    Raises:
        ValueError: the file is missing, empty, not a video, or has no frame. Names the file.
    """

    def __init__(self, path: str | Path, keep_frames: bool = False) -> None:
        self.path = Path(path)
        self.keep_frames = keep_frames
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such video file")
        if self.path.stat().st_size == 0:
            raise ValueError(
                f"{self.path}: the file is empty (0 bytes); copy it again or remove it"
            )
        with self._open() as (container, stream):
            self.width, self.height = stream.width, stream.height
            self.fps = float(stream.average_rate or DEFAULT_FPS)
            self._seekable = stream.frames > 0 and "mp4" in container.format.name.split(",")
            # Entries live as long as the container is open.
            entries = stream.index_entries if self._seekable else ()
            self.num_frames = sum(not entry.is_discard for entry in entries)
            end = max((entry.pos + entry.size for entry in entries), default=0)
        size = self.path.stat().st_size
        if end > size:
            raise ValueError(
                f"{self.path}: the file is cut off at {size} of {end} bytes; copy it again or "
                f"remove it"
            )
        if self.num_frames == 0:
            self.num_frames = sum(1 for _ in self._decode())
        if self.num_frames == 0:
            raise ValueError(f"{self.path}: contains no frame; replace or remove it")

    def read(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """Return the frames at `indices` (ascending; None = all), uint8 [T, H, W, 3].

        Raises:
            ValueError: an index outside the file, or a frame that cannot be decoded.
        """
        wanted = list(range(self.num_frames)) if indices is None else [int(i) for i in indices]
        if not wanted or wanted[0] < 0 or wanted[-1] >= self.num_frames or wanted != sorted(wanted):
            raise ValueError(
                f"{self.path}: frames {wanted} are asked for; give ascending indices in "
                f"0..{self.num_frames - 1}"
            )
        if self.keep_frames:
            return self._all_frames[wanted]
        return self._decode_wanted(wanted)

    def probe(self) -> None:
        """Raise ValueError unless the first frame can be decoded."""
        self._decode_wanted([0])

    @cached_property
    def _all_frames(self) -> np.ndarray:
        return self._decode_wanted(list(range(self.num_frames)))

    def _decode_wanted(self, wanted: Sequence[int]) -> np.ndarray:
        found = self._read_seeking(wanted) if self._seekable else {}
        found = found or self._read_from_start(wanted)
        missing = [i for i in wanted if i not in found]
        if missing:
            raise ValueError(
                f"{self.path}: frame {missing[0]} of {self.num_frames} cannot be decoded; the file "
                f"is damaged: encode it again or remove it"
            )
        return np.stack([found[i] for i in wanted])

    def _read_from_start(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode from the first frame up to the last wanted one."""
        chosen, found = set(wanted), {}
        for i, frame in enumerate(self._decode()):
            self._check(frame)
            if i in chosen:
                found[i] = frame.to_ndarray(format="rgb24")
            if i == wanted[-1]:
                break
        return found

    def _read_seeking(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode from the last key frame shown no later than the first wanted frame.

        Returns nothing when the file has no usable index or a wanted frame did not come out.
        """
        if self._index is None:
            return {}
        timestamps = self._index.frames
        position = {timestamps[i]: i for i in wanted}
        earlier = [key for key in self._index.key_frames if key[0] <= timestamps[wanted[0]]]
        if not earlier:
            return {}
        key_pts, key_dts = max(earlier)
        found: dict[int, np.ndarray] = {}
        for frame in self._decode(seek_to=key_dts):
            if frame.pts is None or frame.pts < key_pts:
                continue  # refers to frames before the key frame, which were not decoded
            self._check(frame)
            if frame.pts in position:
                found[position[frame.pts]] = frame.to_ndarray(format="rgb24")
            if len(found) == len(position):
                return found
        return {}

    @cached_property
    def _index(self) -> _Index | None:
        """Timestamps from the packets, without decoding; None if they do not tell frames apart."""
        frames, key_frames = [], []
        with self._open() as (container, stream):
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.pts is None or packet.dts is None:
                    return None
                if not packet.is_discard:
                    frames.append(packet.pts)
                if packet.is_keyframe:
                    key_frames.append((packet.pts, packet.dts))
        distinct = sorted(set(frames))
        return _Index(distinct, key_frames) if len(distinct) == self.num_frames else None

    def _decode(self, seek_to: int | None = None) -> Iterator[VideoFrame]:
        """Yield frames in presentation order, from the key frame at decoding time `seek_to` on."""
        with self._open() as (container, stream):
            if seek_to is not None:
                container.seek(seek_to, stream=stream, backward=True)
            yield from container.decode(stream)

    def _check(self, frame: VideoFrame) -> None:
        """Raise ValueError if the decoder had to invent parts of the frame."""
        if frame.is_corrupt:
            raise ValueError(
                f"{self.path}: the frame at {frame.time} s is damaged; encode the file again or "
                f"remove it"
            )

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        """Open the container and its first video stream; what FFmpeg refuses is a ValueError."""
        import av  # slow to import, and whoever composes a configuration imports this module

        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.path}: has no video stream; replace or remove it")
                yield container, container.streams.video[0]
        except av.FFmpegError as error:
            raise ValueError(
                f"{self.path}: cannot be read as a video ({error}); encode it again or remove it"
            ) from error
