"""Samples of the dataset folder, their reproducible draws, and unusable clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import moving_square, write_dataset, write_text, write_video
from torch.utils.data import DataLoader

from transfer1.data.augment import Augmentation, View
from transfer1.data.controls import Edge
from transfer1.data.dataset import TransferDataset
from transfer1.data.loader import build_dataloader
from transfer1.data.sampler import SampleKey, StreamSampler
from transfer1.data.video import Video

SIZE = [32, 64]
AUGMENTATION = Augmentation(flip_probability=0.5, min_crop=0.6, frame_strides=[1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips"), {"a": 20, "bb": 26, "ccc": 9})


def build(folder: Path, **options: Any) -> TransferDataset:
    return TransferDataset(str(folder), **{"num_frames": 9, "resolution": SIZE, **options})


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[name], rtol=0, atol=0, msg=name)
        else:
            assert value == b[name], name


def test_sample(folder: Path) -> None:
    sample = build(folder, is_train=False, control_strength="low")[1]
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in sample.items() if torch.is_tensor(v)}
    assert shapes == {
        "video": ((3, 9, 32, 64), torch.uint8),
        "control_input_edge": ((3, 9, 32, 64), torch.uint8),
        "t5_text_embeddings": ((512, 1024), torch.float32),
        "t5_text_mask": ((512,), torch.int64),
        "fps": ((), torch.float32),
        "num_frames": ((), torch.int64),
        "image_size": ((4,), torch.float32),
        "padding_mask": ((1, 32, 64), torch.float32),
        "frame_start": ((), torch.int64),
        "frame_end": ((), torch.int64),
    }
    assert sample["clip_name"] == "bb"
    assert sample["image_size"].tolist() == [32, 64, 32, 43]  # 48 x 64 fits as 32 x 43
    assert (sample["fps"], sample["num_frames"]) == (25, 9)
    assert (sample["frame_start"], sample["frame_end"]) == (0, 9)
    embedding = sample["t5_text_embeddings"]
    assert (embedding[:3] == 2).all() and (embedding[3:] == 0).all()
    assert sample["t5_text_mask"].all()
    inside = sample["padding_mask"][0] == 0
    assert inside[:, 10:53].all() and inside.sum() == 32 * 43


def test_named_resolution(folder: Path) -> None:
    sample = build(folder, num_frames=1, resolution="720", is_train=False)[0]
    assert sample["video"].shape == (3, 1, 704, 960)
    assert sample["image_size"].tolist() == [704, 960, 704, 939]


def test_without_resizing_the_pixels_are_the_file(folder: Path) -> None:
    dataset = build(folder, resolution=[48, 64], is_train=False, control_strength="low")
    frames = Video(folder / "videos" / "a.mp4").read(range(9))
    sample = dataset[0]
    np.testing.assert_array_equal(sample["video"].permute(1, 2, 3, 0).numpy(), frames)
    edges = Edge("low")(frames, None)[..., 0]
    assert edges.any()
    for channel in sample["control_input_edge"]:
        np.testing.assert_array_equal(channel.numpy(), edges)
    assert not sample["padding_mask"].any()


def test_draws_are_keyed(folder: Path) -> None:
    dataset = build(folder, augmentation=AUGMENTATION)
    samples = [dataset[SampleKey(1, 5, position)] for position in range(6)]
    assert_equal(samples[2], dataset[SampleKey(1, 5, 2)])
    assert len({s["video"].numpy().tobytes() for s in samples}) == 6
    other_seed = dataset[SampleKey(1, 6, 2)]
    assert not torch.equal(other_seed["video"], samples[2]["video"])
    assert_equal(dataset[1], dataset[SampleKey(1, 0, 1)])


def test_training_draws_window_and_thresholds(folder: Path) -> None:
    dataset = build(folder)
    samples = [dataset[SampleKey(1, 0, position)] for position in range(30)]
    starts = {int(s["frame_start"]) for s in samples}
    assert starts <= set(range(26 - 9 + 1)) and len(starts) > 10
    same_window = [s for s in samples if s["frame_start"] == samples[0]["frame_start"]]
    assert all(s["frame_end"] - s["frame_start"] == 9 for s in samples)
    assert all(torch.equal(s["video"], samples[0]["video"]) for s in same_window)
    assert len({s["control_input_edge"].sum().item() for s in samples}) > 10
    validation = build(folder, is_train=False)
    assert_equal(validation[SampleKey(1, 0, 3)], validation[SampleKey(1, 9, 7)])


def test_frame_strides(folder: Path) -> None:
    """Every second frame: 9 frames need 17, and the clip of 9 has too few."""
    dataset = build(
        folder,
        augmentation=Augmentation(frame_strides=[2]),
        resolution=[48, 64],
        max_unusable_fraction=0.5,
    )
    (reason,) = dataset.unusable.values()
    assert "ccc.mp4: has 9 frames, but 17 are asked for" in reason
    sample = dataset[SampleKey(0, 0, 0)]
    start = int(sample["frame_start"])
    frames = Video(folder / "videos" / "a.mp4").read(range(start, start + 17, 2))
    np.testing.assert_array_equal(sample["video"].permute(1, 2, 3, 0).numpy(), frames)
    assert sample["fps"] == 12.5 and sample["frame_end"] == start + 17


def test_reported_frame_rate(folder: Path) -> None:
    """One rate for clips of different rates, so that they can share a batch."""
    assert build(folder, fps=24.0)[0]["fps"] == 24
    with pytest.raises(ValueError, match=r"fps=0: give more than 0"):
        build(folder, fps=0)


def test_augmentation_is_the_same_for_video_and_control(folder: Path, tmp_path: Path) -> None:
    """A stored control that equals its video stays equal to it."""
    write_dataset(tmp_path, {"a": 20})
    (tmp_path / "depth").symlink_to(tmp_path / "videos")
    dataset = build(tmp_path, hint_key="control_input_depth", augmentation=AUGMENTATION)
    for position in range(8):
        sample = dataset[SampleKey(0, 1, position)]
        assert torch.equal(sample["video"], sample["control_input_depth"])


def test_views() -> None:
    frames = moving_square(2)
    np.testing.assert_array_equal(View(1.0, 0.3, 0.7, False)(frames), frames)
    np.testing.assert_array_equal(View(1.0, 0, 0, True)(frames), frames[:, :, ::-1])
    np.testing.assert_array_equal(View(0.5, 1.0, 0.0, False)(frames), frames[:, 24:, :32])
    rng = np.random.default_rng(0)
    views = [AUGMENTATION.view(rng) for _ in range(200)]
    assert all(0.6 <= view.share <= 1 for view in views)
    assert 70 < sum(view.flip for view in views) < 130


def test_windows_fit_the_clip() -> None:
    rng = np.random.default_rng(0)
    augmentation = Augmentation(frame_strides=[1, 3])
    windows = {augmentation.window(14, 5, rng) for _ in range(300)}
    assert windows == {range(s, s + 5) for s in range(10)} | {range(s, s + 13, 3) for s in range(2)}
    assert augmentation.window(5, 5, rng) == range(0, 5)
    assert Augmentation(frame_strides=[2]).least_frames(5) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_probability": 2}, "flip_probability=2: give 0 to 1"),
        ({"min_crop": 0}, "min_crop=0: give more than 0"),
        ({"frame_strides": []}, "frame_strides="),
        ({"frame_strides": [0, 1]}, "frame_strides="),
    ],
)
def test_wrong_augmentation_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


def test_frames_kept_in_memory_are_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(folder, augmentation=AUGMENTATION)
    cached = build(folder, augmentation=AUGMENTATION, cache_frames=True)
    keys = [SampleKey(position % 3, 3, position) for position in range(9)]
    for key in keys:
        assert_equal(plain[key], cached[key])
    monkeypatch.setattr(Video, "_decode", lambda *_: pytest.fail("decoded again"))
    for key in keys:
        cached[key]


def test_text_length_and_channels(folder: Path) -> None:
    sample = build(folder, num_text_tokens=2)[0]
    assert sample["t5_text_embeddings"].shape == (2, 1024)
    with pytest.raises(ValueError, match=r"a\.pickle: has shape \[3, 1024\]; .*\[n, 512\]"):
        build(folder, text_channels=512)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(folder: Path, workers: int) -> None:
    dataset = build(folder, augmentation=AUGMENTATION)
    sampler = StreamSampler(dataset)
    sampler.start(seed=4, position=2)
    loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers)
    batches = iter(loader)
    sampler.start(seed=4, position=2)
    keys = iter(sampler)
    for _ in range(3):
        batch = next(batches)
        assert batch["video"].shape == (2, 3, 9, 32, 64) and batch["fps"].shape == (2,)
        for row in range(2):
            sample = dataset[next(keys)]
            assert batch["clip_name"][row] == sample["clip_name"]
            assert torch.equal(batch["video"][row], sample["video"])
            assert torch.equal(batch["control_input_edge"][row], sample["control_input_edge"])


# Bad input ----------------------------------------------------------------------------------------


def test_workers_start_after_opencv_has_used_threads(folder: Path) -> None:
    """A forked worker that touched OpenCV's pool of threads would wait for them forever."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        cv2.bilateralFilter(np.zeros((512, 512, 3), np.uint8), 9, 75, 75)
        loader = build_dataloader(build(folder), batch_size=1, num_workers=1)
        loader.timeout = 60
        assert len(next(iter(loader))["video"]) == 1
    finally:
        cv2.setNumThreads(before)


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset_dir=.*absent: no such folder; expected videos"):
        build(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"dataset_dir=.*has no folder videos; expected videos"):
        build(tmp_path)
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match=r"videos: contains no video; expected videos"):
        build(tmp_path)


