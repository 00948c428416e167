"""Checkpoints: layout, atomic writing, what is loaded from where, and readable refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny import At, TinyTrainer, tiny_config, train
from torch import Tensor, nn

from transfer1.training.checkpoint import LATEST
from transfer1.training.checkpoint_file import (
    LAYOUT,
    CheckpointError,
    fit_weights,
    read_checkpoint,
    snapshot,
)
from transfer1.training.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyTrainer:
    """A run of two updates with a checkpoint of each."""
    return train(tmp_path_factory.mktemp("finished"), "checkpoint.save_iter=1")


@pytest.fixture
def file(finished: TinyTrainer) -> Path:
    path = finished.checkpointer.latest()
    assert path is not None
    return path


def begin(folder: Path, *overrides: str) -> TinyTrainer:
    """Build a run and load what it starts from, without training."""
    trainer = TinyTrainer(tiny_config(folder, *overrides))
    trainer.job.path.mkdir(parents=True, exist_ok=True)
    trainer.build()
    trainer.load()
    return trainer


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def test_files_and_layout(finished: TinyTrainer, file: Path) -> None:
    assert file.name == "iter_000000002.pt"
    assert (file.parent / LATEST).read_text() == "iter_000000002.pt\n"
    names = {path.name for path in file.parent.iterdir()}
    assert names == {"iter_000000001.pt", "iter_000000002.pt", LATEST}
    content = read_checkpoint(file)
    assert set(content) >= {"model", "optimizer", "scheduler", "grad_scaler", "iteration"}
    assert set(content["model"]) == {"model", "ema", "trained_data_record"}
    assert content["model"]["trained_data_record"] == {"image": 0, "video": 4, "iteration": 2}
    assert content["kernels"]["attention"] == "reference"
    assert (content["iteration"], content["samples_seen"], content["seed"]) == (2, 4, 0)
    assert same(content["model"]["model"], dict(finished.state.model.state_dict()))


def test_shared_tensors_are_written_once(file: Path) -> None:
    weights = read_checkpoint(file)["model"]["model"]
    assert weights["logvar.1.weight"].data_ptr() == weights["base_model.logvar.1.weight"].data_ptr()


def test_a_snapshot_does_not_follow_the_training() -> None:
    shared = torch.ones(2)
    state = {"a": shared, "b": [shared, (torch.zeros(1), 3)], "c": None}
    taken, expected = snapshot(state), copy.deepcopy(state)
    shared.add_(1)
    assert same(taken, expected)
    assert taken["a"] is taken["b"][0]


def test_a_failed_write_is_loud_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def fail_later(content: Any, target: Any) -> None:
        if content["iteration"] == 2:
            target.write(b"half")
            raise OSError("No space left on device")
        save(content, target)

    monkeypatch.setattr(torch, "save", fail_later)
    config = tiny_config(tmp_path, "checkpoint.save_iter=1", "trainer.max_iter=4")
    trainer = TinyTrainer(config)
    with pytest.raises(RuntimeError, match=r"iter_000000002.pt could not be written: No space"):
        trainer.run()
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"iter_000000001.pt", LATEST}
    monkeypatch.undo()
    again = TinyTrainer(config)
    assert again.run() == 0
    assert again.state.iteration == 4


def test_success_is_told_once_per_file(tmp_path: Path) -> None:
    told: list[int] = []
    callbacks = [
        At("on_save_checkpoint_success", iteration, lambda t, i=iteration: told.append(i))
        for iteration in (1, 2, 3)
    ]
    overrides = ("checkpoint.save_iter=1", "trainer.max_iter=3")
    train(tmp_path, *overrides, callbacks=tuple(callbacks))
    assert told == [1, 2, 3]


def test_load_path_brings_the_model_alone(tmp_path: Path, file: Path) -> None:
    state = begin(tmp_path, f"checkpoint.load_path={file}").state
    saved = read_checkpoint(file)
    assert same(saved["model"]["model"], dict(state.model.state_dict()))
    assert (state.iteration, state.samples_seen) == (0, 0)
    assert state.schedule.state_dict()["last_epoch"] == 0
    assert not state.optimizer.state
    named = dict(state.model.named_parameters())
    assert all(value.equal(named[n.replace("-", ".")]) for n, value in shadows(state).items())


def shadows(state: Any) -> dict[str, Tensor]:
    return state.ema.shadows


def test_load_path_with_the_schedule(tmp_path: Path, file: Path) -> None:
    overrides = (f"checkpoint.load_path={file}", "checkpoint.only_load_scheduler_state=true")
    state = begin(tmp_path, *overrides).state
    assert state.schedule.state_dict()["last_epoch"] == 2
    assert state.iteration == 0


def test_load_path_with_everything(tmp_path: Path, file: Path) -> None:
    overrides = (f"checkpoint.load_path={file}", "checkpoint.load_training_state=true")
    state = begin(tmp_path, *overrides).state
    saved = read_checkpoint(file)
    assert (state.iteration, state.samples_seen) == (2, 4)
    assert same(saved["optimizer"]["state"], state.optimizer.state_dict()["state"])
    assert same(saved["model"]["ema"], shadows(state))


def test_averaged_weights_can_become_the_model(tmp_path: Path, file: Path) -> None:
    overrides = (f"checkpoint.load_path={file}", "checkpoint.load_ema_to_reg=true")
    state = begin(tmp_path, *overrides).state
    ema = read_checkpoint(file)["model"]["ema"]
    named = {n.replace(".", "-"): p for n, p in state.model.named_parameters()}
    assert ema
    assert all(value.equal(named[name]) for name, value in ema.items())


def test_a_plain_state_dict_can_be_loaded(tmp_path: Path, file: Path) -> None:
    weights = read_checkpoint(file)["model"]["model"]
    for name, content in (("plain", weights), ("nested", {"model": weights})):
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        state = begin(tmp_path / name, f"checkpoint.load_path={path}").state
        assert same(weights, dict(state.model.state_dict()))


def test_the_newest_checkpoint_goes_before_load_path(tmp_path: Path, file: Path) -> None:
    train(tmp_path, "trainer.max_iter=1", "trainer.seed=7")
    state = begin(tmp_path, f"checkpoint.load_path={file}", "trainer.seed=7").state
    assert (state.iteration, state.seed) == (1, 7)


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ("optim", {"iteration": 2, "last_epoch": 2, "moments": False}),
        ("scheduler", {"iteration": 2, "last_epoch": 0, "moments": True}),
        ("trainer", {"iteration": 0, "last_epoch": 2, "moments": True}),
    ],
)
def test_keys_not_to_resume(
    tmp_path: Path, file: Path, left_out: str, expected: dict[str, Any]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (file.name, LATEST):
        (folder / name).write_bytes((file.parent / name).read_bytes())
    state = begin(tmp_path, f"checkpoint.keys_not_to_resume=[{left_out}]").state
    actual = {
        "iteration": state.iteration,
        "last_epoch": state.schedule.state_dict()["last_epoch"],
        "moments": bool(state.optimizer.state),
    }
    assert actual == expected


def test_a_file_of_the_original_resumes(tmp_path: Path, file: Path) -> None:
    """No masters, no counts of ours, betas as a list of its configuration."""
    content = read_checkpoint(file)
    group = content["optimizer"]["param_groups"][0]
    group["betas"] = OmegaConf.create({"optimizer": {"betas": [0.9, 0.99]}}).optimizer.betas
    group.pop("param_names")
    content = {key: content[key] for key in LAYOUT}
    path = tmp_path / "original.pt"
    torch.save(content, path)
    overrides = (f"checkpoint.load_path={path}", "checkpoint.load_training_state=true")
    state = begin(tmp_path / "job", *overrides, "trainer.seed=9").state
    assert (state.iteration, state.seed, state.ema.num_updates.item()) == (2, 9, 2)
    assert state.optimizer.group["betas"] == (0.9, 0.99)


def error_of(folder: Path, *overrides: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        begin(folder, *overrides)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = error_of(tmp_path, "checkpoint.load_path=nowhere.pt")
    assert "nowhere.pt does not exist; check checkpoint.load_path" in message


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    assert "damaged.pt" in error_of(tmp_path, f"checkpoint.load_path={path}")


def test_a_truncated_file_is_named(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "truncated.pt"
    path.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be read" in error_of(tmp_path, f"checkpoint.load_path={path}")


def test_other_objects_are_not_built(tmp_path: Path) -> None:
    path = tmp_path / "objects.pt"
    torch.save({"model": SimpleNamespace(a=1)}, path)
    message = error_of(tmp_path, f"checkpoint.load_path={path}")
    assert "types.SimpleNamespace" in message
    assert "keep only its weights" in message


def test_a_file_without_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.pt"
    torch.save({"iteration": 3}, path)
    assert "holds no model weights" in error_of(tmp_path, f"checkpoint.load_path={path}")


def test_averages_that_are_not_there_are_named(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(read_checkpoint(file)["model"]["model"], path)
    overrides = (f"checkpoint.load_path={path}", "checkpoint.load_ema_to_reg=true")
    assert "no averaged weights" in error_of(tmp_path, *overrides)


def test_training_state_that_is_not_there_is_named(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(read_checkpoint(file)["model"]["model"], path)
    overrides = (f"checkpoint.load_path={path}", "checkpoint.load_training_state=true")
    assert "it holds no 'optimizer'" in error_of(tmp_path, *overrides)


def test_other_trained_parameters_are_named(tmp_path: Path, file: Path) -> None:
    overrides = (f"checkpoint.load_path={file}", "checkpoint.load_training_state=true")
    message = error_of(tmp_path, *overrides, "model.finetune_base_model=true")
    assert "EMA state does not fit the trainable parameters" in message
    assert "checkpoint.keys_not_to_resume" in message


def test_another_net_is_named_by_its_parameters(tmp_path: Path, file: Path) -> None:
    narrow = [f"model.{net}.mlp_ratio=2.0" for net in ("net", "net_ctrl")]
    message = error_of(tmp_path, f"checkpoint.load_path={file}", *narrow)
    assert "of another shape: base_model.net." in message
    assert "where the model has" in message


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.b = nn.Linear(3, 1)


def test_strict_loading_names_every_difference() -> None:
    weights = dict(Linear().state_dict())
    weights["a.weight"] = torch.zeros(4, 4)
    weights["c.weight"] = weights.pop("b.weight")
    with pytest.raises(CheckpointError) as caught:
        fit_weights(weights, Linear(), strict=True, source=Path("x.pt"))
    message = str(caught.value)
    assert "1 missing in the file: b.weight" in message
    assert "1 unknown to the model: c.weight" in message
    assert "a.weight (4, 4) where the model has (3, 2)" in message
    assert "checkpoint.strict_resume=false" in message


def test_loose_loading_takes_what_fits() -> None:
    model, weights = Linear(), dict(Linear().state_dict())
    weights["a.weight"] = torch.zeros(4, 4)
    weights["b._extra_state"] = torch.zeros(1)
    fitted = fit_weights(weights, model, strict=False, source=Path("x.pt"))
    assert fitted.keys() == model.state_dict().keys()
    assert fitted["b.weight"] is weights["b.weight"]
    assert fitted["a.weight"].equal(model.a.weight)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        fit_weights({"z": torch.zeros(1)}, model, strict=False, source=Path("x.pt"))


def test_strict_resume_false_reaches_the_run(tmp_path: Path, file: Path) -> None:
    overrides = (f"checkpoint.load_path={file}", "model.net_ctrl.hint_channels=16")
    assert "net.x_embedder2" in error_of(tmp_path / "strict", *overrides)
    trainer = begin(tmp_path / "loose", *overrides, "checkpoint.strict_resume=false")
    assert isinstance(trainer, Trainer)
    saved = read_checkpoint(file)["model"]["model"]
    own = dict(trainer.state.model.state_dict())
    different = [name for name in own if not same(own[name], saved[name])]
    assert different == ["net.x_embedder2.proj.1.weight"]
