"""Parts of sharded tensors (DTensor) that lie in this process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