def spoil_short(folder: Path) -> str:
    write_video(folder / "videos" / "x.mp4", moving_square(8))
    return r"x\.mp4: has 8 frames, but 9 are asked for; remove it or lower num_frames=9"


def spoil_empty(folder: Path) -> str:
    (folder / "videos" / "x.mp4").write_bytes(b"")
    return r"x\.mp4: the file is empty"


def spoil_broken(folder: Path) -> str:
    (folder / "videos" / "x.mp4").write_bytes(b"no video" * 100)
    return r"x\.mp4: cannot be read as a video"


def spoil_missing_text(folder: Path) -> str:
    (folder / "t5_xxl" / "x.pickle").unlink()
    return r"x\.pickle: the text embedding is missing"


def spoil_text_shape(folder: Path) -> str:
    write_text(folder / "t5_xxl" / "x.pickle", [np.zeros((4, 77), np.float32)])
    return r"x\.pickle: has shape \[4, 77\]"


@pytest.mark.parametrize(
    "spoil", [spoil_short, spoil_empty, spoil_broken, spoil_missing_text, spoil_text_shape]
)
def test_unusable_clips_are_named_and_counted(
    spoil: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(tmp_path, {"a": 20, "b": 20, "c": 20, "x": 20})
    reason = spoil(tmp_path)
    with pytest.raises(ValueError, match="1 of 4 clips cannot be used:\n.*" + reason) as error:
        build(tmp_path)
    assert "above max_unusable_fraction=0.0" in str(error.value)
    with pytest.raises(ValueError, match=r"share \(0.250\) is above max_unusable_fraction=0.2"):
        build(tmp_path, max_unusable_fraction=0.2)
    dataset = build(tmp_path, max_unusable_fraction=0.25)
    assert [clip.name for clip in dataset.clips] == ["a", "b", "c"]
    ((file, message),) = dataset.unusable.items()
    assert file == str(tmp_path / "videos" / "x.mp4") and message


def test_a_run_never_starts_without_a_usable_clip(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"a": 5})
    with pytest.raises(ValueError, match="1 of 1 clips cannot be used"):
        build(tmp_path, max_unusable_fraction=1.0)


