"""Controls that are drawn from files: masks, points of people, and the mistakes such files have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import mask_entry, moving_square, person, write_text, write_video
from golden_controls import GivenMasks
from goldens import COMMITTED, Run
from test_controls import values

from transfer1.data.controls import Keypoint, Seg
from transfer1.data.controls.rle import decode, encode, run_lengths
from transfer1.data.controls.seg import PALETTE, Mask
from transfer1.data.controls.skeleton import COCO_WHOLEBODY, OPENPOSE, Skeleton, mirror, to_openpose
from transfer1.data.video import Video

# Segmentation -------------------------------------------------------------------------------------


def test_palette_is_the_recorded_one() -> None:
    np.testing.assert_array_equal(PALETTE, values("palette")["predefined_colors"])


def test_run_lengths_of_any_mask_are_read() -> None:
    rng = np.random.default_rng(0)
    for share in (0, 0.001, 0.3, 0.999, 1):
        mask = (rng.random((4, 30, 50)) < share).astype(np.uint8)
        runs = run_lengths(encode(mask))
        np.testing.assert_array_equal(decode(runs, 0, mask.size), mask.reshape(-1))
        np.testing.assert_array_equal(decode(runs, 1500, 4500), mask[1:3].reshape(-1))


@pytest.mark.parametrize("counts", ["", "a b", "Y", b"\x00\x01", "0O"])
def test_wrong_run_lengths_are_refused(counts: str | bytes) -> None:
    with pytest.raises(ValueError, match="counts"):
        run_lengths(counts)


def test_seg_file(tmp_path: Path) -> None:
    """Larger masks are painted first; outside training all of them, in fixed colours."""
    small, large = np.zeros((2, 5, 12, 16), np.uint8)
    small[:, 2:6, 2:6], large[:, 1:10, 1:12] = 1, 1
    entries = [mask_entry(small, "cup"), mask_entry(large, "table")]
    source = Seg().open(write_text(tmp_path / "a.pickle", entries))
    assert source.num_frames == 5
    drawn = source.draw(range(0, 5, 2), (48, 64), False, None)
    assert drawn.text == {"segmentation_phrase_all": "cup;table"}
    assert drawn.frames.shape == (3, 12, 16, 3)
    assert (drawn.frames[:, 3, 3] == PALETTE[1]).all()
    assert (drawn.frames[:, 8, 8] == PALETTE[0]).all()
    assert not drawn.frames[:, 11].any()
    trained = {
        source.draw(range(5), (48, 64), False, np.random.default_rng(s)).text[
            "segmentation_phrase_all"
        ]
        for s in range(40)
    }
    assert trained == {"", "cup", "table", "cup;table", "table;cup"}


def test_at_most_so_many_masks_are_painted() -> None:
    control = Seg(num_masks_max=2)
    mask = Mask("x", (1, 2, 2), np.array([0, 4]))
    source = GivenMasks([mask] * 9, control)
    phrases = [
        source.draw(range(1), (2, 2), False, np.random.default_rng(s)).text.popitem()[1]
        for s in range(30)
    ]
    assert {phrase.count("x") for phrase in phrases} == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("phrase"), r"mask 0: KeyError 'phrase'; expected a list of"),
        (
            lambda entry: entry["segmentation_mask_rle"].update(mask_shape=[5, 12, 17]),
            r"mask 0 has size \[960, 1\] for the shape \[5, 12, 17\]; expected \[1020, 1\]",
        ),
        (
            lambda entry: entry["segmentation_mask_rle"]["data"].update(counts="l0"),
            "mask 0 codes 28 pixels, but its size is 960",
        ),
        (
            lambda entry: entry["segmentation_mask_rle"]["data"].update(counts="P"),
            "mask 0: its counts are not run lengths",
        ),
    ],
)
def test_wrong_seg_files_are_named(change: Any, message: str, tmp_path: Path) -> None:
    entry = mask_entry(np.zeros((5, 12, 16), np.uint8))
    change(entry)
    with pytest.raises(ValueError, match=r"a\.pickle: " + message):
        Seg().open(write_text(tmp_path / "a.pickle", [entry]))
    with pytest.raises(ValueError, match=r"b\.pickle: holds an empty list; expected a list of"):
        Seg().open(write_text(tmp_path / "b.pickle", []))


# Keypoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "skeleton"), [("skeleton_coco133", COCO_WHOLEBODY), ("skeleton_openpose134", OPENPOSE)]
)
def test_skeletons_are_the_recorded_ones(name: str, skeleton: Skeleton) -> None:
    table = values(name)
    assert list(skeleton.names) == Run("augmentors", name, COMMITTED).spec["names"]
    np.testing.assert_array_equal(skeleton.point_colors, table["point_colors"])
    np.testing.assert_array_equal(skeleton.links, table["links"])
    np.testing.assert_array_equal(skeleton.link_colors, table["link_colors"])


def test_a_mirrored_person_has_left_and_right_exchanged(tmp_path: Path) -> None:
    """What is drawn for a flipped clip is the skeleton of the person that the clip then shows."""
    given = person()
    path = write_text(tmp_path / "a.pickle", {0: [given]})
    flipped = {name: points * [-1, 1, 1] + [1, 0, 0] for name, points in given.items()}
    points = mirror(np.concatenate(list(flipped.values())))
    np.testing.assert_array_equal(mirror(mirror(points)), points)
    seen = write_text(
        tmp_path / "b.pickle",
        {0: [{"body-keypoints": points[:91], "hand-keypoints": points[91:]}]},
    )
    size = (120, 161)  # the columns of pixels mirror onto each other
    exchanged, left_alone, expected = (
        Keypoint(human_kpt_line_width=1).open(file).draw(range(1), size, mirrored, None).frames
        for file, mirrored in ((path, True), (path, False), (seen, False))
    )

    def alike(drawn: np.ndarray) -> float:
        """Share of drawn pixels that have the same colour in the flipped frame."""
        shown = drawn[:, :, ::-1]
        either = (shown != 0).any(-1) | (expected != 0).any(-1)
        return float((shown == expected).all(-1)[either].mean())

    assert alike(exchanged) > 0.95 > alike(left_alone) + 0.15


def test_hidden_points_are_not_drawn(tmp_path: Path) -> None:
    hidden = {name: points * [1, 1, 0.5] for name, points in person().items()}
    path = write_text(tmp_path / "a.pickle", {0: [hidden], 1: [], 2: [person(), hidden]})
    source = Keypoint().open(path)
    frames = source.draw(range(3), (48, 64), False, None).frames
    assert [bool(frame.any()) for frame in frames] == [False, False, True]
    assert Keypoint(kpt_thr=0.4).open(path).draw(range(1), (48, 64), False, None).frames.any()


def test_the_neck_is_between_the_shoulders() -> None:
    points = np.zeros((133, 3))
    points[5], points[6] = (0.2, 0.4, 0.9), (0.6, 0.2, 0.7)
    np.testing.assert_allclose(to_openpose(points)[1], (0.4, 0.3, 0.7))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({0: [person()], 4: [person()]}, "has no frame 1; expected"),
        ({0: [{"body-keypoints": np.zeros((91, 3))}]}, "frame 0: KeyError 'hand-keypoints'"),
        ({0: [person() | {"hand-keypoints": np.zeros((21, 3))}]}, r"\[\[91, 3\], \[21, 3\]\]"),
        ([1], "holds list; expected"),
    ],
)
def test_wrong_keypoint_files_are_named(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pickle: .*" + message):
        Keypoint().open(write_text(tmp_path / "a.pickle", content))


def test_a_drawn_video_is_passed_through(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_square(4))
    for control in (Seg(), Keypoint()):
        drawn = control.open(path).draw(range(1, 3), (48, 64), False, None)
        np.testing.assert_array_equal(drawn.frames, Video(path).read([1, 2]))
        assert set(drawn.text) == set(control.text_keys)
