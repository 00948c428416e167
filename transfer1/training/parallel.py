"""How a model is spread over the processes of a run, from outside: it knows nothing of them.

Imports of `torch.distributed` packages that take long stand where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from transfer1.config import Config

from .processes import Processes
from .step import Loss

ComputeLoss = Callable[..., Loss]


class LossModule(nn.Module):
    """A model as a module whose forward pass is the loss of a batch.

    What wraps modules (DistributedDataParallel) then sees all uses of the parameters.
    """

    def __init__(self, model: nn.Module, compute: ComputeLoss) -> None:
        super().__init__()
        self.model = model
        self.compute = compute

    def forward(self, *args: Any) -> tuple[Tensor, Loss]:
        """Return what is differentiated, and the loss with all its parts."""
        loss = self.compute(*args)
        return loss.total, loss


class ReplicatedLoss:
    """The loss of a model of which every process has a copy; gradients are averaged (DDP).

    Args:
        model: its parameters and buffers become those of the main process.
        compute: the loss of one process's part of the batch, with all arguments.
        options: the config node `trainer.ddp`.
    """

    def __init__(self, model: nn.Module, compute: ComputeLoss, options: Any) -> None:
        from torch.nn.parallel import DistributedDataParallel

        device = next(model.parameters()).device
        self._wrapped = DistributedDataParallel(
            LossModule(model, compute),
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=options.find_unused_parameters,
            static_graph=options.static_graph,
            broadcast_buffers=options.broadcast_buffers,
        )

    def __call__(self, *args: Any) -> Loss:
        total, loss = self._wrapped(*args)
        return replace(loss, total=total)

    def last_backward(self, last: bool) -> Any:
        """Forward and backward pass in this context average the gradients if they are the last."""
        return nullcontext() if last else self._wrapped.no_sync()


class WholeLoss:
    """The loss of a model that needs nothing around it: of one process, or of shards that gather
    themselves."""

    def __init__(self, compute: ComputeLoss) -> None:
        self._compute = compute

    def __call__(self, *args: Any) -> Loss:
        return self._compute(*args)

    def last_backward(self, last: bool) -> Any:
        """Every backward pass adds to the gradients of this process."""
        return nullcontext()


def parallel_loss(
    config: Config, processes: Processes, model: nn.Module, compute: ComputeLoss
) -> ReplicatedLoss | WholeLoss:
    """The loss as the training differentiates it, by `trainer.distributed_parallelism`."""
    if processes.size > 1 and config.trainer.distributed_parallelism == "ddp":
        return ReplicatedLoss(model, compute, config.trainer.ddp)
    return WholeLoss(compute)


def average_terms(loss: Loss, processes: Processes) -> Loss:
    """The loss with numbers that are means over the global batch; its graph is let go."""
    if processes.size == 1:
        return loss
    means = processes.means({**loss.terms, "": loss.total})
    return replace(loss, total=means.pop(""), terms=means)
