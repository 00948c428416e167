"""Samples with controls: of every kind, several at once, and whoever loads them the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import moving_square, write_controls, write_dataset, write_text, write_video
from test_dataset import AUGMENTATION, assert_equal, build
from torch.utils.data import DataLoader

from transfer1.data.dataset import TransferDataset
from transfer1.data.sampler import SampleKey, StreamSampler


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with the files of every control."""
    lengths = {"a": 20, "bb": 26, "ccc": 9}
    return write_controls(write_dataset(tmp_path_factory.mktemp("controlled"), lengths))


def rank_stream(dataset: TransferDataset, rank: int, world_size: int) -> Iterator[SampleKey]:
    """What one of several processes loads: every world_size-th sample of the one stream."""
    sampler = StreamSampler(dataset)
    sampler.start(seed=4, position=0)
    return itertools.islice(iter(sampler), rank, None, world_size)


@pytest.mark.parametrize(("workers", "world_size"), [(0, 2), (1, 3), (2, 1)])
def test_samples_depend_neither_on_workers_nor_on_world_size(
    controlled: Path, workers: int, world_size: int
) -> None:
    """The sample of (seed, epoch, index) is one and the same; global generators play no part."""
    hint_key, count = "control_input_vis_seg_upscale", 6  # two epochs of three clips
    dataset = build(controlled, hint_key=hint_key, augmentation=AUGMENTATION)
    np.random.seed(0), torch.manual_seed(0)
    expected = [dataset[key] for key in itertools.islice(rank_stream(dataset, 0, 1), count)]
    assert len({s[hint_key].numpy().tobytes() for s in expected}) == count
    np.random.seed(99), torch.manual_seed(99)
    for rank in range(world_size):
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=rank_stream(dataset, rank, world_size),  # type: ignore[arg-type]
            num_workers=workers,
        )
        for i, sample in zip(range(rank, count, world_size), loader, strict=False):
            assert_equal(sample, expected[i])


@pytest.mark.parametrize("is_train", [True, False])
def test_several_controls_are_stacked_as_each_alone(controlled: Path, is_train: bool) -> None:
    names = ["keypoint", "edge", "seg", "depth", "vis"]
    options = {"is_train": is_train, "augmentation": AUGMENTATION if is_train else None}
    together = build(controlled, hint_key=f"control_input_{'_'.join(names)}", **options)
    key = SampleKey(1, 5, 4)
    stacked = together[key]
    hint = stacked[f"control_input_{'_'.join(names)}"]
    assert hint.shape == (15, 9, 32, 64) and hint.dtype == torch.uint8
    for name, control in zip(names, hint.split(3), strict=True):
        alone = build(controlled, hint_key=f"control_input_{name}", **options)[key]
        assert torch.equal(alone["video"], stacked["video"])
        assert torch.equal(alone[f"control_input_{name}"], control), name
    assert isinstance(stacked["segmentation_phrase_all"], str)


def test_weights_of_controls(controlled: Path) -> None:
    options = {"hint_key": "control_input_edge_depth", "control_weight": [0.3, 0.9]}
    assert build(controlled, **options)[0]["control_weight"].tolist() == pytest.approx([0.3, 0.9])
    assert "control_weight" not in build(controlled)[0]
    with pytest.raises(ValueError, match=r"control_weight=\[1.0\]: .* 2 numbers.*edge, depth"):
        build(controlled, hint_key="control_input_edge_depth", control_weight=[1.0])


def test_options_of_a_control(controlled: Path) -> None:
    """The people of the files score 0.9."""
    shown, hidden = (
        build(
            controlled,
            hint_key="control_input_keypoint",
            is_train=False,
            control_options={"keypoint": {"kpt_thr": threshold}},
        )[0]["control_input_keypoint"]
        for threshold in (0.85, 0.95)
    )
    assert shown.any() and not hidden.any()


def test_all_controls_show_the_part_that_upscale_shows(tmp_path: Path) -> None:
    """A large video is cut at random; a stored control that equals it is cut alike."""
    large = cv2.resize(moving_square(1)[0], (1440, 1080), interpolation=cv2.INTER_CUBIC)
    write_video(tmp_path / "videos" / "a.mp4", np.stack([large] * 2))
    write_text(tmp_path / "t5_xxl" / "a.pickle", [np.ones((3, 1024), np.float32)])
    (tmp_path / "depth").symlink_to(tmp_path / "videos")
    options = {"num_frames": 1, "hint_key": "control_input_depth_upscale", "resolution": [88, 120]}
    dataset = build(tmp_path, **options)
    samples = [dataset[SampleKey(0, 0, position)] for position in range(3)]
    for sample in samples:
        depth, upscale = sample["control_input_depth_upscale"].split(3)
        assert torch.equal(depth, sample["video"])
        assert (upscale.float() - depth.float()).abs().mean() < 3
    assert not torch.equal(samples[0]["video"], samples[1]["video"])
    assert samples[0]["image_size"].tolist() == [88, 120, 88, 120]  # 704 x 960 of 1080 x 1440
    shown = build(tmp_path, is_train=False, control_strength="low", **options)[0]
    assert not torch.equal(shown["video"], samples[0]["video"])


def test_folders_per_camera(tmp_path: Path) -> None:
    """Driving data: a folder per camera, texts as .pkl in nested dicts, one per recording."""
    write_dataset(tmp_path, {"drive_0": 9, "drive_1": 9})
    for name in ("videos", "t5_xxl"):
        (tmp_path / name).rename(tmp_path / "flat")
        (tmp_path / name).mkdir()
        (tmp_path / "flat").rename(tmp_path / name / "pinhole_front")
    for text in (tmp_path / "t5_xxl" / "pinhole_front").iterdir():
        text.unlink()
    array = np.full((4, 1024), 7, np.float32)
    nested = {"pickle": {"ground_truth": {"embeddings": {"t5_xxl": array}}}}
    write_text(tmp_path / "t5_xxl" / "pinhole_front" / "drive.pkl", nested)
    (tmp_path / "hdmap").symlink_to(tmp_path / "videos")
    with pytest.raises(ValueError, match="it has the folders pinhole_front: choose one with view="):
        build(tmp_path, hint_key="control_input_hdmap")
    with pytest.raises(ValueError, match=r"has no folder videos.side"):
        build(tmp_path, hint_key="control_input_hdmap", view="side")
    dataset = build(tmp_path, hint_key="control_input_hdmap", view="pinhole_front")
    sample = dataset[0]
    assert (sample["t5_text_embeddings"][:4] == 7).all()
    assert torch.equal(sample["control_input_hdmap"], sample["video"])


def test_a_drawn_video_stands_for_a_missing_pickle(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"a": 20})
    (tmp_path / "seg").symlink_to(tmp_path / "videos")
    sample = build(tmp_path, hint_key="control_input_seg", is_train=False)[0]
    assert torch.equal(sample["control_input_seg"], sample["video"])
    assert sample["segmentation_phrase_all"] == ""
