"""How a model is spread over the processes of a run, from outside: it knows nothing of them.

Imports of `torch.distributed` packages that take long stand where they are needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfer1.config import Config
from transfer1.config.schema import FSDPConfig
from transfer1.model.block import TransformerBlock
from transfer1.model.layers import LogVariance
from transfer1.model.transfer import Transfer

from .processes import Processes
from .step import Loss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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


def distribute(config: Config, processes: Processes, model: Transfer) -> None:
    """Spread the model over the processes in place, as far as the run asks for it.

    Neighbouring ranks share layers (tensor parallelism), groups of them latent frames (context
    parallelism); over all the rest, and over the latter, parameters are sharded (FSDP).
    """
    sizes = config.model_parallel
    tensor, context = sizes.tensor_model_parallel_size, sizes.context_parallel_size
    fsdp = config.trainer.distributed_parallelism == "fsdp"
    if tensor == context == 1 and not fsdp:
        return
    from torch.distributed.device_mesh import init_device_mesh

    device = next(model.parameters()).device.type
    options = config.model.fsdp
    mesh = init_device_mesh(
        device,
        (processes.replicas, context, tensor),
        mesh_dim_names=("replica", "context", "tensor"),
    )
    if tensor > 1:
        from .tensor_parallel import share_layers

        share_layers(model, mesh["tensor"])
    if context > 1:
        from .context_parallel import share_frames

        share_frames(model, mesh.get_group("context"))
    if fsdp and options.sharding_strategy == "hybrid":
        groups = processes.size // options.sharding_group_size, options.sharding_group_size
        names = ("groups", "shard")
        shard_model(model, init_device_mesh(device, groups, mesh_dim_names=names), options)
    elif fsdp:
        shard_model(model, mesh["replica", "context"]._flatten("shard"), options)


def shard_model(model: nn.Module, mesh: DeviceMesh, options: FSDPConfig) -> None:
    """Shard the parameters over the processes (FSDP2), in place; names stay as they are.

    A unit is one transformer block, whose parameters are gathered when it runs; the log-variance
    head is one, being called on its own, and everything else is the last.

    Args:
        model: the whole model.
        mesh: one axis of processes to shard over, or two: groups between which gradients are
            averaged, and the processes of a group.
        options: the config node `model.fsdp`.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    # Said of an output that is a view: nothing here changes one in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    on_host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    arguments: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=getattr(torch, options.reduce_dtype)),
        "offload_policy": on_host if options.cpu_offload else OffloadPolicy(),
    }
    for module in list(model.modules()):
        if isinstance(module, TransformerBlock | LogVariance):
            fully_shard(module, **arguments)
    fully_shard(model, **arguments)
