"""Named ranges around what a run does, for tools that show where its time goes.

Put on from outside, by hooks of the trainer and of modules and around bound methods: what is marked
does not know of it, and a run without `Ranges` does nothing more than before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from transfer1.model.block import AdaLNSublayer, TransformerBlock

from .callback import Callback


class Ranges(Callback):
    """Calls `push(name)` and `pop()` around the parts of every step, properly nested.

    The names: data, forward (within it encode, blocks by their name in the model and sublayers by
    their class), backward, gradient norm, optimizer, ema (within optimizer where it is the same
    pass), checkpoint. Blocks that are recomputed for the backward pass appear there again.

    Args:
        push: opens a range.
        pop: closes the range that was opened last.
    """

    def __init__(self, push: Callable[[str], Any], pop: Callable[[], Any]):
        self._push = push
        self._pop = pop
        self._loading = False

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        trainer = self.trainer
        self._wrap(trainer, "compute_loss", "forward")
        self._wrap(trainer.state.model.tokenizer, "encode", "encode")
        self._wrap(trainer.gradients, "measure", "gradient norm")
        self._wrap(trainer.state.optimizer, "step", "optimizer")
        self._wrap(trainer.state.ema, "update", "ema")
        self._wrap(trainer.checkpointer, "save", "checkpoint")
        for name, module in model.named_modules():
            if isinstance(module, TransformerBlock):
                self._hook(module, name)
            elif isinstance(module, AdaLNSublayer):
                self._hook(module.block, type(module.block).__name__)

    def on_before_dataloading(self, iteration: int = 0) -> None:
        if not self._loading:  # called again where the loader starts over
            self._push("data")
        self._loading = True

    def on_after_dataloading(self, iteration: int = 0) -> None:
        self._loading = False
        self._pop()

    def on_before_backward(self, model: nn.Module, loss: Tensor, iteration: int = 0) -> None:
        self._push("backward")

    def on_after_backward(self, model: nn.Module, iteration: int = 0) -> None:
        self._pop()

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        """Put a range around a bound method; an absent owner has none."""
        if owner is None:
            return
        call = getattr(owner, method)

        def marked(*args: Any, **kwargs: Any) -> Any:
            self._push(name)
            try:
                return call(*args, **kwargs)
            finally:
                self._pop()

        setattr(owner, method, marked)

    def _hook(self, module: nn.Module, name: str) -> None:
        def enter(*_: Any) -> None:
            self._push(name)

        def leave(*_: Any) -> None:
            self._pop()

        module.register_forward_pre_hook(enter)
        # Recomputation ends with an exception as soon as it has what it needs.
        module.register_forward_hook(leave, always_call=True)
