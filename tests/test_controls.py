"""Controls beyond the recorded runs: tables, ranges of draws, the fast vis, files and mistakes."""

from __future__ import annotations

import importlib.util
from typing import Any

import cv2
import numpy as np
import pytest
from clips import (
    moving_square,
    real_clip,
)
from goldens import COMMITTED, Run

from transfer1.data.controls import (
    CONTROLS,
    PRESETS,
    Edge,
    Upscale,
    Vis,
    build_controls,
    control_names,
    shrink_to_grid,
)
from transfer1.data.controls.blur import BLURS, Anisotropic, Bilateral, Gaussian, Guided
from transfer1.data.controls.vis import Softening
from transfer1.data.resize import (
    check_resolution,
    nearest_aspect_ratio,
    target_size,
)
from transfer1.data.video import Video


def values(name: str) -> dict[str, Any]:
    """A table recorded from the original."""
    return Run("augmentors", name, COMMITTED).group("value")


# Names --------------------------------------------------------------------------------------------


def test_several_controls_have_one_key() -> None:
    assert control_names("control_input_edge") == ["edge"]
    assert control_names("control_input_seg_edge_vis") == ["seg", "edge", "vis"]
    assert list(build_controls("control_input_depth_edge")) == ["depth", "edge"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("control_input_x",), r"hint_key=control_input_x: choose one of .*control_input_edge"),
        (("control_input_edge_edge",), "each once"),
        (("edge",), "hint_key=edge: choose one of"),
        (("control_input_edge", "strong"), "control_strength=strong: choose one of none, very_low"),
        (("control_input_edge", "low", {"vis": {}}), r"control_options\.vis: .* it has edge"),
        (("control_input_seg", "low", {"seg": {"colours": 3}}), r"control_options\.seg: .*colours"),
    ],
)
def test_wrong_controls_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_controls(*arguments)


def test_every_control_has_every_preset() -> None:
    for preset in PRESETS:
        for name in CONTROLS:
            assert build_controls(f"control_input_{name}", preset)[name].preset == preset


# Edge ---------------------------------------------------------------------------------------------


def test_drawn_thresholds_have_the_recorded_range() -> None:
    draws = [Edge.draw_thresholds(np.random.default_rng(seed)) for seed in range(500)]
    lower, upper = np.array(draws).T
    assert lower.min() == 20 and lower.max() == 99
    assert upper.max() <= 255 and (upper - lower).min() == 50 and (upper - lower).max() == 149
    for low, high in values("edge_random_thresholds")["lower_upper"].tolist():
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


def edge_f1(edges: np.ndarray, reference: np.ndarray) -> float:
    """F1 of edges bool [T, H, W] that may be a pixel apart."""
    square = np.ones((3, 3), np.uint8)
    near, near_reference = (
        np.stack([cv2.dilate(frame.astype(np.uint8), square) > 0 for frame in clip])
        for clip in (edges, reference)
    )
    precision = (edges & near_reference).sum() / edges.sum()
    recall = (reference & near).sum() / reference.sum()
    return 2 * precision * recall / (precision + recall)


def test_edge_of_a_real_clip_is_like_the_released_one() -> None:
    """Preset medium against the edge video shipped beside the clip, which was compressed since."""
    frames = Video(real_clip("example1_input_video.mp4")).read(range(0, 121, 40))
    shipped = Video(real_clip("example1_edge.mp4")).read(range(0, 121, 40))[..., 0] > 127
    f1 = {p: edge_f1(Edge(p)(frames, None)[..., 0] > 127, shipped) for p in ("low", "medium")}
    assert f1["medium"] > 0.99 and f1["low"] < 0.85, f1


# Vis ----------------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def test_drawn_blurs_have_the_ranges_of_the_original() -> None:
    draws = [Vis().draw(np.random.default_rng(seed)) for seed in range(600)]
    assert {d.factor for d in draws} == set(range(4, 18))
    assert {d.downscale for d in draws} == {1, 2, 3, 4}
    kinds = [tuple(type(blur) for blur in d.blurs) for d in draws]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert shares == pytest.approx(
        {(Bilateral,): 0.5, (Gaussian,): 0.3, (Bilateral, Gaussian): 0.2}, abs=0.06
    )
    bilateral = np.array(
        [
            (blur.d, blur.sigma_color, blur.sigma_space, blur.iterations)
            for d in draws
            for blur in d.blurs
            if isinstance(blur, Bilateral)
        ]
    )
    assert bilateral.min(0).tolist() == [15, 100, 50, 1]
    assert bilateral[:, [0, 3]].max(0).tolist() == [49, 3]
    assert (bilateral.max(0) < [50, 300, 150, 4]).all()
    gaussian = [blur for d in draws for blur in d.blurs if isinstance(blur, Gaussian)]
    assert {blur.ksize for blur in gaussian} == set(range(21, 30))
    assert all(10.5 <= blur.sigma < 14.5 for blur in gaussian)


