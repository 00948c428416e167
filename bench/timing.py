"""Timing to be trusted: rivals take turns, medians of many rounds, the limit in the same run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import batches
from kernels.adaln_attention import compiled as compiled_attention

WARM_UP = 3  # rounds, of which the fastest decides who is slow
SLOW = 5  # times slower than the fastest: timed apart
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is a limit


@dataclass(frozen=True)
class Time:
    """Seconds of one call over many rounds.

    Attributes:
        median: of all rounds.
        spread: half the distance between the quartiles (of fewer than four rounds, between the
            fastest and the slowest), relative to the median.
    """

    median: float
    spread: float


def take_turns(
    rivals: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = WARM_UP
) -> dict[str, Time]:
    """Time all rivals in each round, so that what slows the machine down slows all of them.

    Those that are many times slower take their turns afterwards: in the same rounds they would
    leave the data of the others cold, in caches and page tables.
    """
    first = {name: min(_seconds(call) for _ in range(warm_up)) for name, call in rivals.items()}
    fastest = min(first.values())
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for is_slow, count in ((False, rounds), (True, max(3, rounds // 3))):
        chosen = {n: rivals[n] for n, value in first.items() if (value > SLOW * fastest) == is_slow}
        for _ in range(count):
            for name, call in chosen.items():
                seconds[name].append(_seconds(call))
    return {name: _summary(values) for name, values in seconds.items()}


def wait() -> None:
    """Until the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_pass(size: int, device: torch.device | str, *, reads_only: bool) -> Callable[[], Any]:
    """A plain pass that moves `size` bytes: what no kernel with that traffic can beat by much.

    Args:
        size: bytes read and written together.
        reads_only: add the numbers up; otherwise each is read, changed and written back.
    """
    if reads_only:
        numbers = torch.zeros(max(1, size // 4), device=device)
        return numbers.sum
    buffer = torch.zeros(max(1, size // 8), device=device)

    def change() -> Tensor:
        return buffer.add_(1.0)

    return change


def matrix_product(dtype: torch.dtype, device: torch.device | str) -> tuple[Callable[[], Any], int]:
    """A square matrix product and its flops: what no kernel made of products can beat by much."""
    side = MATRIX[torch.device(device).type]
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    return lambda: matrix @ matrix, 2 * side**3


def forget_compiled() -> None:
    """Start anew with `torch.compile`: what was compiled before shapes what is compiled next.

    A function that has seen several sizes is compiled for any size, and one that has been compiled
    too often no longer at all.
    """
    torch.compiler.reset()
    for kept in (batches.compiled, compiled_attention.planned):
        kept.cache_clear()


def machine(device: torch.device | str) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    facts: dict[str, Any] = {
        "device": _processor() if torch.device(device).type == "cpu" else _gpu(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy"):
        facts[package] = package_version(package)
    return facts


def package_version(name: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe(facts: Mapping[str, Any]) -> str:
    """One line of what `machine` found."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def markdown(rows: list[dict[str, Any]], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """A table of rows; columns: key of a row -> how it is written. Absent values stay empty."""
    cells = [list(columns)]
    cells += [
        ["" if row.get(key) is None else write(row[key]) for key, write in columns.items()]
        for row in rows
    ]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _seconds(call: Callable[[], Any]) -> float:
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def _summary(values: list[float]) -> Time:
    if len(values) < 4:
        low, median, high = min(values), statistics.median(values), max(values)
    else:
        low, median, high = statistics.quantiles(values, n=4)
    return Time(median, (high - low) / 2 / median)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {models[0]}" if models else f"CPU {platform.machine()}"


def _gpu(device: torch.device | str) -> str:
    return torch.cuda.get_device_name(torch.device(device))
