"""The folder of a job: configuration, log, seed, checkpoints and the summary of a finished run."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loguru import logger

# What "${now:%Y-%m-%d}_${now:%H-%M-%S}" leaves in a name.
TIMESTAMP = re.compile(r"\d{4}-\d{2}-\d{2}[_T-]\d{2}[-:]\d{2}[-:]\d{2}")
LOG_FORMAT = "{time:YYYY-MM-DD HH:mm:ss} | {level: <7} | {message}"


class JobFolder:
    """Paths and small files of one job.

    Args:
        path: `job.path_local`, `<OUTPUT_ROOT or checkpoints>/<project>/<group>/<name>`.
        name: `job.name`.
        writes: whether this process writes the files; the others only read, and log errors alone.
    """

    def __init__(self, path: str | Path, name: str, writes: bool = True):
        self.path = Path(path)
        self.name = name
        self.writes = writes
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.yaml"
        self.log = self.path / "stdout.log"
        self.metrics = self.path / "metrics.jsonl"
        self.profile = self.path / "profile"
        self._seed = self.path / "seed.txt"
        self._summary = self.path / "summary.json"

    @property
    def has_timestamp(self) -> bool:
        """Whether each start of the same command gets a folder of its own."""
        return bool(TIMESTAMP.search(self.name))

    def first_seed(self, seed: int, timestamp_seed: bool) -> int:
        """Return the configured seed, or one that is drawn at the first start of a job and kept."""
        if not timestamp_seed:
            return seed
        if not self._seed.exists():
            write_atomically(self._seed, f"{time.time_ns() // 1000 % 2**32}\n")
        return int(self._seed.read_text())

    def create(self, config: str) -> None:
        """Make the folder and keep the configuration of this start in it."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config.write_text(config)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep what a finished run printed, and its exit code."""
        if not self.writes:
            return
        write_atomically(self._summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """Return what the finished run left, None where no run has finished."""
        return json.loads(self._summary.read_text()) if self._summary.exists() else None

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Write the log to the terminal and, appending, to `stdout.log`."""
        _log_to_terminal("INFO" if self.writes else "ERROR")
        if not self.writes:
            yield
            return
        handler = logger.add(self.log, format=LOG_FORMAT, level="INFO")
        try:
            yield
        finally:
            logger.remove(handler)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


_terminal_handlers: list[int] = []


def _log_to_terminal(level: str) -> None:
    """Replace loguru's first handler, once, by one that follows `sys.stderr` (a live progress bar
    puts its own stream there, so that log lines appear above the bar)."""
    if _terminal_handlers:
        return
    with suppress(ValueError):  # somebody removed it before
        logger.remove(0)
    _terminal_handlers.append(logger.add(_write_to_terminal, format=LOG_FORMAT, level=level))


def _write_to_terminal(line: str) -> None:
    sys.stderr.write(line)
