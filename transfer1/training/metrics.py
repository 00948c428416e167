"""Numbers of a run: a JSON object per update in `metrics.jsonl`, and TensorBoard if installed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from torch import Tensor, nn

from .callback import Callback

if TYPE_CHECKING:
    from .step import Loss


class Metrics(Callback):
    """Collects the numbers of every update; the trainer adds it to every run.

    Numbers stay on the device until `every_n` updates are together: one transfer for all of them.
    A record of an update holds iteration, loss, edm_loss, mse_loss (means over its micro-steps),
    lr, grad_norm (before clipping), skipped (1 where the update was not applied) and seconds.
    Values that are not finite are written as null. Other callbacks add records with `write`.

    Args:
        path: the JSONL file. Records after the iteration that a run resumes from are dropped.
        every_n: updates per transfer.
        writes: whether this process writes them.
    """

    def __init__(self, path: Path, every_n: int = 10, writes: bool = True):
        self.path = path
        self.writes = writes
        self.every_n = max(1, every_n)
        self.latest: dict[str, float] = {}  # numbers of the last update that was written
        self._terms: dict[str, Tensor] = {}  # sums over the micro-steps of this update
        self._micro_steps = 0
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._last_iteration = 0
        self._last_time = 0.0
        self._board: Any = None

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        if self.writes:
            self._keep_records_until(iteration)
            self._board = _open_board(self.path.parent / "tensorboard", iteration)
        self._last_iteration, self._last_time = iteration, time.perf_counter()

    def on_training_step_end(
        self,
        model: nn.Module,
        data_batch: dict[str, Any],
        output_batch: Loss,
        loss: Tensor,
        iteration: int = 0,
    ) -> None:
        for name, value in output_batch.terms.items():
            self._terms[name] = self._terms[name] + value if self._micro_steps else value
        self._micro_steps += 1
        if iteration == self._last_iteration:
            return
        now = time.perf_counter()
        gradients = self.trainer.gradients
        values = {name: value / self._micro_steps for name, value in self._terms.items()}
        values |= {"lr": gradients.lr, "grad_norm": gradients.norm, "skipped": gradients.found_inf}
        self._pending.append((iteration, now - self._last_time, values))
        self._last_iteration, self._last_time, self._micro_steps = iteration, now, 0
        if len(self._pending) >= self.every_n:
            self.flush()

    def on_save_checkpoint(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        self.flush()

    def on_train_end(self, model: nn.Module, iteration: int = 0) -> None:
        self.flush()

    def on_app_end(self) -> None:
        self.flush()
        if self._board:
            self._board.close()

    def flush(self) -> None:
        """Fetch and write all numbers collected so far."""
        if not self._pending:
            return
        names = list(self._pending[0][2])
        columns = [
            [values[name].float().reshape(()) for name in names] for *_, values in self._pending
        ]
        rows = torch.stack([torch.stack(column) for column in columns]).tolist()
        for (iteration, seconds, _), row in zip(self._pending, rows, strict=True):
            self.latest = dict(zip(names, row, strict=True))
            self.write(iteration, {**self.latest, "seconds": seconds})
        self._pending.clear()

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append one record, for instance {"val_loss": 0.5}."""
        if not self.writes:
            return
        record: dict[str, Any] = {"iteration": iteration}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)

    def _keep_records_until(self, iteration: int) -> None:
        records = read_metrics(self.path) if self.path.exists() else []
        kept = [json.dumps(record) + "\n" for record in records if record["iteration"] <= iteration]
        self.path.write_text("".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a line that a crash cut off is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning(f"{path}: dropped an incomplete line")
    return records


def _open_board(folder: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed: metrics go to metrics.jsonl alone")
        return None
    return SummaryWriter(folder, purge_step=iteration + 1)
