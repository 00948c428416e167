"""The benchmark of whole steps: that its steps are those of a run, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import timing, train_step
from bench.step_trainer import PHASES, Stopwatch, build_trainer, peak_bytes


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.MATRIX, "cpu", 512)


def test_tables_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "growth.png"
    small = {
        "tokens": {16: train_step.QUICK, 32: train_step.Size(64, 1, (2, 8, 8))},
        "batch": {1: train_step.QUICK, 2: train_step.Size(64, 1, (1, 8, 8), batch=2)},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "SCALING", small)
        options = ["--quick", "--kernels", "reference", "--rounds", "2"]
        code = train_step.main([*options, "--json", str(file), "--plot", str(picture)])
    assert code == 0
    content = json.loads(file.read_text())
    (row,) = content["rows"]
    assert (row["configuration"], row["kernels"], row["tokens"]) == ("quick", "reference", 16)
    assert row["GFLOP"] > 0 and 0 < row["share of GEMM"] < 1
    assert row["peak MiB"] > row["state MiB"] > 0
    for phase in ("encode", "forward", "backward", "gradient norm", "optimizer"):
        assert row[f"{phase} ms"] > 0, phase
    grown = [(row["grows"], row["tokens"]) for row in content["scaling"]]
    assert grown == [("tokens", 16), ("tokens", 32), ("batch", 16), ("batch", 32)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| quick " in capsys.readouterr().out


def test_steps_are_those_of_a_run(tmp_path: Path) -> None:
    """Weights, averages and the count of updates move; the loss is that of the trainer."""
    trainer = build_trainer(train_step.QUICK.overrides(), "reference", tmp_path)
    before = {name: v.clone() for name, v in trainer.state.model.state_dict().items()}
    trainer.step()
    trainer.step()
    assert trainer.state.iteration == 2
    assert trainer.state.ema is not None and trainer.state.ema.num_updates.item() == 2
    assert trainer.gradients.clip_coef is not None
    moved = [n for n, v in trainer.state.model.state_dict().items() if not v.equal(before[n])]
    assert any(n.startswith("net.") for n in moved) and any("base_model" in n for n in moved)
    phases = trainer.phases(rounds=1)
    assert tuple(phases) == PHASES


def test_the_released_experiment_can_be_timed(capsys: pytest.CaptureFixture[str]) -> None:
    from tiny import OVERRIDES

    own = ("kernels=", "trainer.timestamp_seed=", "~")  # what the benchmark sets itself
    overrides = [override for override in OVERRIDES if not override.startswith(own)]
    overrides += ["trainer.grad_accum_iter=1", "dataloader_train.batch_size=2"]
    assert train_step.main(["--kernels", "reference", "--rounds", "1", *overrides]) == 0
    assert "experiment=CTRL_7B" in capsys.readouterr().out


def test_a_wrong_override_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--kernels", "reference", "experiment=none_such"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        train_step.main(["demo_edge"])
    assert "unrecognized arguments: demo_edge" in capsys.readouterr().err


def test_peak_memory_is_what_is_held_at_once() -> None:
    def step() -> None:
        first = torch.zeros(1000, dtype=torch.float64)
        second = torch.zeros(2000, dtype=torch.float64)
        del first, second
        torch.zeros(500, dtype=torch.float64)

    assert peak_bytes(step, torch.device("cpu")) == 3000 * 8


def test_seconds_of_nested_ranges() -> None:
    watch = Stopwatch()
    watch.push("forward")
    watch.push("encode")
    watch.pop()
    watch.push("block")
    watch.pop()
    watch.pop()
    assert watch.seconds["forward"] >= watch.seconds["encode"] + watch.seconds["block"] > 0
