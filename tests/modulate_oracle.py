"""What the tests of adaLN modulation and gated residuals share: an oracle in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.parity import FLOAT32_TOLERANCE, FLOOR, LOW_PRECISION_FACTOR, relative_rms
from kernels.adaln_attention import gated_residual as gated
from kernels.adaln_attention import modulate, reference

TRITON = {
    "adaln_modulate": modulate.adaln_modulate,
    "residual_adaln_modulate": modulate.residual_adaln_modulate,
    "gated_residual": gated.gated_residual,
}


def inputs_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    return kernels.OPS[name].inputs(dtype=dtype, **options)


def outputs_of(returned: Any) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned)


def run(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs, for upstream gradients that depend on the shapes."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    outputs = outputs_of(function(**inputs))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    leaves = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    for leaf, gradient in zip(leaves.values(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return named | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def converted(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers as new leaves of another dtype, with the same strides."""
    return {
        name: value.detach().to(dtype).requires_grad_() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def exact(name: str) -> Callable[..., Any]:
    """The op in the precision of its inputs, which float64 makes an oracle."""

    def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    def adaln_modulate(
        x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, position_LD: Any = None
    ) -> Any:
        if position_LD is None:
            return modulated(x_BLD, shift_BD, scale_BD, eps)
        total = x_BLD + position_LD
        return total, modulated(total, shift_BD, scale_BD, eps)

    def residual_adaln_modulate(
        x_BLD: Tensor,
        y_BLD: Tensor,
        gate_BD: Tensor,
        shift_BD: Tensor,
        scale_BD: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        total = x_BLD + gate_BD[:, None] * y_BLD
        return total, modulated(total, shift_BD, scale_BD, eps)

    def gated_residual(
        x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, addend_BLD: Tensor | float = 0.0
    ) -> Tensor:
        return x_BLD + gate_BD[:, None] * y_BLD + addend_BLD

    return locals()[name]


def check(name: str, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Against float64; in low precision beside the PyTorch reference of the same dtype."""
    actual = run(TRITON[name], inputs)
    expected = run(exact(name), converted(inputs, torch.float64))
    reference_values = run(getattr(reference, name), inputs)
    for what, value in actual.items():
        allowed = FLOAT32_TOLERANCE
        if dtype != torch.float32:
            baseline = relative_rms(reference_values[what], expected[what])
            allowed = LOW_PRECISION_FACTOR * baseline + FLOOR
        error = relative_rms(value, expected[what])
        assert error <= allowed, f"{name} {what}: {error:.2g}, allowed {allowed:.2g}"
