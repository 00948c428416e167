"""The callbacks of every run: progress, clipping, precision, speed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from loguru import logger
from torch import Tensor, nn

from .callback import Batch, Callback, EveryN
from .ema import Optimizer
from .optimizer import clip_coefficient
from .schedule import Schedule

if TYPE_CHECKING:
    from .step import Loss
    from .trainer import Trainer

__all__ = ["Callback", "EveryN", "GradClip", "IterSpeed", "LowPrecision", "ProgressBar"]


class GradClip(Callback):
    """Gives the optimizer the coefficient that clips the global gradient norm.

    The gradients themselves stay as they are for the hooks that follow.

    Args:
        clip_norm: largest norm.
        force_finite: set nan and infinite entries of the gradients to 0 instead of skipping the
            update, as the original does; the same as `trainer.non_finite=zero`.
        model_key: "model", or None to do nothing at all.
        fsdp_enabled: taken for configurations of the original; the norm is over all shards anyway.
    """

    def __init__(
        self,
        clip_norm: float = 1.0,
        force_finite: bool = False,
        model_key: str | None = "model",
        fsdp_enabled: bool = False,
    ):
        if clip_norm <= 0:
            raise ValueError(f"trainer.callbacks.grad_clip.clip_norm={clip_norm}: must be positive")
        if model_key not in ("model", None):
            raise ValueError(
                f'trainer.callbacks.grad_clip.model_key={model_key!r}: allowed are "model" and null'
            )
        self.clip_norm = clip_norm
        self.force_finite = force_finite
        self.enabled = model_key is not None
        self.fsdp_enabled = fsdp_enabled

    def on_before_optimizer_step(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Schedule, iteration: int = 0
    ) -> None:
        if not self.enabled:
            return
        gradients = self.trainer.gradients
        if self.force_finite:
            gradients.make_finite()
        gradients.clip_coef = clip_coefficient(gradients.norm, self.clip_norm)


class LowPrecision(Callback):
    """Casts the floating tensors of each batch to the model's precision; idle in float32.

    Args:
        update_iter: taken for configurations of the original, which copied masters back into the
            parameters every so many updates. Here every update writes both.
    """

    def __init__(self, update_iter: int = 1):
        if update_iter != 1:
            raise ValueError(
                f"trainer.callbacks.low_prec.update_iter={update_iter}: parameters follow their "
                "masters with every update; leave it at 1"
            )

    def on_training_step_start(self, model: nn.Module, data: Batch, iteration: int = 0) -> None:
        self._cast(data)

    def on_validation_step_start(self, model: nn.Module, data: Batch, iteration: int = 0) -> None:
        self._cast(data)

    def _cast(self, data: Batch) -> None:
        dtype = self.trainer.dtype
        if dtype == torch.float32:
            return
        for name, value in data.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                data[name] = value.to(dtype)


class IterSpeed(EveryN):
    """Logs loss and time per update: each of the first `hit_thres`, then every n-th.

    Args:
        every_n: distance in updates.
        hit_thres: so many updates of this process are logged one by one.
    """

    def __init__(self, every_n: int = 200, hit_thres: int = 1000):
        super().__init__(every_n)
        self.hit_thres = hit_thres
        self._hits = 0
        self._logged_at = (0, 0.0)  # iteration, seconds

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        super().on_train_start(model, iteration)
        self._logged_at = (iteration, time.perf_counter())

    def is_due(self, iteration: int) -> bool:
        self._hits += 1
        return self._hits <= self.hit_thres or super().is_due(iteration)

    def every_n_impl(
        self,
        trainer: Trainer,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int,
    ) -> None:
        value = loss.item()  # waits for the device, so that the time below is real
        now = time.perf_counter()
        since, started = self._logged_at
        self._logged_at = (iteration, now)
        logger.info(
            f"iteration {iteration}: loss {value:.4f}, "
            f"{(now - started) / max(1, iteration - since):.3f} s/iteration"
        )


class ProgressBar(Callback):
    """A bar with the remaining time; without a terminal a line every `seconds`.

    Args:
        seconds: least time between two lines.
    """

    def __init__(self, seconds: float = 10.0):
        self.seconds = seconds
        self._bar: Any = None
        self._started = self._printed = 0.0
        self._first = 0

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        self._first = iteration
        self._started = self._printed = time.perf_counter()
        if sys.stderr.isatty() and self.trainer.processes.is_main:
            self._bar = self._make_bar(iteration)

    def on_training_step_end(
        self,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int = 0,
    ) -> None:
        if not self.trainer.processes.is_main:
            return
        if self._bar:
            self._bar.update(self._task, completed=iteration, loss=self._loss())
            return
        now = time.perf_counter()
        last = iteration >= self.trainer.max_iter
        if iteration > self._first and (last or now - self._printed >= self.seconds):
            self._printed = now
            pace = (now - self._started) / (iteration - self._first)
            left = pace * (self.trainer.max_iter - iteration)
            print(
                f"iteration {iteration}/{self.trainer.max_iter}{self._loss()}"
                f"  {pace:.2f} s/iteration  {int(left) // 60}:{int(left) % 60:02d} left",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, model: nn.Module, iteration: int = 0) -> None:
        self._close()

    def on_app_end(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _loss(self) -> str:
        loss = self.trainer.metrics.latest.get("loss")
        return "" if loss is None else f"  loss {loss:.4f}"

    def _make_bar(self, iteration: int) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = bar.add_task(
            "training", total=self.trainer.max_iter, completed=iteration, loss=""
        )
        bar.start()
        return bar
