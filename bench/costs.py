"""The least that a forward and backward pass of an op must move and compute.

`Op.cost` says it of the forward pass. The backward pass reads what its formulas need and the
gradients of the results, and writes the gradients of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kernels import OPS, Op

# Inputs that the gradients do not depend on and whose own gradient is that of a result as it is.
PASSED_ON: Mapping[str, tuple[str, ...]] = {
    "adaln_modulate": ("position_LD",),
    "gated_residual": ("x_BLD", "addend_BLD"),
}
# Products of the backward pass over those of the forward pass, for ops made of products:
# attention has two (scores, output); its gradients need five, the scores once more among them.
PRODUCTS = {"attention": 2.5}


def forward_cost(op: Op, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Least (bytes, flops) of one call; of `adamw_step` with the gradient norm that precedes it."""
    size, flops = op.cost(**inputs)
    if op.name == "adamw_step":
        norm_size, norm_flops = OPS["grad_norm"].cost(grads=inputs["grads"])
        return size + norm_size, flops + norm_flops
    return size, flops


def backward_cost(op: Op, inputs: Mapping[str, Any], outputs: Sequence[Tensor]) -> tuple[int, int]:
    """Least (bytes, flops) of a backward pass; elementwise flops count twice again."""
    size = sum(output.nbytes for output in outputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name not in PASSED_ON.get(op.name, ()):
            size += value.nbytes * (2 if value.requires_grad else 1)
    return size, int(op.cost(**inputs)[1] * PRODUCTS.get(op.name, 2.0))


def training_cost(op: Op, inputs: Mapping[str, Any], outputs: Sequence[Tensor]) -> tuple[int, int]:
    """Least (bytes, flops) of a forward and backward pass."""
    forward, backward = op.cost(**inputs), backward_cost(op, inputs, outputs)
    return forward[0] + backward[0], forward[1] + backward[1]