def test_control_must_be_as_long_as_its_video(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"a": 20, "b": 20})
    for name, frames in (("a", 19), ("b", 20)):
        write_video(tmp_path / "depth" / f"{name}.mp4", moving_square(frames))
    with pytest.raises(
        ValueError,
        match=r"depth.a\.mp4: has 19 frames, but .*videos.a\.mp4 has 20; make the control",
    ):
        build(tmp_path, hint_key="control_input_depth")
    (tmp_path / "depth" / "a.mp4").unlink()
    with pytest.raises(ValueError, match=r"depth.a\.mp4: no such video file"):
        build(tmp_path, hint_key="control_input_depth")
    dataset = build(tmp_path, hint_key="control_input_depth", max_unusable_fraction=0.5)
    assert dataset[0]["control_input_depth"].shape == (3, 9, 32, 64)


def test_a_clip_that_breaks_later_is_named_not_replaced(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"a": 20, "b": 20})
    dataset = build(tmp_path)
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.mp4"):
        dataset[0]


def test_wrong_options_are_named(folder: Path) -> None:
    for options, message in (
        ({"num_frames": 0}, "num_frames=0: give 1 or more"),
        ({"resolution": "480"}, "resolution='480'"),
        ({"hint_key": "edges"}, "hint_key=edges: choose one of"),
        ({"is_train": False, "augmentation": AUGMENTATION}, "augmentation needs is_train=True"),
    ):
        with pytest.raises(ValueError, match=message):
            build(folder, **options)
