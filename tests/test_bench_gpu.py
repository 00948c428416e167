"""`make gpu` as far as it goes without a GPU: its plan, its message, its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import Step
from bench.roofline import GPUS, predicted_seconds

FACTS = {"device": "NVIDIA H100 80GB HBM3", "threads": 8, "torch": "2.13.0"}


def test_without_a_gpu_it_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "measures on a GPU" in message and "--plan" in message
    assert list(tmp_path.iterdir()) == []


def test_the_plan_fits_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--plan", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("parity", "bench.ops", "bench.train_step", "gpu.json", "gpu.md"):
        assert name in printed
    assert sum(step.seconds for step in gpu.STEPS) <= gpu.SECONDS


def test_arguments_of_the_steps_are_those_of_the_tools() -> None:
    """A step with a wrong argument would fail on the rented machine, after minutes."""
    from bench import ops, train_step

    for step in gpu.STEPS:
        module, *arguments = step.arguments
        assert any(step.file in argument for argument in arguments), step.name
        if module == "pytest":
            continue
        main = {"bench.ops": ops.main, "bench.train_step": train_step.main}[module]
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--help"])
        assert stopped.value.code == 0


def test_report_of_steps_that_end_differently(tmp_path: Path) -> None:
    """Real processes on this machine: tests, ops, one that fails, one that takes too long."""
    suite = tmp_path / "test_one.py"
    suite.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_other(): pytest.skip('not here')\n"
    )
    pytest_options = (
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml=parity.xml",
        "--rootdir",
        str(tmp_path),
    )
    quick = ("--op", "ema_update", "--size", "ragged", "--backend", "reference", "--rounds", "1")
    steps = [
        Step("parity", ("pytest", str(suite), *pytest_options), "parity.xml", 120),
        Step("ops", ("bench.ops", *quick, "--json", "ops.json"), "ops.json", 120),
        Step("train_step", ("json.tool", "none_such"), "none.json", 120),
        Step("slow", ("timeit", "-n", "1", "import time; time.sleep(60)"), "none.json", 1),
    ]
    outcome = gpu.run(steps, tmp_path / "out")
    said = {name: step["outcome"] for name, step in outcome.items()}
    assert said == {
        "parity": "failed with exit code 1",
        "ops": "done",
        "train_step": "failed with exit code 2",
        "slow": "took longer than 1 s",
    }
    content = gpu.report(outcome, FACTS, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == content
    assert [content["parity"][n] for n in ("tests", "failures", "skipped")] == [3, 1, 1]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "1 of 3 tests passed" in text
    assert "test_bad: AssertionError: one is not two" in text
    assert "| slow       | took longer than 1 s" in text
    assert "| ema_update | ragged | float32 |      | reference " in text
    (row,) = content["predicted"]
    assert row["work"] == "ema_update ragged float32"
    (timed,) = [r for r in content["ops"] if r["kind"] == "ours"]
    assert row["predicted ms"] == pytest.approx(1e3 * timed["bytes"] / GPUS["H100"].bandwidth)


def test_predictions_are_the_larger_bound() -> None:
    bandwidth, rate = GPUS["H100"].bandwidth, GPUS["H100"].flops
    assert predicted_seconds("NVIDIA H100 PCIe", int(bandwidth), 0) == pytest.approx(1)
    assert predicted_seconds("NVIDIA H100 PCIe", 0, int(3 * rate)) == pytest.approx(3)
    assert predicted_seconds("Unknown", 1, 1) is None