@pytest.mark.parametrize("name", [name for name in BLURS if name != "anisotropic"])
def test_every_blur_can_be_drawn_alone(name: str) -> None:
    vis, clip = Vis(combinations={name: 1.0}), moving_square(2)
    first, again, other = (vis(clip, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == clip.shape and first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other) and first.std() > 0


def test_anisotropic_blur_says_what_it_needs() -> None:
    if importlib.util.find_spec("cv2") and hasattr(cv2, "ximgproc"):
        pytest.skip("this OpenCV has the contributed modules")
    with pytest.raises(ValueError, match="opencv-contrib-python-headless"):
        Anisotropic()(moving_square(1))


@pytest.mark.parametrize(
    ("combinations", "message"),
    [({"smear": 1.0}, "'smear' of 'smear' is no blur"), ({"median": 0.4}, "add up to 0.4")],
)
def test_wrong_combinations_are_named(combinations: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vis(combinations=combinations)


@pytest.mark.parametrize("downscale", [1, 2, 3])
def test_the_fast_way_is_near_the_exact_one(downscale: int) -> None:
    clip = cv2.resize(moving_square(1)[0], (320, 240), interpolation=cv2.INTER_CUBIC)[None]
    softening = Softening([Bilateral(20, 120, 60, 2), Gaussian()], downscale, factor=6)
    fast = softening.fast()
    assert (fast == softening) == (downscale == 3)
    assert psnr(fast(clip), softening(clip)) > 37
    assert psnr(softening(clip), clip) < 30, "the blur does nothing here"


def test_only_slow_blurs_are_approximated_and_only_in_training() -> None:
    for softening in (
        Softening([Gaussian()], 1, 6),
        Softening([Guided(), Gaussian()], 1, 6),
        Softening([Bilateral()], 1, 2),
    ):
        assert softening.fast() is softening
    clip = moving_square(1)
    for preset in PRESETS:
        np.testing.assert_array_equal(Vis(preset)(clip, None), Vis(preset, exact=True)(clip, None))


def test_vis_of_a_real_clip_is_like_the_released_one() -> None:
    """The vis video shipped beside the clip (compressed since) is the Gaussian of default size."""
    frames = Video(real_clip("example1_input_video.mp4")).read([0, 60])
    shipped = Video(real_clip("example1_vis.mp4")).read([0, 60])
    sizes = ((25, 12.5), (21, 10.5), (29, 14.5), (25, 5.0))
    alike = {size: psnr(Softening([Gaussian(*size)])(frames), shipped) for size in sizes}
    assert Gaussian() == Gaussian(*max(alike, key=lambda size: alike[size])), alike
    assert alike[25, 12.5] > 36, alike
    assert psnr(Vis("medium")(frames, None), shipped) > 30


# Upscale ------------------------------------------------------------------------------------------


def test_fractions_are_drawn_as_recorded() -> None:
    """The original drew with numpy's legacy generator of seeds 0, 1, ...; the same draws here."""
    for seed, expected in enumerate(values("upscale_random_scaler")["scaler"].tolist()):
        rng: Any = np.random.RandomState(seed)
        assert Upscale.draw_fraction(rng) == pytest.approx(expected)


def test_upscale_shows_a_random_part_and_shrinks_it() -> None:
    clip = np.tile(moving_square(1, 90, 160), (1, 9, 9, 1))  # 810 x 1440, larger than 704 x 1280
    upscale = Upscale()
    boxes = [upscale.reframe(clip.shape[1:3], np.random.default_rng(s)) for s in range(40)]
    assert {(box.height, box.width) for box in boxes} == {(704, 1280)}
    assert len({(box.top, box.left) for box in boxes}) > 30
    assert all(box.top <= 106 and box.left <= 160 for box in boxes)
    part = boxes[0](clip)
    control = upscale(part, np.random.default_rng(0))
    assert control.shape == part.shape and 10 < psnr(control, part) < 40
    assert abs(control.mean() - part.mean()) < 1


def test_upscale_of_a_small_video_keeps_its_frame() -> None:
    clip = moving_square(2)
    box = Upscale().reframe(clip.shape[1:3], np.random.default_rng(0))
    np.testing.assert_array_equal(box(clip), clip)
    assert Upscale()(clip, np.random.default_rng(0)).shape == clip.shape


# Frame sizes --------------------------------------------------------------------------------------


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
