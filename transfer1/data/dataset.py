"""Clips of the dataset folder as training samples.

Layout of the folder: `videos/<name>.mp4`, `t5_xxl/<name>.pickle` or `.pkl` (see
`transfer1.data.text`), and for a control that is stored, `<control folder>/<name>.mp4` or
`.pickle`. With several cameras, each of these folders has one per camera,
`videos/<view>/<name>.mp4`; there, a text without the last `_<digit>` of the name serves the pieces
of one recording.

Shapes: F frames, H rows, W columns, M text tokens, C text channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
from transfer1.data.controls import ComputedControl, Source, StoredControl, build_controls
from transfer1.data.resize import Resolution, check_resolution, fit_size, pad, resize, target_size
from transfer1.data.sampler import SampleKey, keyed_rng
from transfer1.data.text import T5_CHANNELS, T5_TOKENS, pad_text, read_text_embedding
from transfer1.data.video import Video

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm")
TEXT_SUFFIXES = (".pickle", ".pkl")


@dataclass(frozen=True)
class Clip:
    """One usable clip: its video, the stored controls by name, and its text pickle."""

    name: str
    video: Video
    stored: dict[str, Source]
    text: Path


class TransferDataset(Dataset[dict[str, Any]]):
    """Windows of `num_frames` frames with their controls, text and sizes.

    All clips are examined once, at construction: one that is broken, too short, without text, or
    not as long as its stored controls is unusable. Unusable clips are logged with their reason and
    left out; no clip ever stands in for another. All random draws of a sample are keyed by its
    position in the run: they depend neither on the worker nor on the process that loads it.

    Args:
        dataset_dir: folder of the layout above.
        num_frames: frames per sample.
        resolution: "720" (one frame size per aspect ratio) or [height, width] in pixels.
        hint_key: key of the control in the sample, `control_input_<name>` with a name of
            `transfer1.data.controls.CONTROLS`, or several names joined, as in
            `control_input_edge_depth`.
        is_train: draw the window, the control's strength and the augmentation at random; otherwise
            the window starts at frame 0 and the control has `control_strength`.
        augmentation: what else to change at random in training; None changes nothing.
        control_strength: preset of the controls when `is_train` is off.
        control_options: name of a control -> other arguments of its class.
        control_weight: how strongly each control acts, one number per control; None leaves it to
            the model.
        view: camera whose folders to read; None for a dataset without folders per camera.
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
        control_options: Mapping[str, Mapping[str, Any]] | None = None,
        control_weight: Sequence[float] | None = None,
        view: str | None = None,
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
        self.controls = build_controls(hint_key, control_strength, control_options)
        if control_weight is not None and len(control_weight) != len(self.controls):
            raise ValueError(
                f"control_weight={list(control_weight)}: hint_key={hint_key} takes "
                f"{len(self.controls)} numbers, one for each of {', '.join(self.controls)}"
            )
        self.control_weight = control_weight
        self.view = view or ""
        self.num_text_tokens = num_text_tokens
        self.text_channels = text_channels
        self.fps = fps
        self.open_video = partial(Video, keep_frames=cache_frames)
        self.clips, self.unusable = self._examine()
        self._report(max_unusable_fraction)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """Return one sample.

        A plain index stands for `SampleKey(index, seed=0, position=index)`.

        Returns:
            video: uint8 [3, F, H, W]; `<hint_key>`: uint8 [3 K, F, H, W] for K controls;
            control_weight: float32 [K], if given; t5_text_embeddings: float32 [M, C];
            t5_text_mask: int64 [M]; fps: float32 []; num_frames: int64 []; image_size: float32 [4]
            (height and width of the frame, then of the resized clip in it); padding_mask: float32
            [1, H, W], 1 = padding; frame_start, frame_end: int64 [], of the window, end exclusive;
            clip_name: str; and what a stored control adds (`StoredControl.text_keys`): str.
        """
        index, seed, position = key if isinstance(key, SampleKey) else (key, 0, key)
        clip = self.clips[index]
        rng = partial(keyed_rng, seed, position)
        window = self.augmentation.window(clip.video.num_frames, self.num_frames, rng("window"))
        view = self.augmentation.view(rng("view"))
        whole = clip.video.read(window)
        size, frames = (whole.shape[1], whole.shape[2]), view(whole)
        draws = {name: rng(f"control {name}") if self.is_train else None for name in self.controls}
        cuts: list[Callable[[np.ndarray], np.ndarray]] = [view]
        for name, control in self.controls.items():
            if box := control.reframe((frames.shape[1], frames.shape[2]), draws[name]):
                frames = box(frames)
                cuts.append(box)

        target = target_size(self.resolution, *frames.shape[1:3])
        fitted = fit_size((frames.shape[1], frames.shape[2]), target)
        video, padding_mask = pad(resize(to_tensor(frames), fitted), target)
        hints: list[torch.Tensor] = []
        text: dict[str, str] = {}
        for name, control in self.controls.items():
            if isinstance(control, ComputedControl):
                picture = control(frames, draws[name])
            else:
                drawn = clip.stored[name].draw(window, size, view.flip, draws[name])
                picture = drawn.frames
                for cut in cuts:
                    picture = cut(picture)
                text |= drawn.text
            hint, _ = pad(resize(to_tensor(picture), fitted), target)
            hints.append(hint.expand_as(video))
        embedding, text_mask = pad_text(
            read_text_embedding(clip.text, self.text_channels), self.num_text_tokens
        )
        sample = {
            "video": video,
            self.hint_key: torch.cat(hints),
            "t5_text_embeddings": embedding,
            "t5_text_mask": text_mask,
            "fps": torch.tensor(self.fps or clip.video.fps / window.step),
            "num_frames": torch.tensor(self.num_frames),
            "image_size": torch.tensor([*target, *fitted], dtype=torch.float32),
            "padding_mask": padding_mask,
            "frame_start": torch.tensor(window[0]),
            "frame_end": torch.tensor(window[-1] + 1),
            "clip_name": clip.name,
            **text,
        }
        if self.control_weight is not None:
            sample["control_weight"] = torch.tensor(self.control_weight, dtype=torch.float32)
        return sample

    def _examine(self) -> tuple[list[Clip], dict[str, str]]:
        """Return the usable clips, and the reason for each clip that is not."""
        folder = self.dataset_dir / "videos" / self.view
        layout = "expected videos/*.mp4 and t5_xxl/*.pickle in it"
        if not self.dataset_dir.is_dir():
            raise ValueError(f"dataset_dir={self.dataset_dir}: no such folder; {layout}")
        if not folder.is_dir():
            name = folder.relative_to(self.dataset_dir)
            raise ValueError(f"dataset_dir={self.dataset_dir}: has no folder {name}; {layout}")
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            views = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            hint = f"it has the folders {views}: choose one with view=NAME" if views else layout
            raise ValueError(f"{folder}: contains no video; {hint}")
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
            video = self.open_video(file)
            least = self.augmentation.least_frames(self.num_frames)
            if video.num_frames < least:
                raise ValueError(
                    f"{file}: has {video.num_frames} frames, but {least} are asked for; remove it "
                    f"or lower num_frames={self.num_frames}"
                )
            video.probe()
            text = self._text(file.stem)
            read_text_embedding(text, self.text_channels)
            stored = {
                name: self._stored_control(control, video)
                for name, control in self.controls.items()
                if isinstance(control, StoredControl)
            }
            return Clip(file.stem, video, stored, text)
        except ValueError as error:
            return str(error)

    def _text(self, name: str) -> Path:
        """Return the file with the text of a clip."""
        names = [name]
        if self.view:
            names.append(re.sub(r"_\d$", "", name))
        return self._first("t5_xxl", [n + suffix for n in names for suffix in TEXT_SUFFIXES])

    def _stored_control(self, control: StoredControl, video: Video) -> Source:
        """Open the stored control of a video."""
        names = [video.path.stem + suffix for suffix in control.suffixes]
        source = control.open(self._first(control.folder, names), self.open_video)
        if source.num_frames != video.num_frames:
            raise ValueError(
                f"{source.path}: has {source.num_frames} frames, but {video.path} has "
                f"{video.num_frames}; make the control again from this video, or remove both"
            )
        return source

    def _first(self, folder: str, names: Sequence[str]) -> Path:
        """Return the first of some files that exists; the first of all if none does."""
        paths = [self.dataset_dir / folder / self.view / name for name in names]
        return next((path for path in paths if path.is_file()), paths[0])

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
