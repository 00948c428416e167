"""The held-out report: what it measures, what it writes, and that it judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from tiny import TinyClips, TinyTrainer, tiny_config
from torch.utils.data import DataLoader, Dataset, Subset

from transfer1.data.sampler import SampleKey, StreamSampler
from transfer1.training.held_out import Scores, verdict
from transfer1.training.report import HeldOutReport


class NamedClips(Dataset[dict[str, Any]]):
    """Random clips with names, as the real dataset has them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        name = f"clip{key.index if isinstance(key, SampleKey) else key}"
        return {**TinyClips()[key], "clip_name": name}


class ReportTrainer(TinyTrainer):
    held_out: Dataset[dict[str, Any]] = NamedClips()

    def build_dataloaders(self) -> tuple[Any, Any]:
        clips = NamedClips()
        loader = DataLoader(clips, batch_size=2, sampler=StreamSampler(clips))
        return loader, DataLoader(self.held_out, batch_size=1)


def trainer(folder: Path, *report: HeldOutReport) -> ReportTrainer:
    config = tiny_config(folder, "model.latent_shape=[16,3,4,4]")
    return ReportTrainer(config, *report)


@pytest.fixture
def vae1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer whose pictures can be decoded, in place of the debug tokenizer."""
    import tiny

    overrides = tuple(o.replace("debug_tokenizer", "vae1") for o in tiny.OVERRIDES)
    monkeypatch.setattr(tiny, "OVERRIDES", overrides)


@pytest.mark.usefixtures("vae1")
def test_a_run_is_scored_drawn_and_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = HeldOutReport(sigmas=[0.4, 3.0], seeds=[0], every_n=1)
    assert trainer(tmp_path, report).run() == 1  # two updates on noise teach nothing
    folder = tmp_path / "held_out"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["clips"] == ["clip0", "clip1", "clip2"] and scores["sigmas"] == [0.4, 3.0]
    assert list(scores["history"]) == ["0", "1", "2"]
    shape = torch.tensor(scores["history"]["2"]["right"]).shape
    assert shape == (3, 2) and False in scores["verdict"].values()
    for name in ("loss_curve.png", "contact_sheet.png"):
        picture = cv2.imread(str(folder / name))
        assert picture is not None and picture.std() > 5, name
    first = capsys.readouterr().out
    assert "FAIL" in first and "contact_sheet.png" in first and "sigma 0.4" in first
    assert trainer(tmp_path, report).run() == 1  # a rerun tells the same
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.usefixtures("vae1")
def test_scores_leave_the_training_alone(tmp_path: Path) -> None:
    plain, watched = (
        trainer(tmp_path / "plain"),
        trainer(tmp_path / "watched", HeldOutReport(sigmas=[1.0], seeds=[0], every_n=1)),
    )
    plain.run()
    watched.run()
    for (name, expected), actual in zip(
        plain.state.model.named_parameters(), watched.state.model.parameters(), strict=True
    ):
        assert actual.equal(expected), name


@pytest.mark.usefixtures("vae1")
def test_one_clip_has_no_other_control(tmp_path: Path) -> None:
    run = trainer(tmp_path, HeldOutReport(sigmas=[1.0], seeds=[0]))
    run.held_out = Subset(NamedClips(), [0])
    with pytest.raises(ValueError, match="two or more clips of one size.*clip0"):
        run.run()


def scores(right: list[list[float]], wrong: list[list[float]]) -> Scores:
    zero = torch.ones(2, 2)
    return Scores(zero=zero, right=torch.tensor(right), wrong=torch.tensor(wrong))


@pytest.mark.parametrize(
    ("right", "wrong", "passed"),
    [
        ([[0.5, 0.5], [0.6, 0.6]], [[0.7, 0.7], [0.7, 0.7]], [True, True, True, True]),
        ([[0.3, 1.1], [0.3, 1.1]], [[1.2, 1.2], [1.2, 1.2]], [False, True, True, True]),
        ([[0.9, 0.9], [0.9, 0.9]], [[1.2, 1.2], [1.2, 1.2]], [True, False, True, True]),
        ([[0.6, 0.6], [0.6, 0.6]], [[0.5, 0.5], [0.9, 0.9]], [True, True, False, True]),
        ([[0.6, 0.6], [0.6, 0.6]], [[0.62, 0.62], [0.62, 0.62]], [True, True, True, False]),
    ],
)
def test_verdict(right: list[list[float]], wrong: list[list[float]], passed: list[bool]) -> None:
    assert list(verdict(scores(right, wrong)).values()) == passed
