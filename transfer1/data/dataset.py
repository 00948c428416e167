"""Clips of the dataset folder as training samples.

Layout of the folder: `videos/<name>.mp4`, `t5_xxl/<name>.pickle` (a list with one
array [n, 1024]), and for a control that is stored, `<control folder>/<name>.mp4`.

Shapes: F frames, H rows, W columns, M text tokens, C text channels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch.utils.data import Dataset

from transfer1.data.augment import Augmentation
from transfer1.data.controls import build_control
from transfer1.data.resize import Resolution, check_resolution, fit_size, pad, resize, target_size
from transfer1.data.sampler import SampleKey, keyed_rng
from transfer1.data.text import T5_CHANNELS, T5_TOKENS, pad_text, read_text_embedding
from transfer1.data.video import Video

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm")


@dataclass(frozen=True)
class Clip:
    """One usable clip: its video, the stored control where there is one, and its text pickle."""

    name: str
    video: Video
    control: Video | None
    text: Path


class TransferDataset(Dataset[dict[str, Any]]):
    """Windows of `num_frames` frames with their control, text and sizes.

    All clips are examined once, at construction: one that is broken, too short, without text, or
    not as long as its stored control is unusable. Unusable clips are logged with their reason and
    left out; no clip ever stands in for another.

    Args:
        dataset_dir: folder of the layout above.
        num_frames: frames per sample.
        resolution: "720" (one frame size per aspect ratio) or [height, width] in pixels.
        hint_key: key of the control in the sample, a row of `transfer1.data.controls.CONTROLS`.
        is_train: draw the window, the control's strength and the augmentation at random; otherwise
            the window starts at frame 0 and the control has `control_strength`.
        augmentation: what else to change at random in training; None changes nothing.
        control_strength: preset of the control when `is_train` is off.
        max_unusable_fraction: largest share of unusable clips with which a run may start.
        cache_frames: keep the decoded frames of every clip in memory (small datasets).
        num_text_tokens: length to which text embeddings are padded or cut.
        text_channels: channels of the text embeddings.
        fps: frame rate that every sample reports, so that clips of different rates share a batch;
            None reports that of the clip.

    Raises:
        ValueError: missing or empty folder, too many unusable clips (each named with its reason),
            or a wrong option.
    """

    def __init__(
        self,
        dataset_dir: str,
        num_frames: int,
        resolution: Resolution = "720",
        hint_key: str = "control_input_edge",
        is_train: bool = True,
        augmentation: Augmentation | None = None,
        control_strength: str = "medium",
        max_unusable_fraction: float = 0.0,
        cache_frames: bool = False,
        num_text_tokens: int = T5_TOKENS,
        text_channels: int = T5_CHANNELS,
        fps: float | None = None,
    ) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: give 1 or more")
        if fps is not None and fps <= 0:
            raise ValueError(f"fps={fps}: give more than 0 frames per second, or null")
        if not is_train and augmentation is not None:
            raise ValueError("augmentation needs is_train=True; leave it out of validation data")
        check_resolution(resolution)
        self.dataset_dir = Path(dataset_dir)
        self.num_frames = num_frames
        self.resolution = resolution
        self.hint_key = hint_key
        self.is_train = is_train
        self.augmentation = augmentation or Augmentation(random_start=is_train)
        self.control = build_control(hint_key, control_strength)
        self.num_text_tokens = num_text_tokens
        self.text_channels = text_channels
        self.fps = fps
        self.cache_frames = cache_frames
        self._cache: dict[Path, np.ndarray] = {}
        self.clips, self.unusable = self._examine()
        self._report(max_unusable_fraction)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """Return one sample.

        A plain index stands for `SampleKey(index, seed=0, position=index)`.

        Returns:
            video, `<hint_key>`: uint8 [3, F, H, W]; t5_text_embeddings: float32 [M, C];
            t5_text_mask: int64 [M]; fps: float32 []; num_frames: int64 []; image_size: float32 [4]
            (height and width of the frame, then of the resized clip in it); padding_mask: float32
            [1, H, W], 1 = padding; frame_start, frame_end: int64 [], of the window, end exclusive;
            clip_name: str.
        """
        index, seed, position = key if isinstance(key, SampleKey) else (key, 0, key)
        clip = self.clips[index]
        rng = partial(keyed_rng, seed, position)
        window = self.augmentation.window(clip.video.num_frames, self.num_frames, rng("window"))
        view = self.augmentation.view(rng("view"))
        frames = view(self._read(clip.video, window))
        stored = view(self._read(clip.control, window)) if clip.control else None
        control = self.control(frames, stored, rng("control") if self.is_train else None)

        target = target_size(self.resolution, *frames.shape[1:3])
        size = fit_size((frames.shape[1], frames.shape[2]), target)
        video, padding_mask = pad(resize(to_tensor(frames), size), target)
        hint, _ = pad(resize(to_tensor(control), size), target)
        embedding, text_mask = pad_text(
            read_text_embedding(clip.text, self.text_channels), self.num_text_tokens
        )
        return {
            "video": video,
            self.hint_key: hint.expand_as(video),
            "t5_text_embeddings": embedding,
            "t5_text_mask": text_mask,
            "fps": torch.tensor(self.fps or clip.video.fps / window.step),
            "num_frames": torch.tensor(self.num_frames),
            "image_size": torch.tensor([*target, *size], dtype=torch.float32),
            "padding_mask": padding_mask,
            "frame_start": torch.tensor(window[0]),
            "frame_end": torch.tensor(window[-1] + 1),
            "clip_name": clip.name,
        }

    def _read(self, video: Video, window: range) -> np.ndarray:
        """Return the frames of a window, uint8 [F, H, W, 3], from memory if they are kept there."""
        if not self.cache_frames:
            return video.read(window)
        if video.path not in self._cache:
            self._cache[video.path] = video.read()
        return self._cache[video.path][window.start : window.stop : window.step]

    def _examine(self) -> tuple[list[Clip], dict[str, str]]:
        """Return the usable clips, and the reason for each clip that is not."""
        folder = self.dataset_dir / "videos"
        layout = "expected videos/*.mp4 and t5_xxl/*.pickle in it"
        if not self.dataset_dir.is_dir():
            raise ValueError(f"dataset_dir={self.dataset_dir}: no such folder; {layout}")
        if not folder.is_dir():
            raise ValueError(f"dataset_dir={self.dataset_dir}: has no folder videos; {layout}")
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise ValueError(f"{folder}: contains no video; {layout}")
        clips: list[Clip] = []
        unusable: dict[str, str] = {}
        with ThreadPoolExecutor(8) as pool:
            for file, result in zip(files, pool.map(self._examine_clip, files), strict=True):
                if isinstance(result, Clip):
                    clips.append(result)
                else:
                    unusable[str(file)] = result
        return clips, unusable

    def _examine_clip(self, file: Path) -> Clip | str:
        """Return the clip of a video file, or the reason why it cannot be used."""
        try:
            video = Video(file)
            least = self.augmentation.least_frames(self.num_frames)
            if video.num_frames < least:
                raise ValueError(
                    f"{file}: has {video.num_frames} frames, but {least} are asked for; remove it "
                    f"or lower num_frames={self.num_frames}"
                )
            video.read([0])
            text = self.dataset_dir / "t5_xxl" / f"{file.stem}.pickle"
            read_text_embedding(text, self.text_channels)
            return Clip(file.stem, video, self._stored_control(video), text)
        except ValueError as error:
            return str(error)

    def _stored_control(self, video: Video) -> Video | None:
        """Return the stored control of a video, None for a control that is computed."""
        if self.control.folder is None:
            return None
        control = Video(self.dataset_dir / self.control.folder / video.path.name)
        control.read([0])
        if control.num_frames != video.num_frames:
            raise ValueError(
                f"{control.path}: has {control.num_frames} frames, but {video.path} has "
                f"{video.num_frames}; make the control again from this video, or remove both"
            )
        return control

    def _report(self, max_unusable_fraction: float) -> None:
        """Log the unusable clips; raise if they are more than the allowed share."""
        if not self.unusable:
            return
        total = len(self.clips) + len(self.unusable)
        share = len(self.unusable) / total
        reasons = "\n".join(f"  {reason}" for reason in self.unusable.values())
        message = (
            f"{self.dataset_dir}: {len(self.unusable)} of {total} clips cannot be used:\n{reasons}"
        )
        if share > max_unusable_fraction or not self.clips:
            raise ValueError(
                f"{message}\nThis share ({share:.3f}) is above max_unusable_fraction="
                f"{max_unusable_fraction}: repair or remove these clips, or raise the fraction to "
                f"train without them"
            )
        logger.warning(message)


def to_tensor(frames_THWC: np.ndarray) -> torch.Tensor:
    """Return frames uint8 [T, H, W, C] as a tensor [C, T, H, W]."""
    return torch.from_numpy(frames_THWC).permute(3, 0, 1, 2)
