"""Three updates and three more after a resume equal six in one go, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import At, TinyTrainer, tiny_config, train
from torch import Tensor

from transfer1.training.checkpoint_file import read_checkpoint
from transfer1.training.metrics import read_metrics
from transfer1.training.trainer import Trainer

OVERRIDES = (
    "trainer.grad_accum_iter=2",
    "trainer.max_iter=6",
    "model.hint_dropout_rate=0.5",
    "model.conditioner.text.dropout_rate=0.5",
)


def tensors(value: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of nested containers by their path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    else:
        return {prefix: value}
    return {k: v for name, child in items for k, v in tensors(child, f"{prefix}/{name}").items()}


def difference(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    assert first.keys() == second.keys()
    return [
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        )
    ]


def last_checkpoint(trainer: Trainer) -> dict[str, Any]:
    path = trainer.checkpointer.latest()
    assert path is not None
    return tensors(read_checkpoint(path))


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in read_metrics(trainer.job.metrics)]


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("model.precision=bfloat16",),
        ("model.finetune_base_model=true", "trainer.seed=3"),
    ],
    ids=["float32", "bfloat16", "base too"],
)
def test_resume_is_exact(tmp_path: Path, extra: tuple[str, ...]) -> None:
    straight = train(tmp_path / "straight", *OVERRIDES, *extra)
    train(tmp_path / "resumed", *OVERRIDES, *extra, "trainer.max_iter=3")
    resumed = train(tmp_path / "resumed", *OVERRIDES, *extra)
    assert difference(last_checkpoint(straight), last_checkpoint(resumed)) == []
    assert losses(straight) == losses(resumed)
    assert len(losses(resumed)) == 6


def test_resume_after_a_crash_forgets_what_was_not_saved(tmp_path: Path) -> None:
    def crash(trainer: Trainer) -> None:
        raise OSError("power cut")

    overrides = (*OVERRIDES, "checkpoint.save_iter=2")
    straight = train(tmp_path / "straight", *overrides)
    config = tiny_config(tmp_path / "crashed", *overrides)
    with pytest.raises(OSError, match="power cut"):
        TinyTrainer(config, At("on_before_optimizer_step", 3, crash)).run()
    assert len(read_metrics(tmp_path / "crashed" / "metrics.jsonl")) == 3
    resumed = train(tmp_path / "crashed", *overrides)
    assert difference(last_checkpoint(straight), last_checkpoint(resumed)) == []
    assert losses(straight) == losses(resumed)


def test_a_skipped_update_survives_a_resume(tmp_path: Path) -> None:
    def poison(trainer: Trainer) -> None:
        gradients = [p.grad for p in trainer.state.model.parameters() if p.grad is not None]
        gradients[0].fill_(float("nan"))

    def run(folder: Path, *overrides: str) -> TinyTrainer:
        poisoned = At("on_after_backward", 2, poison)
        return train(folder, *OVERRIDES, *overrides, callbacks=(poisoned,))

    straight = run(tmp_path / "straight")
    run(tmp_path / "resumed", "trainer.max_iter=3")
    resumed = run(tmp_path / "resumed")
    assert resumed.state.skipped == straight.state.skipped == 1
    assert difference(last_checkpoint(straight), last_checkpoint(resumed)) == []
