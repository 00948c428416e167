"""Inputs that lie at the far end of huge tensors, to see whether kernels reach that far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import Op

# Dimension of tokens in inputs and outputs of row-wise ops; attention is extended by samples.
TOKENS = {
    "x_BLD": 1,
    "y_BLD": 1,
    "addend_BLD": 1,
    "position_LD": 0,
    "q_BLNK": 1,
    "k_BMNK": 1,
    "rope_2LR": 1,
}


def far(op: Op, function: Callable[..., Any], elements: int) -> Callable[..., Any]:
    """`function` with its arguments behind more than `elements` zeros of every long tensor.

    Tensors of lists become the end of flat ones, tokens the last ones of a sample (for attention
    samples the last ones of a batch). What comes back, in place or not, is that end, and gradients
    flow through.
    """

    def lists(**inputs: Any) -> Any:
        extended = {
            name: [None if t is None else _behind(t.flatten(), 0, elements) for t in value]
            if isinstance(value, list)
            else value
            for name, value in inputs.items()
        }
        returned = function(**extended)
        for name, value in inputs.items():
            for old, new in zip(value, extended[name], strict=True) if _is_list(value) else ():
                if old is not None:
                    old.copy_(new[-old.numel() :].view_as(old))
        return returned

    def rows(**inputs: Any) -> Any:
        dimensions = dict.fromkeys(inputs, 0) if op.name == "attention" else TOKENS
        count = _rows(inputs, dimensions, elements)
        extended = {
            name: _zeros_before(value, dimensions[name], count)
            if isinstance(value, Tensor) and name in dimensions
            else value
            for name, value in inputs.items()
        }
        outputs = function(**extended)
        dimension = 0 if op.name == "attention" else 1
        single = isinstance(outputs, Tensor)
        ends = [
            output.narrow(dimension, count, output.shape[dimension] - count)
            for output in ([outputs] if single else outputs)
        ]
        return ends[0] if single else ends

    return lists if op.name in ("adamw_step", "grad_norm", "ema_update") else rows


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _rows(inputs: dict[str, Any], dimensions: dict[str, int], elements: int) -> int:
    """So many rows of the first long tensor have more than `elements` elements."""
    name = next(name for name in inputs if name in dimensions)
    tensor = inputs[name]
    return elements // (tensor.numel() // tensor.shape[dimensions[name]]) + 1


def _behind(tensor: Tensor, dimension: int, elements: int) -> Tensor:
    return _zeros_before(tensor, dimension, elements + 1)


def _zeros_before(tensor: Tensor, dimension: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dimension] = count
    zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([zeros, tensor], dim=dimension)
