"""Callbacks: order, building, and what each of the built-in ones does."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loguru import logger
from tiny import tiny_config, train

from transfer1.config import LazyCall, LazyDict
from transfer1.training.callback import HOOKS, Callback, CallBackGroup, EveryN, build_callbacks
from transfer1.training.callbacks import GradClip, IterSpeed, LowPrecision, ProgressBar
from transfer1.training.metrics import Metrics, read_metrics
from transfer1.training.processes import Processes

MODULE = "transfer1.training.callbacks"


def trainer(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def scalars(**values: float) -> Any:
    return SimpleNamespace(**{name: torch.tensor(value) for name, value in values.items()})


def test_callbacks_run_in_configuration_order_and_empty_entries_are_skipped() -> None:
    nodes = LazyDict(
        {
            "speed": LazyCall(f"{MODULE}.IterSpeed")(every_n=3),
            "removed": None,
            "only_options": {"every_n": 2},
            "clip": LazyCall(f"{MODULE}.GradClip")(clip_norm=2.0),
        }
    )
    built = build_callbacks(nodes)
    assert [type(callback) for callback in built] == [IterSpeed, GradClip]
    assert isinstance(built[1], GradClip)
    assert built[1].clip_norm == 2.0
    assert build_callbacks(None) == []
    with pytest.raises(ValueError, match=r"trainer.callbacks.wrong: .*dict.* is not a Callback"):
        build_callbacks({"wrong": LazyCall("builtins.dict")()})


def test_a_group_calls_every_callback_with_the_same_arguments() -> None:
    seen: list[Any] = []

    class Note(Callback):
        def __init__(self, name: str):
            self.name = name

        def on_train_end(self, model: Any, iteration: int = 0) -> None:
            seen.append((self.name, iteration, self.trainer.job))

    group = CallBackGroup([Note("a"), Note("b")], trainer(job="job"))
    group.on_train_end(None, iteration=4)
    group.on_app_end()
    assert seen == [("a", 4, "job"), ("b", 4, "job")]
    with pytest.raises(AttributeError, match="no hook 'on_lunch'; hooks are on_optimizer_init"):
        group.on_lunch()
    assert "on_training_step_end" in HOOKS


def test_every_n_counts_updates_and_not_micro_steps() -> None:
    class Note(EveryN):
        def every_n_impl(self, *args: Any) -> None:
            fired.append(args[-1])

    def run(callback: EveryN) -> list[int]:
        fired.clear()
        callback.trainer = trainer()
        callback.on_train_start(None, 0)
        for iteration in (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6):
            callback.on_training_step_end(None, {}, None, torch.zeros(()), iteration)
        return list(fired)

    fired: list[int] = []
    assert run(Note(3)) == [3, 6]
    assert run(Note(4, run_at_start=True)) == [1, 4]
    assert run(Note(0)) == []
    with pytest.raises(ValueError, match="every_n=-1"):
        Note(-1)


@pytest.mark.parametrize(("norm", "coefficient"), [(4.0, 0.5), (1.0, 1.0)])
def test_clipping_hands_over_a_coefficient(norm: float, coefficient: float) -> None:
    callback = GradClip(clip_norm=2.0)
    callback.trainer = trainer(gradients=scalars(norm=norm))
    callback.on_before_optimizer_step(None, None, None)
    assert callback.trainer.gradients.clip_coef.item() == pytest.approx(coefficient)


def test_clipping_without_a_model_key_does_nothing() -> None:
    callback = GradClip(model_key=None, force_finite=True)
    callback.trainer = trainer(gradients=scalars(norm=9.0))
    callback.on_before_optimizer_step(None, None, None)
    assert not hasattr(callback.trainer.gradients, "clip_coef")


def test_low_precision_casts_floating_tensors_of_its_own_dict() -> None:
    batch = {"text": torch.ones(2), "video": torch.ones(2, dtype=torch.uint8), "name": ["a"]}
    callback = LowPrecision()
    callback.trainer = trainer(dtype=torch.bfloat16)
    for hook in (callback.on_training_step_start, callback.on_validation_step_start):
        data = dict(batch)
        hook(None, data)
        assert data["text"].dtype == torch.bfloat16
        assert data["video"].dtype == torch.uint8
        assert data["name"] == ["a"]
    assert batch["text"].dtype == torch.float32
    callback.trainer = trainer(dtype=torch.float32)
    data = dict(batch)
    callback.on_training_step_start(None, data)
    assert data["text"] is batch["text"]


def test_iter_speed_logs_the_first_updates_and_then_every_n_th() -> None:
    lines: list[str] = []
    handler = logger.add(lines.append, format="{message}")
    callback = IterSpeed(every_n=5, hit_thres=2)
    callback.trainer = trainer()
    callback.on_train_start(None, 0)
    for iteration in range(1, 12):
        callback.on_training_step_end(None, {}, None, torch.tensor(0.5), iteration)
    logger.remove(handler)
    assert [line.split(":")[0] for line in lines] == [f"iteration {i}" for i in (1, 2, 5, 10)]
    assert all("loss 0.5000" in line and "s/iteration" in line for line in lines)


def steps(callback: ProgressBar, count: int) -> None:
    callback.trainer = trainer(
        max_iter=count, metrics=trainer(latest={"loss": 0.25}), processes=Processes()
    )
    callback.on_train_start(None, 0)
    for iteration in range(1, count + 1):
        callback.on_training_step_end(None, {}, None, torch.zeros(()), iteration)
    callback.on_train_end(None, count)
    callback.on_app_end()


def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    steps(ProgressBar(seconds=0.0), 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("loss 0.2500" in line and line.endswith("left") for line in lines)
    steps(ProgressBar(seconds=1000.0), 3)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["3/3"]


def test_progress_on_a_terminal_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    steps(ProgressBar(), 3)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "3/3" in shown


def metrics_of(path: Path, every_n: int, iterations: range) -> Metrics:
    metrics = Metrics(path, every_n)
    metrics.trainer = trainer(gradients=scalars(norm=2.0, lr=0.1, found_inf=0))
    metrics.on_train_start(None, iterations.start - 1)
    for iteration in iterations:
        for micro_loss, seen in ((1.0, iteration - 1), (2.0, iteration)):
            terms = {"loss": torch.tensor(micro_loss * iteration)}
            metrics.on_training_step_end(None, {}, trainer(terms=terms), terms["loss"], seen)
    return metrics


def test_metrics_are_means_over_micro_steps_written_together(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = metrics_of(path, 2, range(1, 4))
    assert [record["loss"] for record in read_metrics(path)] == [1.5, 3.0]
    assert metrics.latest["loss"] == 3.0
    metrics.write(3, {"val_loss": math.nan})
    metrics.on_train_end(None, 3)
    metrics.on_app_end()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[2] == {"iteration": 3, "val_loss": None}
    assert lines[3]["loss"] == 4.5
    assert lines[3].keys() == {"iteration", "loss", "lr", "grad_norm", "skipped", "seconds"}


def test_metrics_after_the_resumed_iteration_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics_of(path, 1, range(1, 5)).on_app_end()
    with open(path, "a") as file:
        file.write('{"iteration": 5, "lo')
    metrics_of(path, 1, range(3, 4)).on_app_end()
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2, 3]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(expected)


def test_training_works_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert "TensorBoard is not installed" in (tmp_path / "stdout.log").read_text()


def test_low_precision_needs_its_callback_only_for_the_batch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert list(config.trainer.callbacks) == ["progress_bar", "grad_clip", "low_prec"]
    assert len(build_callbacks(config.trainer.callbacks)) == 3
