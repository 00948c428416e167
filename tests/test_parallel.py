"""Layouts over processes: each trains as one process does on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import torch
from parallel_runs import BASIC, LAYOUTS
from tiny import tiny_config
from torch import Tensor

from transfer1.training.metrics import read_metrics

TESTS = Path(__file__).parent
CLOSE = 1e-6


def launch(folder: Path, processes: int, names: list[str]) -> None:
    """Train layouts on so many processes; fails with their output."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={processes}", str(TESTS / "parallel_runs.py"), str(folder), *names),
    ]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def seen(folder: Path, name: str, processes: int) -> list[dict[str, Any]]:
    """What each process saw of a run."""
    return [torch.load(folder / name / f"rank_{rank}.pt") for rank in range(processes)]


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((value - second[name]).abs().max().item() for name, value in first.items())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one launch of two processes that trains all layouts."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, 2, list(LAYOUTS))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process that a layout must equal; each is trained once."""
    runs: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        both = LAYOUTS[name].both
        if both not in runs:
            folder = tmp_path_factory.mktemp("alone")
            runs[both] = parallel_runs.run(tiny_config(folder, *BASIC, *both))
        return runs[both]

    return of


def check(folder: Path, name: str, processes: int, expected: dict[str, Any]) -> None:
    """Losses, norms, parameters and averages equal those of one process, on every process."""
    ranks = seen(folder, name, processes)
    assert all(rank["norms"].equal(ranks[0]["norms"]) for rank in ranks)
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=CLOSE, atol=CLOSE)
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-5, atol=CLOSE)
        assert largest_difference(rank["model"], expected["model"]) <= CLOSE
        assert largest_difference(rank["ema"], expected["ema"]) <= CLOSE


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_train_as_one(two: Path, alone: Any, name: str) -> None:
    check(two, name, 2, alone(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_process_writes(two: Path, name: str) -> None:
    folder = two / name
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    assert (folder / "stdout.log").read_text().count("kernels: ") == 1
    assert [p.name for p in (folder / "checkpoints").glob("*.pt")] == ["iter_000000005.pt"]
