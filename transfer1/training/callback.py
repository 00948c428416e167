"""Hooks around the steps of a run; their names are those of the original.

A callback overrides the hooks it needs. `self.trainer` (see `Trainer`) is set before the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from transfer1.config import instantiate

from .ema import Optimizer
from .schedule import Schedule

if TYPE_CHECKING:
    from .step import Loss
    from .trainer import Trainer

Batch = dict[str, Any]


class Callback:
    """Base class; every hook does nothing.

    `iteration` counts optimizer updates: hooks up to on_before_zero_grad see the number of updates
    before this one, on_training_step_end sees it included. With gradient accumulation the hooks of
    loading, step, backward fire for every micro-step; those of the optimizer for the last one only.
    """

    trainer: Trainer

    def on_optimizer_init_start(self) -> None:
        """Model built, optimizer not yet."""

    def on_optimizer_init_end(self) -> None:
        """Optimizer, schedule and EMA built."""

    def on_load_checkpoint_start(self, model: nn.Module) -> None:
        """A checkpoint is about to be read; not called on a start from scratch."""

    def on_load_checkpoint(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """The content of the checkpoint file, before anything is taken from it."""

    def on_load_checkpoint_end(self, model: nn.Module) -> None:
        """The state is restored."""

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        """Everything is built and loaded."""

    def on_before_dataloading(self, iteration: int = 0) -> None:
        """Before each attempt to take a batch: once more where the loader starts over."""

    def on_after_dataloading(self, iteration: int = 0) -> None:
        """A batch was taken; it is not used if the run ends here."""

    def on_training_step_start(self, model: nn.Module, data: Batch, iteration: int = 0) -> None:
        """`data` is the batch on the device, a dict of this step alone; entries may be replaced."""

    def on_before_backward(self, model: nn.Module, loss: Tensor, iteration: int = 0) -> None:
        """`loss` is about to be differentiated."""

    def on_after_backward(self, model: nn.Module, iteration: int = 0) -> None:
        """Gradients of this micro-step are added up."""

    def on_before_optimizer_step(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Schedule, iteration: int = 0
    ) -> None:
        """Gradients are complete; `self.trainer.gradients` holds their norm."""

    def on_before_zero_grad(
        self, model: nn.Module, optimizer: Optimizer, scheduler: Schedule, iteration: int = 0
    ) -> None:
        """The update is done, gradients are still there.

        The averages are updated by then, in the optimizer's pass, unless a callback that is not of
        this package implements this hook: then they are updated after it.
        """

    def on_training_step_end(
        self,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int = 0,
    ) -> None:
        """The micro-step is over."""

    def on_validation_start(
        self, model: nn.Module, dataloader_val: Any, iteration: int = 0
    ) -> None:
        """EMA weights are in the model from here to on_validation_end, if there is an EMA."""

    def on_validation_step_start(self, model: nn.Module, data: Batch, iteration: int = 0) -> None:
        """As on_training_step_start, for a batch of the validation data."""

    def on_validation_step_end(
        self,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int = 0,
    ) -> None:
        """One batch of the validation data is evaluated."""

    def on_validation_end(self, model: nn.Module, iteration: int = 0) -> None:
        """The validation is over."""

    def on_save_checkpoint(self, model: nn.Module, state_dict: dict[str, Any]) -> None:
        """The content of the next checkpoint file, not yet copied; entries may be added."""

    def on_save_checkpoint_success(self, iteration: int = 0) -> None:
        """The checkpoint of `iteration` lies on the disk."""

    def on_train_end(self, model: nn.Module, iteration: int = 0) -> None:
        """`max_iter` is reached (not called after Ctrl-C) and saved.

        Lines appended to `self.trainer.summary` are printed at the end of the run, and again by a
        rerun of it; so is `self.trainer.exit_code` returned.
        """

    def on_app_end(self) -> None:
        """The run ends, finished, interrupted or by an error."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class CallBackGroup:
    """Calls one hook of all callbacks, in configuration order.

    Args:
        callbacks: built callbacks.
        trainer: handed to each of them as `callback.trainer`.
    """

    def __init__(self, callbacks: Iterable[Callback], trainer: Trainer):
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            callback.trainer = trainer

    def __getattr__(self, hook: str) -> Any:
        if hook not in HOOKS:
            raise AttributeError(f"callbacks have no hook {hook!r}; hooks are {', '.join(HOOKS)}")

        def call(*args: Any, **kwargs: Any) -> None:
            for callback in self.callbacks:
                getattr(callback, hook)(*args, **kwargs)

        return call


def implements(callback: Callback, hook: str) -> bool:
    """Whether a callback does anything in this hook."""
    return getattr(getattr(callback, hook), "__func__", None) is not getattr(Callback, hook)


def build_callbacks(nodes: Mapping[str, Any] | None) -> list[Callback]:
    """Build the callbacks of `trainer.callbacks`; entries without target are skipped.

    Raises:
        ValueError: a target is not a `Callback`.
    """
    callbacks = []
    for name, node in (nodes or {}).items():
        if node is None or "_target_" not in node:
            continue
        callback = instantiate(node)
        if not isinstance(callback, Callback):
            raise ValueError(
                f"trainer.callbacks.{name}: {type(callback).__name__} is not a Callback; derive it "
                "from transfer1.training.callbacks.Callback"
            )
        callbacks.append(callback)
    return callbacks


class EveryN(Callback):
    """Calls `every_n_impl` after every n-th update.

    Args:
        every_n: distance in updates; 0 never fires.
        run_at_start: also fire after the first update of the run.
    """

    def __init__(self, every_n: int, run_at_start: bool = False):
        if every_n < 0:
            raise ValueError(
                f"every_n={every_n}: give a positive number of updates, or 0 for never"
            )
        self.every_n = every_n
        self.run_at_start = run_at_start
        self._last_iteration = -1

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        self._last_iteration = iteration

    def on_training_step_end(
        self,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int = 0,
    ) -> None:
        if iteration == self._last_iteration:  # a micro-step that completes no update
            return
        self._last_iteration = iteration
        if self.is_due(iteration):
            self.every_n_impl(self.trainer, model, data_batch, output_batch, loss, iteration)

    def is_due(self, iteration: int) -> bool:
        """Whether to fire after this update."""
        if iteration == 1 and self.run_at_start:
            return True
        return self.every_n > 0 and iteration % self.every_n == 0

    def every_n_impl(
        self,
        trainer: Trainer,
        model: nn.Module,
        data_batch: Batch,
        output_batch: Loss,
        loss: Tensor,
        iteration: int,
    ) -> None:
        """What to do; the arguments are those of on_training_step_end."""
        raise NotImplementedError
