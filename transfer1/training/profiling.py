"""Looking into a run: `trainer.nvtx` for NVIDIA's tools, `trainer.profile` for PyTorch's traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import profile, supported_activities

from transfer1.config import Config, ConfigError

from .callback import Batch, Callback
from .ranges import Ranges

if TYPE_CHECKING:
    from .step import Loss


def profiling_callbacks(config: Config, folder: Path) -> list[Callback]:
    """What `trainer.nvtx` and `trainer.profile` ask for; nothing by default.

    Args:
        folder: where traces go.

    Raises:
        ConfigError: the package nvtx is missing, or an update is named that no run has.
    """
    options = config.trainer
    callbacks: list[Callback] = []
    if options.profile:
        wrong = [update for update in options.profile if not 1 <= update <= options.max_iter]
        if wrong:
            raise ConfigError(
                f"trainer.profile={list(options.profile)}: there is no update {wrong[0]}; they are "
                f"counted from 1 to trainer.max_iter={options.max_iter}"
            )
        callbacks += [Profiler(set(options.profile), folder), record_function_ranges()]
    if options.nvtx:
        callbacks.append(nvtx_ranges())
    return callbacks


def nvtx_ranges() -> Ranges:
    """Ranges that Nsight Systems shows: `nsys profile python train.py ...`."""
    try:
        import nvtx
    except ImportError as error:
        raise ConfigError(
            "trainer.nvtx=true needs the package nvtx, which is not installed: "
            "pip install 'transfer1[profile]', or set trainer.nvtx=false"
        ) from error
    return Ranges(nvtx.push_range, nvtx.pop_range)


def record_function_ranges() -> Ranges:
    """Ranges that traces of `torch.profiler` show."""
    opened: list[Any] = []

    def push(name: str) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    return Ranges(push, lambda: opened.pop().__exit__(None, None, None))


class Profiler(Callback):
    """Writes what PyTorch's profiler saw of chosen updates, one trace each.

    A trace holds all micro-steps of its update, the loading of their batches included, and opens in
    Perfetto (ui.perfetto.dev) or chrome://tracing.

    Args:
        updates: which ones, counted from 1; a resumed run does not go back to those behind it.
        folder: gets `iter_%09d.json.gz` for each.
    """

    def __init__(self, updates: set[int], folder: Path):
        self._updates = updates
        self._folder = folder
        self._profile: Any = None
        self._update = 0  # the one that is being traced

    def on_before_dataloading(self, iteration: int = 0) -> None:
        if self._profile is None and iteration + 1 in self._updates:
            self._update = iteration + 1
            self._profile = profile(activities=supported_activities())
            self._profile.start()

    def on_training_step_end(
        self,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int = 0,
    ) -> None:
        if self._profile is None or iteration < self._update:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"iter_{iteration:09d}.json.gz"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        logger.info(f"trace of update {iteration}: {path}")

    def on_app_end(self) -> None:
        if self._profile is not None:  # the run ends in the middle of an update
            self._profile.stop()
            self._profile = None
