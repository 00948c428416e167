"""Layouts over processes: each trains as one process does on the same global batch."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_runs
import pytest
import torch
from parallel_runs import BASIC, LAYOUTS, OF_FOUR
from test_resume import difference, tensors
from tiny import ROOT, tiny_config
from torch import Tensor

from transfer1.config import ConfigError, compose
from transfer1.data.sampler import StreamSampler
from transfer1.training.checkpoint_file import read_checkpoint, snapshot, to_layout
from transfer1.training.metrics import read_metrics
from transfer1.training.trainer import Trainer

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
    parallel_runs.run(tiny_config(folder / "fsdp_from_one", *BASIC, "trainer.max_iter=3"))
    launch(folder, 2, list(LAYOUTS))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of one process that a layout must equal; each is trained once."""
    runs: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        both = {**LAYOUTS, **OF_FOUR}[name].both
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
        for numbers in ("losses", "norms"):
            last = expected[numbers][-len(rank[numbers]) :]  # all, or those since the resume
            torch.testing.assert_close(rank[numbers], last, rtol=1e-5, atol=CLOSE)
        assert largest_difference(rank["model"], expected["model"]) <= CLOSE
        assert largest_difference(rank["ema"], expected["ema"]) <= CLOSE


FLOAT32 = [name for name in LAYOUTS if "bfloat16" not in name]


@pytest.mark.parametrize("name", FLOAT32)
def test_two_processes_train_as_one(two: Path, alone: Any, name: str) -> None:
    check(two, name, 2, alone(name))


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path: Path, alone: Any) -> None:
    launch(tmp_path, 4, list(OF_FOUR))
    for name in OF_FOUR:
        check(tmp_path, name, 4, alone(name))
    name = "four_fsdp_tensor"
    assert difference(saved(tmp_path / name), saved(tmp_path / f"{name}_resumed")) == []


def test_a_single_process_can_shard(tmp_path: Path, alone: Any) -> None:
    """Without torchrun too; nothing is cut, and nothing differs."""
    run = parallel_runs.run(tiny_config(tmp_path, *BASIC, *parallel_runs.FSDP))
    assert run["sharded"] and largest_difference(run["model"], alone("fsdp")["model"]) <= CLOSE


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_process_writes(two: Path, name: str) -> None:
    folder = two / name
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    starts = 2 if LAYOUTS[name].stops or name.endswith("from_one") else 1
    assert (folder / "stdout.log").read_text().count("kernels: ") == starts
    assert (folder / "checkpoints" / "latest_checkpoint.txt").read_text() == "iter_000000005.pt\n"
    assert not list((folder / "checkpoints").glob("*RANK*"))


def test_shards_hold_their_part_alone(two: Path) -> None:
    for rank in seen(two, "fsdp", 2):
        whole = sum(value.numel() for value in rank["ema"].values())
        assert rank["sharded"] and rank["local_elements"] < 0.6 * whole


@pytest.mark.parametrize("name", ["fsdp", "fsdp_bfloat16", "fsdp_tensor"])
def test_resume_of_the_same_processes_is_exact(two: Path, name: str) -> None:
    straight, resumed = (saved(two / folder) for folder in (name, f"{name}_resumed"))
    assert difference(straight, resumed) == []


@pytest.mark.parametrize("name", ["fsdp_resumed", "fsdp_bfloat16_resumed", "fsdp_tensor_resumed"])
def test_one_process_resumes_what_two_have_saved(two: Path, tmp_path: Path, name: str) -> None:
    """Exactly where they stopped; from there on the numbers are those of any layout."""
    shutil.copytree(two / name / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest_checkpoint.txt").write_text("iter_000000003.pt\n")
    overrides = (*BASIC, *LAYOUTS[name].both)
    start = parallel_runs.load(tiny_config(tmp_path, *overrides))
    assert difference(saved(two / name, 3), tensors(snapshot(to_layout(start.state_dict())))) == []
    if "bfloat16" not in name:
        ended = parallel_runs.run(tiny_config(tmp_path, *overrides))
        assert largest_difference(ended["model"], seen(two, "fsdp", 2)[0]["model"]) <= CLOSE


def saved(folder: Path, iteration: int = 5) -> dict[str, Any]:
    """The leaves of a checkpoint."""
    return tensors(read_checkpoint(folder / "checkpoints" / f"iter_{iteration:09d}.pt"))


@pytest.mark.parametrize(
    ("option", "strategy", "offload"),
    [("full", "full", False), ("hybrid", "hybrid", False), ("offload", "full", True)],
)
def test_the_group_fsdp(option: str, strategy: str, offload: bool) -> None:
    config = compose(ROOT, [f"fsdp={option}"])
    assert config.trainer.distributed_parallelism == "fsdp" and config.model.fsdp_enabled
    assert config.model.fsdp.sharding_strategy == strategy
    assert config.model.fsdp.cpu_offload is offload


def test_groups_divide_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    overrides = (*parallel_runs.FSDP, "model.fsdp.sharding_strategy=hybrid")
    with pytest.raises(ConfigError, match="sharding_group_size=8: give a divisor of the 6"):
        Trainer(tiny_config(tmp_path, *overrides))


def test_parts_of_a_stream_are_the_whole() -> None:
    streams = [StreamSampler(range(7)) for _ in range(3)]  # type: ignore[arg-type]
    streams[0].start(5, 8)
    for replica, stream in enumerate(streams[1:]):
        stream.start(5, 8, replica, 2, 3)
    whole = list(itertools.islice(streams[0], 24))
    parts = [list(itertools.islice(stream, 12)) for stream in streams[1:]]
    batches = [part[n : n + 3] for n in range(0, 12, 3) for part in parts]
    assert [key for batch in batches for key in batch] == whole
