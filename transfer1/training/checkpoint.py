"""Checkpoints of a run: written on a thread, loaded by the priorities of the original."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from loguru import logger

from transfer1.interop.files import save_atomically

from .callback import CallBackGroup
from .checkpoint_file import (
    CheckpointError,
    fit_weights,
    from_layout,
    read_checkpoint,
    snapshot,
    to_layout,
)
from .job import write_atomically
from .processes import Processes
from .state import PARTS, TrainState

LATEST = "latest_checkpoint.txt"


class CheckpointOptions(Protocol):
    """The keys of the config node `checkpoint` that a checkpointer reads."""

    save_iter: int
    load_path: str
    load_training_state: bool
    only_load_scheduler_state: bool
    strict_resume: bool
    keys_not_to_resume: Sequence[str]
    load_ema_to_reg: bool


class MultiRankCheckpointer:
    """Saves and loads `iter_%09d.pt` in the layout `multi_rank`, and `latest_checkpoint.txt`.

    Args:
        config: the node `checkpoint`.
        folder: where the files of this job lie.
        callbacks: told about every load and save.
        processes: the main one writes; all of them save and load together.
    """

    def __init__(
        self,
        config: CheckpointOptions,
        folder: Path,
        callbacks: CallBackGroup,
        processes: Processes | None = None,
    ):
        unknown = sorted(set(config.keys_not_to_resume) - set(PARTS))
        if unknown:
            raise ValueError(
                f"checkpoint.keys_not_to_resume={list(config.keys_not_to_resume)}: unknown "
                f"{', '.join(unknown)}; allowed are {', '.join(PARTS)}"
            )
        self.config = config
        self.folder = folder
        self.callbacks = callbacks
        self.processes = processes or Processes()
        self._writer: _Writer | None = None

    def latest(self) -> Path | None:
        """The checkpoint that a rerun resumes from; None before the first one."""
        pointer = self.folder / LATEST
        return self.folder / pointer.read_text().strip() if pointer.exists() else None

    def latest_iteration(self) -> int:
        """Iteration of the newest checkpoint, 0 if there is none."""
        path = self.latest()
        return int(path.stem.split("_")[1]) if path else 0

    def save(self, state: TrainState) -> None:
        """Copy the state now and write it on a thread; an earlier write is waited for first.

        Raises:
            RuntimeError: the earlier write failed.
        """
        self.wait()
        content = to_layout(state.state_dict())
        self.callbacks.on_save_checkpoint(state.model, content)
        copied = snapshot(content, keep=self.processes.is_main)
        if self.processes.is_main:
            self._writer = _Writer(self.folder, state.iteration, copied)
            self._writer.start()

    def poll(self) -> None:
        """Report a write that has ended since, without waiting for one that has not.

        Raises:
            RuntimeError: it failed.
        """
        if self._writer and not self._writer.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved lies on the disk.

        Raises:
            RuntimeError: it could not be written.
        """
        writer, self._writer = self._writer, None
        if writer is None:
            return
        writer.join()
        if writer.error is not None:
            raise RuntimeError(
                f"{writer.path} could not be written: {writer.error}; free some space or make the "
                f"folder writable, then rerun the command: it resumes from {self.latest()}"
            ) from writer.error
        logger.info(f"saved {writer.path}")
        self.callbacks.on_save_checkpoint_success(writer.iteration)

    def load(self, state: TrainState) -> Path | None:
        """Fill the state from the newest checkpoint of the job, else from `load_path`.

        The newest one brings back everything but `keys_not_to_resume`. `load_path` brings the
        model, with `only_load_scheduler_state` the schedule too, with `load_training_state` all.
        `load_ema_to_reg` puts the averaged weights of `load_path` into the model.

        Returns:
            the file that was read, None for a start from scratch.

        Raises:
            CheckpointError: a file is missing, unreadable, or does not fit the model.
        """
        path = self.latest()
        resumes = path is not None
        if path is None:
            if not self.config.load_path:
                return None
            path = Path(self.config.load_path)
        self.callbacks.on_load_checkpoint_start(state.model)
        content = read_checkpoint(path)
        self.callbacks.on_load_checkpoint(state.model, content)
        loaded = from_layout(content, path)
        parts = self._parts_to_load(resumes)
        if self.config.load_ema_to_reg and not resumes:
            _use_averages(loaded, path)
        if "model" in parts:
            loaded["model"] = fit_weights(
                loaded["model"], state.model, strict=self.config.strict_resume, source=path
            )
        _check_kernels(loaded, state, path)
        try:
            state.load_state_dict(loaded, parts)
        except (KeyError, ValueError) as error:
            reason = f"it holds no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{path} does not fit this run: {reason}; leave parts out with "
                "checkpoint.keys_not_to_resume, or give the job another name to start afresh"
            ) from error
        self.callbacks.on_load_checkpoint_end(state.model)
        logger.info(f"loaded {', '.join(sorted(parts))} from {path}, iteration {state.iteration}")
        return path

    def _parts_to_load(self, resumes: bool) -> set[str]:
        if resumes or self.config.load_training_state:
            return set(PARTS) - set(self.config.keys_not_to_resume)
        return {"model", "scheduler"} if self.config.only_load_scheduler_state else {"model"}


class _Writer(threading.Thread):
    """Writes one checkpoint, then points `latest_checkpoint.txt` at it; `wait` raises its error."""

    def __init__(self, folder: Path, iteration: int, content: Mapping[str, Any]):
        super().__init__(name="checkpoint writer", daemon=False)
        self.path = folder / f"iter_{iteration:09d}.pt"
        self.iteration = iteration
        self.error: Exception | None = None
        self._content: Mapping[str, Any] | None = content

    def run(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(self._content, self.path)
            write_atomically(self.path.with_name(LATEST), f"{self.path.name}\n")
        except Exception as error:  # raised again by `wait`, on the thread that trains
            self.error = error
        finally:
            self._content = None


def _use_averages(loaded: dict[str, Any], path: Path) -> None:
    averages = loaded.get("ema")
    if not averages:
        raise CheckpointError(
            f"{path} holds no averaged weights, but checkpoint.load_ema_to_reg asks for them"
        )
    by_name = {name.replace(".", "-"): name for name in loaded["model"]}
    unknown = sorted(averages.keys() - by_name.keys())
    if unknown:
        raise CheckpointError(f"{path}: averages of unknown parameters {', '.join(unknown[:5])}")
    loaded["model"] = {
        **loaded["model"],
        **{by_name[name]: value for name, value in averages.items()},
    }


def _check_kernels(loaded: Mapping[str, Any], state: TrainState, path: Path) -> None:
    saved = loaded.get("kernels")
    if saved is not None and saved != state.kernels:
        changed = [
            f"{op}: {saved.get(op)} -> {state.kernels.get(op)}"
            for op in sorted(saved.keys() | state.kernels.keys())
            if saved.get(op) != state.kernels.get(op)
        ]
        logger.warning(f"{path} was written with other kernels ({', '.join(changed)})")
