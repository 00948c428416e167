"""Exact frame reading with PyAV.

Frame `i` of a file is the `i`-th frame in presentation order when the file is decoded from its start.
Files of the MP4 family whose header knows their frames are read by seeking to the key frame before
the first wanted frame and decoding forward; all others are decoded from the start.

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame

DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class _Index:
    """Timestamps of a file: of all frames in presentation order, and (pts, dts) of the key frames."""

    frames: list[int]
    key_frames: list[tuple[int, int]]


class Video:
    """One video file: its header, read at construction, and its frames, read on demand.

    Attributes:
        path: the file.
        num_frames: frames in the file (of the header; counted by decoding when the header has none).
        fps: average frame rate of the container, 24 if it has none.
        height, width: size in pixels.

    Raises:
        ValueError: the file is missing, empty, not a video, or has no frame. Names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such video file")
        if self.path.stat().st_size == 0:
            raise ValueError(f"{self.path}: the file is empty (0 bytes); copy it again or remove it")
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError(f"{self.path}: has no video stream; replace or remove it")
                stream = container.streams.video[0]
                self.width, self.height = stream.width, stream.height
                self.fps = float(stream.average_rate or DEFAULT_FPS)
                self.num_frames = stream.frames
                self._seekable = stream.frames > 0 and "mp4" in container.format.name.split(",")
        except av.FFmpegError as error:
            raise self._unreadable(error) from error
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
        found = self._read_seeking(wanted) or self._read_from_start(wanted)
        missing = [i for i in wanted if i not in found]
        if missing:
            raise ValueError(
                f"{self.path}: frame {missing[0]} of {self.num_frames} cannot be decoded; the file is "
                f"damaged: encode it again or remove it"
            )
        return np.stack([found[i] for i in wanted])

    def check(self) -> None:
        """Decode the first and the last frame.

        Raises:
            ValueError: one of them cannot be decoded (a truncated file, for example).
        """
        self.read([0])
        self.read([self.num_frames - 1])

    def _read_from_start(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode from the first frame up to the last wanted one."""
        chosen, found = set(wanted), {}
        for i, frame in enumerate(self._decode()):
            if i in chosen:
                found[i] = frame.to_ndarray(format="rgb24")
            if i == wanted[-1]:
                break
        return found

    def _read_seeking(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Decode from the last key frame shown no later than the first wanted frame.

        Returns nothing when the file has no usable index or a wanted frame did not come out.
        """
        if not self._seekable or self._index is None:
            return {}
        timestamps = self._index.frames
        position = {timestamps[i]: i for i in wanted}
        earlier = [key for key in self._index.key_frames if key[0] <= timestamps[wanted[0]]]
        if not earlier:
            return {}
        found = {}
        for frame in self._decode(seek_to=max(earlier)[1]):
            if frame.pts in position:
                found[position[frame.pts]] = frame.to_ndarray(format="rgb24")
                if len(found) == len(position):
                    return found
        return {}

    @cached_property
    def _index(self) -> _Index | None:
        """Timestamps from the packets, without decoding; None if they do not tell frames apart."""
        frames, key_frames = [], []
        try:
            with av.open(str(self.path)) as container:
                for packet in container.demux(container.streams.video[0]):
                    if packet.size == 0:
                        continue
                    if packet.pts is None or packet.dts is None or packet.is_discard:
                        return None
                    frames.append(packet.pts)
                    if packet.is_keyframe:
                        key_frames.append((packet.pts, packet.dts))
        except av.FFmpegError as error:
            raise self._unreadable(error) from error
        if len(set(frames)) != self.num_frames:
            return None
        return _Index(sorted(frames), key_frames)

    def _decode(self, seek_to: int | None = None) -> Iterator[VideoFrame]:
        """Yield frames in presentation order, from the key frame at decoding time `seek_to` on."""
        try:
            with av.open(str(self.path)) as container:
                assert isinstance(container, InputContainer)
                stream = container.streams.video[0]
                if seek_to is not None:
                    container.seek(seek_to, stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.is_corrupt:
                        raise ValueError(
                            f"{self.path}: a frame at {frame.time} s is damaged; encode the file again "
                            f"or remove it"
                        )
                    yield frame
        except av.FFmpegError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.path}: cannot be read as a video ({error}); encode it again or remove it"
        )
