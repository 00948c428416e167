"""Golden runs of the control inputs: equal to the last pixel, recorded draws handed out again."""

from __future__ import annotations

import pickle
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goldens import Run, compare, handles

from transfer1.data.controls import Edge, Keypoint, Seg, Upscale, Vis, shrink_to_grid
from transfer1.data.controls.base import Source
from transfer1.data.controls.blur import BLURS, Bilateral, Blur, Gaussian
from transfer1.data.controls.rle import decode, encode, run_lengths
from transfer1.data.controls.seg import Mask, MaskFile
from transfer1.data.controls.skeleton import to_openpose
from transfer1.data.controls.vis import Softening
from transfer1.data.resize import fit_size, pad, resize
from transfer1.data.text import pad_text


def frames_of(clip_CTHW: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(clip_CTHW.permute(1, 2, 3, 0).numpy())


def input_clip(run: Run) -> np.ndarray:
    return frames_of(run.other("clip").group("input")["video"])


def assert_equal(actual_THWC: np.ndarray, run: Run, name: str = "out") -> None:
    expected = frames_of(run.group("output")[name])
    np.testing.assert_array_equal(actual_THWC, expected, err_msg=f"{run}: {name}")


class RecordedChoices(np.random.Generator):
    """Hands out recorded draws instead of random ones; each must be one that could be drawn."""

    def __init__(self, *values: Any) -> None:
        super().__init__(np.random.PCG64(0))
        self.values = list(values)

    def integers(self, low: int, high: int) -> int:  # type: ignore[override]
        value = self.values.pop(0)
        assert low <= value < high, f"{value} is outside [{low}, {high})"
        return value

    def uniform(self, low: float, high: float) -> float:  # type: ignore[override]
        value = self.values.pop(0)
        assert low <= value < high, f"{value} is outside [{low}, {high})"
        return value

    def choice(self, options: Any, p: Any = None) -> Any:  # type: ignore[override]
        value = self.values.pop(0)
        assert value in (range(options) if isinstance(options, int) else options), value
        return value


class LegacyDraws(np.random.Generator):
    """Draws as the original made them: numpy's and Python's global generators with one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.numpy, self.python = np.random.RandomState(seed), random.Random(seed)
        self.integers = self.numpy.randint  # type: ignore[method-assign]
        self.choice = self.numpy.choice  # type: ignore[method-assign]
        self.permutation = self.numpy.permutation  # type: ignore[method-assign]
        self.uniform = self.python.uniform  # type: ignore[method-assign]


# Edge ---------------------------------------------------------------------------------------------


@handles(("augmentors", "edge"))
def check_edge(run: Run) -> None:
    edge = Edge(run.spec["preset"])
    assert Edge.THRESHOLDS[edge.preset] == tuple(run.spec["thresholds"])
    expected = run.group("output")["channel0"].numpy()
    actual = edge(input_clip(run), None)
    assert actual.shape == (*expected.shape, 1)
    np.testing.assert_array_equal(actual[..., 0], expected)


@handles(("augmentors", "edge_random"))
def check_edge_of_drawn_thresholds(run: Run) -> None:
    lower, upper = run.spec["thresholds"]
    actual = Edge()(input_clip(run), RecordedChoices(lower, upper - lower))
    np.testing.assert_array_equal(actual[..., 0], run.group("output")["channel0"].numpy())


@handles(("augmentors", "edge_image"))
def check_edge_of_an_image(run: Run) -> None:
    """An image is a clip of one frame; the preset stands in the name of the run."""
    preset = run.name.rpartition("_")[2]
    edges = Edge(preset)(input_clip(run)[:1], None)
    actual = np.broadcast_to(edges[0], (*edges.shape[1:3], 3))
    np.testing.assert_array_equal(actual, run.group("output")["out"].permute(1, 2, 0).numpy())


# Blurs --------------------------------------------------------------------------------------------

CLASS_NAMES = {"BilateralFilter": "bilateral", "GaussianBlur": "gaussian"}
# The recording keeps the parameters of a blur in the name of its run alone, and not all of them:
# these two were found by trying; no other whole or half sigma and no other threshold outside
# 118..120 gives the recorded pixels.
NOT_SAID = {"odd": "s3", "bin20": "t120"}


def recorded_blur(name: str) -> Blur:
    """The blur of a run called blur_<name>_<parameters>, numbers in the order of our arguments."""
    _, kind, *parameters = name.split("_")
    numbers = [re.sub("^[a-z]+", "", NOT_SAID.get(part, part)) for part in parameters]
    return BLURS[kind](*(float(n) if "." in n else int(n) for n in numbers))  # type: ignore[call-arg]


@handles(("augmentors", "blur"))
def check_blur(run: Run) -> None:
    assert_equal(recorded_blur(run.name)(input_clip(run)), run)


@handles(("augmentors", "vis"))
def check_vis(run: Run) -> None:
    spec = run.spec
    preset = run.name.removeprefix("vis_")
    bilateral = dict(spec["bilateral"])
    blur = Bilateral(iterations=bilateral.pop("iter"), **bilateral)
    assert Vis.STRENGTHS[preset] == Softening([blur], spec["downscale"][0], spec["downup"])
    assert_equal(Vis(preset)(input_clip(run), None), run)


@handles(("augmentors", "vis_random"))
def check_vis_of_drawn_blurs(run: Run) -> None:
    """The draws come in the recorded order; blurred exactly, as the original does."""
    vis = Vis(exact=True)
    values = []
    for _, value in run.spec["draws"]:
        if isinstance(value, list):
            value = list(vis.combinations).index("+".join(CLASS_NAMES[name] for name in value))
        values.append(value)
    rng = RecordedChoices(*values)
    actual = vis(input_clip(run), rng)
    assert not rng.values, f"recorded draws are left over: {rng.values}"
    assert_equal(actual, run)


def test_recorded_blurs_are_read_from_names() -> None:
    assert recorded_blur("blur_gaussian_k24_odd") == Gaussian(24, 3)
    assert recorded_blur("blur_bilateral_9_75_75_iter2") == Bilateral(9, 75, 75, 2)


# Upscale ------------------------------------------------------------------------------------------


def upscale_clip(run: Run) -> torch.Tensor:
    return run.other("upscale_clip").group("input")["video"]


@handles(("augmentors", "upscale_val"))
def check_upscale_preset(run: Run) -> None:
    """Recorded thinned out: the mean of all pixels, and every n-th of them."""
    upscale, frames = Upscale(run.spec["preset"]), frames_of(upscale_clip(run))
    part = upscale.reframe(frames.shape[1:3], None)(frames)
    actual = torch.from_numpy(upscale(part, None)).permute(3, 0, 1, 2)
    assert list(actual.shape) == run.spec["shape"]
    outputs = run.group("output")
    compare(actual.float().mean(), outputs.pop("mean"), "mean")
    ((name, expected),) = outputs.items()
    step = int(name.removeprefix("strided"))
    assert torch.equal(actual[:, :, ::step, ::step], expected), name


@handles(("augmentors", "upscale_target"))
def check_upscale_to_a_size(run: Run) -> None:
    actual = resize(upscale_clip(run), run.spec["target"], "bilinear")
    ((name, expected),) = run.group("output").items()
    step = int(name.removeprefix("strided"))
    assert torch.equal(actual[:, :, ::step, ::step], expected), name


# Segmentation -------------------------------------------------------------------------------------

FIRST_FRAME = 1  # of the recorded window; said in the note of the masks alone


class GivenMasks(MaskFile):
    """Masks that are in memory instead of a file."""

    def __init__(self, masks: list[Mask], control: Seg) -> None:
        self.control, self.masks = control, masks

    def _read(self) -> list[Mask]:
        return self.masks


@handles(("augmentors", "seg"))
def check_seg(run: Run) -> None:
    masks = run.other("seg_masks").group("input")["masks"].numpy()
    spec = run.spec
    control = Seg(
        use_fixed_color_list=spec["use_fixed_color_list"],
        random_sample_num_masks=spec["random_sample_num_masks"],
    )
    source = GivenMasks(
        [Mask(f"thing{i}", mask.shape, run_lengths(encode(mask))) for i, mask in enumerate(masks)],
        control,
    )
    frames = run.group("output")["out"].shape[1]
    window = range(FIRST_FRAME, FIRST_FRAME + frames)
    drawn = source.draw(window, masks.shape[2:], False, LegacyDraws(spec["seed"]))
    assert drawn.text == {"segmentation_phrase_all": spec["phrases"]}
    assert_equal(drawn.frames, run)


@handles(("augmentors", "rle"))
def check_rle(run: Run) -> None:
    spec = run.spec
    runs = run_lengths(spec["counts"])
    assert runs.sum() == spec["size"][0] * spec["size"][1]
    actual = decode(runs, spec["start"], spec["end"])
    expected = run.group("output")["out"].numpy()[:, 0]
    np.testing.assert_array_equal(actual, expected)
    whole = decode(runs, 0, runs.sum())
    np.testing.assert_array_equal(actual, whole[spec["start"] : spec["end"]])
    assert encode(whole) == spec["counts"].encode()


# Keypoints ----------------------------------------------------------------------------------------


def annotated_people(run: Run) -> dict[int, list[dict[str, np.ndarray]]]:
    """The recorded people, as a file of the dataset holds them."""
    people: dict[int, list[dict[str, np.ndarray]]] = {}
    for name, points in sorted(run.other("keypoint_annotations").group("input").items()):
        frame = int(name.partition("/")[0].removeprefix("frame"))
        person = {"body-keypoints": points[:91].numpy(), "hand-keypoints": points[91:].numpy()}
        people.setdefault(frame, []).append(person)
    return people


@handles(("augmentors", "keypoint"))
def check_keypoint(run: Run) -> None:
    spec = run.spec
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "people.pickle"
        path.write_bytes(pickle.dumps(annotated_people(run)))
        source: Source = Keypoint(**spec["args"]).open(path)
        window = range(spec["frame_start"], spec["frame_end"])
        assert_equal(source.draw(window, tuple(spec["size"]), False, None).frames, run)


@handles(("augmentors", "kpconv"))
def check_keypoint_conversion(run: Run) -> None:
    """Which person and scale is said in the note: frame1/person0 scaled by (128, 96)."""
    note = re.fullmatch(r"input (\S+) scaled by \((\d+), (\d+)\)", run.spec["note"])
    assert note, run.spec["note"]
    person = run.other("keypoint_annotations").group("input")[note[1]].numpy()
    actual = torch.from_numpy(to_openpose(person * [int(note[2]), int(note[3]), 1]))
    compare(actual[:, :2], run.group("output")["points"], "points", 1e-12)
    compare(actual[:, 2], run.group("output")["scores"], "scores", 1e-12)


# Size and text ------------------------------------------------------------------------------------


@handles(("augmentors", "resize_frames"))
def check_shrinking(run: Run) -> None:
    """The input is the clip's first frame, tiled; how often is said in the note."""
    tiles = re.search(r"tiled (\d+)x(\d+)", run.spec["note"])
    assert tiles, run.spec["note"]
    shrunk = shrink_to_grid(np.tile(input_clip(run)[:1], (1, int(tiles[1]), int(tiles[2]), 1)))
    outputs = run.group("output")
    assert list(shrunk.transpose(3, 0, 1, 2).shape) == run.spec["out_shape"]
    compare(torch.tensor(shrunk.mean()), outputs["mean"], "mean")
    assert_equal(shrunk[:, ::16, ::16], run, "strided16")


@handles(("augmentors", "resize_pad"))
def check_resize_and_pad(run: Run) -> None:
    clip, expected = run.group("input")["video"], run.group("output")
    width, height = run.spec["size_wh"]
    size = fit_size((clip.shape[-2], clip.shape[-1]), (height, width))
    resized = resize(clip, size)
    padded, mask = pad(resized, (height, width))
    assert [height, width, *size] == expected["image_size"].tolist()
    for actual, name in ((resized, "resized"), (padded, "padded"), (mask, "padding_mask")):
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=0, msg=f"{run}: {name}")


@handles(("augmentors", "text"))
def check_text(run: Run) -> None:
    embedding = run.other("text").group("input")["emb"]
    actual = pad_text(embedding, run.spec["n"], run.spec["is_mask_all_ones"])
    expected = run.group("output")
    for tensor, name in zip(actual, ("emb", "mask"), strict=True):
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
