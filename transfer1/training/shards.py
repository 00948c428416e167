"""Parts of sharded tensors (DTensor) that lie in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import torch.distributed as dist
from torch import Tensor


def is_sharded(value: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor of which every process has a part (DTensor)."""
    return hasattr(value, "to_local")


def gather(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in all processes; they call this together."""
    return tensor.detach().full_tensor()  # type: ignore[attr-defined]


def shard_like(whole: Tensor, target: Tensor) -> Tensor:
    """The whole tensor laid out as `target` is; nothing is exchanged, each process cuts its part.

    `target` may be no sharded tensor at all: then `whole` stays as it is.
    """
    if not is_sharded(target) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    whole = whole.to(target.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def with_local(part: Tensor, target: Tensor) -> Tensor:
    """A tensor laid out as `target` is, whose part in this process is `part`."""
    if not is_sharded(target):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        target.device_mesh,  # type: ignore[attr-defined]
        target.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that lies in this process; other tensors as they are."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def local_gradient(param: Tensor) -> Tensor:
    """The part of a gradient that belongs to the local part of its parameter."""
    grad = param.grad
    assert grad is not None
    placements = getattr(param, "placements", None)
    if placements is not None and getattr(grad, "placements", placements) != placements:
        grad = grad.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(grad)


def local_master(state: Mapping[str, Tensor]) -> Tensor | None:
    """The master, or the remainder that stands for it, of an optimizer's state; None without."""
    master = state.get("master", state.get("remainder"))
    return None if master is None else local(master)


def sharing_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes between which a tensor is cut, one per axis of its mesh."""
    if not is_sharded(tensor):
        return ()
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(n) for n, p in enumerate(placements) if not p.is_replicate())
