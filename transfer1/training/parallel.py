"""How a model is spread over the processes of a run, from outside: it knows nothing of them.

Imports of `torch.distributed` packages that take long stand where they are needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from transfer1.config import Config
from transfer1.model.block import TransformerBlock
from transfer1.model.layers import LogVariance
from transfer1.model.transfer import Transfer

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
            forward_sync_buffers=options.broadcast_buffers,
        )
        self._first = options.static_graph

    def __call__(self, *args: Any) -> Loss:
        total, loss = self._wrapped(*args)
        return replace(loss, total=total)

    def last_backward(self, last: bool) -> Any:
        """Forward and backward pass in this context average the gradients if they are the last.

        A static graph is learned in a pass that averages, which the very first one is too; the mean
        of what is averaged already does not change by the next averaging.
        """
        averages, self._first = last or self._first, False
        return nullcontext() if averages else self._wrapped.no_sync()


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


def share_samples(config: Config, processes: Processes, model: Transfer) -> None:
    """Let neighbouring processes share their samples, in place, if the run asks for it."""
    size = config.model_parallel.context_parallel_size
    if size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh

    from .context_parallel import share_frames

    device = next(model.parameters()).device.type
    names = ("replica", "context")
    mesh = init_device_mesh(device, (processes.size // size, size), mesh_dim_names=names)
    share_frames(model, mesh.get_group("context"))


def shard_model(config: Config, processes: Processes, model: nn.Module) -> None:
    """Shard the parameters over the processes (FSDP2), in place, if the run asks for it.

    A unit is one transformer block, whose parameters are gathered when it runs; the log-variance
    head is one, being called on its own, and everything else is the last. Names stay as they are.
    Sharding "full" is over all processes, "hybrid" over neighbours in groups of
    `model.fsdp.sharding_group_size`, between which gradients are averaged.
    """
    if config.trainer.distributed_parallelism != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    # Said of an output that is a view: nothing here changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options = config.model.fsdp
    device = next(model.parameters()).device.type
    if options.sharding_strategy == "hybrid":
        group = options.sharding_group_size
        mesh = init_device_mesh(
            device, (processes.size // group, group), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(device, (processes.size,), mesh_dim_names=("shard",))
    on_host = CPUOffloadPolicy(pin_memory=device == "cuda")
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=getattr(torch, options.reduce_dtype)),
        "offload_policy": on_host if options.cpu_offload else OffloadPolicy(),
    }
    for module in list(model.modules()):
        if isinstance(module, TransformerBlock | LogVariance):
            fully_shard(module, **arguments)
    fully_shard(model, **arguments)
