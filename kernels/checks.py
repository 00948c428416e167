"""What lists of tensors must have in common; errors name the tensor's index and both values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor


def check_matching(op: str, **lists: Sequence[Tensor | None]) -> None:
    """All lists must match the first one in length, and entry by entry in shape and device.

    Raises:
        ValueError: see above.
    """
    (leader, leading), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(leading):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} entries, but {leader} has {len(leading)}"
            )
    if not leading:
        return
    first = leading[0]
    assert first is not None
    for index, tensor in enumerate(leading):
        assert tensor is not None
        if tensor.device != first.device:
            raise ValueError(
                f"{op}: {leader}[{index}] is on {tensor.device}, but {leader}[0] is on "
                f"{first.device}; call it once per device"
            )
        shape, device = tensor.shape, tensor.device
        for name, tensors in others:
            other = tensors[index]
            if other is None:
                continue
            if other.shape != shape:
                raise ValueError(
                    f"{op}: {name}[{index}] has shape {tuple(other.shape)}, but "
                    f"{leader}[{index}] has {tuple(shape)}"
                )
            if other.device != device:
                raise ValueError(
                    f"{op}: {name}[{index}] is on {other.device}, but {leader}[{index}] is on "
                    f"{device}"
                )


def check_dtypes(
    op: str, name: str, tensors: Sequence[Tensor | None], allowed: Sequence[torch.dtype]
) -> None:
    """Raise ValueError for the first tensor whose dtype is not among the allowed ones."""
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{op}: {name}[{index}] has layout {tensor.layout}, but only dense tensors are "
                "taken; for sparse gradients use torch.optim.SparseAdam"
            )
        if tensor.dtype not in allowed:
            raise ValueError(
                f"{op}: {name}[{index}] of shape {tuple(tensor.shape)} is {tensor.dtype}, but must "
                f"be {' or '.join(str(dtype) for dtype in allowed)}"
            )


def check_range(
    op: str, name: str, value: Scalar | None, low: float, high: float = float("inf")
) -> None:
    """Raise ValueError for a number outside [low, high). A device tensor is not looked at."""
    if isinstance(value, int | float) and not low <= value < high:
        bounds = f"in [{low:g}, {high:g})" if high < float("inf") else f"{low:g} or more"
        raise ValueError(f"{op}: {name}={value} must be {bounds}")
