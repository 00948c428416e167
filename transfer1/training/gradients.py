"""What is known about the gradients of an update, and what happens when they are not finite.

Everything stays on the device: the host learns of a skipped update one update later, when its flag
has long arrived, and so never waits for it.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.distributed as dist
from loguru import logger
from torch import Tensor

from kernels import Ops

from .ema import Optimizer
from .shards import local_gradient, sharing_groups
from .state import TrainState


class Gradients:
    """Norm and flags of the complete gradients of one update; all device tensors.

    Attributes:
        norm: global L2 norm before clipping, float32 [].
        found_inf: int32 [], 1 where some gradient is not finite: the optimizer skips the update.
        clip_coef: factor that the optimizer applies to the gradients; None for none.
        lr: learning rate of this update, float32 [].
    """

    norm: Tensor
    found_inf: Tensor
    lr: Tensor
    clip_coef: Tensor | None = None

    def __init__(self, optimizer: Optimizer, ops: Ops):
        self._groups = optimizer.param_groups
        self._ops = ops

    def measure(self) -> None:
        """Look at the gradients as they are now."""
        self.norm = self._global_norm()
        self.found_inf = (~self.norm.isfinite()).to(torch.int32)
        self.lr = self._groups[0]["lr"].clone()
        self.clip_coef = None

    def make_finite(self) -> None:
        """Set nan and infinite entries to 0, in place, and measure again."""
        for gradient in chain(*self._by_layout().values()):
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.measure()

    def _global_norm(self) -> Tensor:
        norms = []
        for groups, gradients in self._by_layout().items():
            norm = self._ops.grad_norm(gradients)
            for group in groups:  # of the processes that hold the other parts
                square = norm.square()
                dist.all_reduce(square, group=group)
                norm = square.sqrt()
            norms.append(norm)
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm()

    def _by_layout(self) -> dict[tuple[dist.ProcessGroup, ...], list[Tensor]]:
        """The gradients' parts in this process by the groups of processes that share a whole."""
        found: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for group in self._groups:
            for param in group["params"]:
                if param.grad is not None:
                    found.setdefault(sharing_groups(param), []).append(local_gradient(param))
        return found


class SkipCounter:
    """Counts skipped updates in the state of the run and ends a run that only skips.

    Args:
        state: holds the counts.
        max_skipped: so many skipped updates in a row end the run.
    """

    def __init__(self, state: TrainState, max_skipped: int):
        self.state = state
        self.max_skipped = max_skipped
        self._pending: tuple[int, _HostFlag] | None = None

    def note(self, found_inf: Tensor, iteration: int) -> None:
        """Take the flag of the update that ends at `iteration`, then look at the one before."""
        flag = _HostFlag(found_inf)
        self.settle()
        self._pending = (iteration, flag)

    def settle(self) -> None:
        """Count the update noted last.

        Raises:
            RuntimeError: too many updates in a row were skipped.
        """
        if self._pending is None:
            return
        (iteration, flag), self._pending = self._pending, None
        if not flag.read():
            self.state.skipped_in_a_row = 0
            return
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        logger.warning(
            f"update {iteration} was skipped: a gradient is not finite "
            f"({self.state.skipped_in_a_row} in a row, {self.state.skipped} in all)"
        )
        if self.state.skipped_in_a_row >= self.max_skipped:
            raise RuntimeError(
                f"{self.state.skipped_in_a_row} updates in a row had gradients that are not finite,"
                f" the last one at iteration {iteration}: lower optimizer.lr or look at the data; "
                f"the limit is trainer.max_skipped={self.max_skipped}, and trainer.non_finite=zero "
                "sets such entries to 0 instead of skipping"
            )


class _HostFlag:
    """A device flag on its way to the host."""

    def __init__(self, value: Tensor):
        self._event: torch.Event | None = None
        if value.is_cpu:
            self._host = value.clone()
            return
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._host.copy_(value, non_blocking=True)
        self._event = torch.Event(value.device)
        self._event.record()

    def read(self) -> bool:
        """Wait for the copy, which only takes time if the flag is new, and return it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)
