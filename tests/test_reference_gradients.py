"""The formulas of the references: their gradients in float64 against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernels

SMALL: dict[str, dict[str, Any]] = {
    "adaln_modulate": {"B": 2, "L": 3, "D": 4},
    "residual_adaln_modulate": {"B": 2, "L": 3, "D": 4},
    "gated_residual": {"B": 2, "L": 3, "D": 4},
    "qk_norm_rope": {"B": 1, "L": 2, "N": 2, "K": 4},
    "attention": {"B": 1, "L": 3, "M": 2, "N": 2, "K": 4},
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    op = kernels.OPS[name]
    torch.manual_seed(0)
    inputs = op.inputs(dtype=torch.float64, **SMALL[name])
    if inputs.get("rope_2LR") is not None:
        inputs["rope_2LR"] = inputs["rope_2LR"].double()
    leaves = {name: x for name, x in inputs.items() if getattr(x, "requires_grad", False)}

    def function(*values: torch.Tensor) -> Any:
        return op.reference(**{**inputs, **dict(zip(leaves, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
