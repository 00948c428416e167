"""Edge control, resizing and padding equal the recorded values; text is padded and checked."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from clips import moving_square, real_clip
from goldens import COMMITTED, Run, find_runs

from transfer1.data.controls import Edge, build_controls, shrink_to_grid
from transfer1.data.resize import (
    check_resolution,
    fit_size,
    nearest_aspect_ratio,
    pad,
    resize,
    target_size,
)
from transfer1.data.video import Video


def recorded(*kinds: str) -> list[Run]:
    """Recorded runs of the original's augmentors."""
    runs = [run for run in find_runs(COMMITTED) if run.case == "augmentors" and run.kind in kinds]
    assert runs, f"no recorded run of {kinds}"
    return runs


def frames_of(clip_CTHW: torch.Tensor) -> np.ndarray:
    return clip_CTHW.permute(1, 2, 3, 0).numpy()


class FixedDraws(np.random.Generator):
    """Hands out given integers instead of random ones; each must be one that could be drawn."""

    def __init__(self, *values: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.values = list(values)

    def integers(self, low: int, high: int) -> int:  # type: ignore[override]
        value = self.values.pop(0)
        assert low <= value < high, f"{value} is outside [{low}, {high})"
        return value


# Edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", recorded("edge"), ids=str)
def test_golden_edge_presets(run: Run) -> None:
    clip = run.other("clip").group("input")["video"]
    edge = Edge(run.spec["preset"])
    assert Edge.THRESHOLDS[edge.preset] == tuple(run.spec["thresholds"])
    expected = run.group("output")["channel0"].numpy()
    actual = edge(frames_of(clip), None)
    assert actual.shape == (*expected.shape, 1) and expected.any()
    np.testing.assert_array_equal(actual[..., 0], expected)


@pytest.mark.parametrize("run", recorded("edge_random"), ids=str)
def test_golden_edge_of_drawn_thresholds(run: Run) -> None:
    clip = run.other("clip").group("input")["video"]
    lower, upper = run.spec["thresholds"]
    actual = Edge()(frames_of(clip), FixedDraws(lower, upper - lower))
    np.testing.assert_array_equal(actual[..., 0], run.group("output")["channel0"].numpy())


def test_drawn_thresholds_have_the_recorded_range() -> None:
    draws = [Edge.draw_thresholds(np.random.default_rng(seed)) for seed in range(500)]
    lower, upper = np.array(draws).T
    assert lower.min() == 20 and lower.max() == 99
    assert upper.max() <= 255 and (upper - lower).min() == 50 and (upper - lower).max() == 149
    table = Run("augmentors", "edge_random_thresholds", COMMITTED).group("value")["lower_upper"]
    for low, high in table.tolist():
        assert 20 <= low < 100 and 50 <= high - low < 150


def test_edge_of_a_clip_is_the_edge_of_its_frames() -> None:
    clip = moving_square(3)
    together = Edge("low")(clip, None)
    for frame, expected in zip(clip, together, strict=True):
        np.testing.assert_array_equal(Edge("low")(frame[None], None)[0], expected)


def test_frames_are_shrunk_to_the_grid_and_never_enlarged() -> None:
    small = moving_square(1)
    assert shrink_to_grid(small) is small
    large = np.zeros((1, 960, 1536, 3), np.uint8)
    assert shrink_to_grid(large).shape == (1, 704, 1126, 3)
    assert Edge()(large, None).shape == (1, 704, 1126, 1)


def test_golden_shrinking() -> None:
    for run in recorded("resize_frames"):
        frame = frames_of(run.other("clip").group("input")["video"])[:1]
        shrunk = shrink_to_grid(np.tile(frame, (1, 20, 24, 1)))
        outputs = run.group("output")
        assert shrunk.mean() == pytest.approx(outputs["mean"].item(), abs=1e-3)
        np.testing.assert_array_equal(shrunk[:, ::16, ::16], frames_of(outputs["strided16"]))


def test_edge_of_a_real_clip_is_like_the_released_one() -> None:
    """Preset medium against the edge video shipped beside the clip, which was compressed since."""
    frames = Video(real_clip("example1_input_video.mp4")).read(range(0, 121, 40))
    shipped = Video(real_clip("example1_edge.mp4")).read(range(0, 121, 40))[..., 0] > 127
    edges = Edge("medium")(frames, None)[..., 0] > 127
    near = np.stack([cv2.dilate(e.astype(np.uint8), np.ones((3, 3), np.uint8)) for e in edges]) > 0
    near_shipped = (
        np.stack([cv2.dilate(e.astype(np.uint8), np.ones((3, 3), np.uint8)) for e in shipped]) > 0
    )
    found, right = (
        (shipped & near).sum() / shipped.sum(),
        (edges & near_shipped).sum() / edges.sum(),
    )
    assert found > 0.9 and right > 0.9, f"{found:.3f} of the shipped edges found, {right:.3f} right"


def test_unknown_control_and_preset_are_named() -> None:
    with pytest.raises(ValueError, match=r"hint_key=control_input_x: choose one of .*input_edge"):
        build_controls("control_input_x")
    with pytest.raises(ValueError, match=r"control_strength=strong: choose one of none, very_low"):
        build_controls("control_input_edge", "strong")


# Resize and pad -----------------------------------------------------------------------------------


@pytest.mark.parametrize("run", recorded("resize_pad"), ids=str)
def test_golden_resize_and_pad(run: Run) -> None:
    clip, expected = run.group("input")["video"], run.group("output")
    width, height = run.spec["size_wh"]
    size = fit_size(tuple(clip.shape[-2:]), (height, width))
    resized = resize(clip, size)
    padded, mask = pad(resized, (height, width))
    assert [height, width, *size] == expected["image_size"].tolist()
    for actual, name in ((resized, "resized"), (padded, "padded"), (mask, "padding_mask")):
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=f"{run}: {name}")


def test_target_sizes() -> None:
    assert [nearest_aspect_ratio(*size) for size in ((720, 1280), (480, 640), (640, 480))] == [
        "16,9",
        "4,3",
        "3,4",
    ]
    assert target_size("720", 272, 640) == (704, 1280)
    assert target_size("720", 500, 500) == (960, 960)
    assert target_size([128, 224], 272, 640) == (128, 224)
    for wrong in ("480", [128], [0, 224], [128, 224, 3]):
        with pytest.raises(ValueError, match=r"resolution=.*'720', or give \[height, width\]"):
            check_resolution(wrong)
