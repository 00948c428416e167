"""Frames come out exactly, wherever reading starts, and bad files are named."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
from clips import moving_square, real_clip, write_video

from transfer1.data.video import Video

CODECS = {
    "b_frames": ("libx264", {"g": "10", "bf": "3", "crf": "12"}),
    "open_gop": ("libx264", {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}),
    "hevc": ("libx265", {"x265-params": "open-gop=1:keyint=8:bframes=3:log-level=none"}),
    "one_key_frame": ("libx264", {"crf": "12"}),
}


def decode_first(path: Path, count: int | None) -> np.ndarray:
    """The first frames of a file, decoded from its start; None = all."""
    with av.open(str(path)) as container:
        frames = itertools.islice(container.decode(video=0), count)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def decode_all(path: Path) -> np.ndarray:
    return decode_first(path, None)


@pytest.mark.parametrize("codec", CODECS)
def test_windows_equal_decoding_from_the_start(codec: str, tmp_path: Path) -> None:
    name, options = CODECS[codec]
    path = write_video(tmp_path / "clip.mp4", moving_square(40), name, options)
    everything, video = decode_all(path), Video(path)
    assert (video.num_frames, video.height, video.width, video.fps) == (40, 48, 64, 25.0)
    assert len({frame.tobytes() for frame in everything}) == 40, "frames must be told apart"
    for start in range(36):
        np.testing.assert_array_equal(
            video.read(range(start, start + 4)), everything[start : start + 4]
        )
    np.testing.assert_array_equal(video.read([3, 9, 38]), everything[[3, 9, 38]])
    np.testing.assert_array_equal(video.read(), everything)


def test_mp4_is_read_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_square(40), *CODECS["b_frames"])
    expected = decode_all(path)[30:33]
    monkeypatch.setattr(Video, "_read_from_start", lambda *_: pytest.fail("decoded from the start"))
    np.testing.assert_array_equal(Video(path).read([30, 31, 32]), expected)


@pytest.mark.parametrize(
    ("suffix", "codec", "container"),
    [(".mkv", "libx264", None), (".avi", "mpeg4", None), (".mp4", "libx264", "mpegts")],
)
def test_other_containers_are_decoded_from_the_start(
    suffix: str, codec: str, container: str | None, tmp_path: Path
) -> None:
    path = write_video(tmp_path / f"clip{suffix}", moving_square(24), codec, {"g": "8"}, container)
    everything, video = decode_all(path), Video(path)
    assert video.num_frames == 24
    np.testing.assert_array_equal(video.read([5, 11, 23]), everything[[5, 11, 23]])


def test_header_without_frame_count(tmp_path: Path) -> None:
    """A fragmented mp4 reports 0 frames."""
    path = tmp_path / "clip.mp4"
    fragmented = {"movflags": "frag_keyframe+empty_moov"}
    write_video(path, moving_square(20), options={"g": "8"}, container_options=fragmented)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    video = Video(path)
    assert video.num_frames == 20
    np.testing.assert_array_equal(video.read([17]), decode_all(path)[[17]])


def test_variable_frame_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "6", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for t, image in enumerate(moving_square(24)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = t + 3 * (t // 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    np.testing.assert_array_equal(Video(path).read([13, 14, 15]), decode_all(path)[13:16])


def test_bad_files_are_named(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mp4", moving_square(30))
    empty, broken, cut, text = (tmp_path / f"{n}.mp4" for n in ("empty", "broken", "cut", "text"))
    empty.write_bytes(b"")
    broken.write_bytes(good.read_bytes()[:500])
    text.write_text("not a video")
    with pytest.raises(ValueError, match=r"empty\.mp4: the file is empty .*remove it"):
        Video(empty)
    for path in (broken, text):
        with pytest.raises(
            ValueError, match=rf"{path.name}: cannot be read as a video .*remove it"
        ):
            Video(path)
    with pytest.raises(ValueError, match=r"absent\.mp4: no such video file"):
        Video(tmp_path / "absent.mp4")
    write_video(cut, moving_square(30), container_options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[:-2000])  # the header is in front, so it says what is missing
    with pytest.raises(ValueError, match=r"cut\.mp4: the file is cut off at \d+ of \d+ bytes"):
        Video(cut)


def test_damaged_frame_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_square(30), options={"g": "5", "crf": "1"})
    with av.open(str(path)) as container:
        entry = container.streams.video[0].index_entries[12]
        start, size = entry.pos, entry.size
    content = bytearray(path.read_bytes())
    content[start + 8 : start + size] = bytes(size - 8)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.mp4: .*(damaged|cannot be read).*remove it"):
        Video(path).read()


def test_indices_outside_the_file(tmp_path: Path) -> None:
    video = Video(write_video(tmp_path / "clip.mp4", moving_square(10)))
    for indices in ([10], [-1], [3, 2], []):
        with pytest.raises(ValueError, match=r"clip\.mp4: .*ascending indices in 0\.\.9"):
            video.read(indices)


@pytest.mark.parametrize(
    ("name", "size", "frames", "fps"),
    [
        ("example1_input_video.mp4", (480, 640), 121, 30.0),  # HEVC
        ("nurec2.mp4", (720, 1280), 122, 24.0),
    ],
)
def test_real_clips(name: str, size: tuple[int, int], frames: int, fps: float) -> None:
    video = Video(real_clip(name))
    assert (video.height, video.width, video.num_frames, video.fps) == (*size, frames, fps)
    window = video.read(range(20, 24))
    assert window.shape == (4, *size, 3)
    np.testing.assert_array_equal(window, decode_first(video.path, 24)[20:])
