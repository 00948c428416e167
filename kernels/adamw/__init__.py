"""Ops of the optimizer: `adamw_step` and `grad_norm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.inputs import LARGE, RAGGED, element_count, flat_tensors, tensor_bytes
from kernels.registry import FLOATS, Case, Op, register

from .bfloat16 import split
from .reference import adamw_step, grad_norm

_FLOPS_PER_PARAMETER = 14
_FLOPS_PER_AVERAGE = 3


def _adamw_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shapes: Sequence[tuple[int, ...]] = RAGGED,
    master: str = "float32",
    ema: bool = True,
    grad_dtype: torch.dtype | None = None,
    offset: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """A step in the middle of a training.

    Args:
        master: of parameters in lower precision: float32, remainder, or none (stochastic rounding).
        offset: elements by which all tensors start late in their storage.
        options: passed on to the op.
    """

    def tensors(kind: torch.dtype, scale: float) -> list[Tensor]:
        return flat_tensors(shapes, kind, device, scale, offset)

    params = tensors(dtype, 1.0)
    masters: list[Tensor | None] = [None] * len(params)
    weights = tensors(torch.float32, 1.0)
    if dtype != torch.float32 and master == "none":
        options["rounding_seed"] = 7
    elif dtype != torch.float32 and master == "float32":
        for param, weight in zip(params, weights, strict=True):
            param.copy_(weight)
        masters = [*weights]
    elif dtype != torch.float32:
        remainders = tensors(torch.int16, 1.0)
        for param, remainder, weight in zip(params, remainders, weights, strict=True):
            for half, value in zip((param, remainder), split(weight), strict=True):
                half.copy_(value)
        masters = [*remainders]
    exp_avg_sqs = tensors(torch.float32, 0.01)
    return {
        "params": params,
        "grads": tensors(grad_dtype or dtype, 0.1),
        "exp_avgs": tensors(torch.float32, 0.1),
        "exp_avg_sqs": [tensor.abs_() for tensor in exp_avg_sqs],
        "masters": masters,
        "ema": tensors(torch.float32, 1.0) if ema else None,
        "lr": torch.tensor(1e-3, device=device),
        "betas": (0.9, 0.99),
        "eps": 1e-10,
        "weight_decay": 0.1,
        "step": torch.tensor([3], dtype=torch.int32, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
        "found_inf": torch.zeros(1, device=device),
        "clip_coef": torch.tensor(0.7, device=device),
        "ema_beta": torch.tensor(0.99, dtype=torch.float64, device=device) if ema else None,
        **options,
    }


def _adamw_cost(**inputs: Any) -> tuple[int, int]:
    """Gradients are read, parameters with a float32 master written, all else read and written."""
    masters = [master for master in inputs["masters"] if master is not None]
    averages = [shadow for shadow in inputs["ema"] or () if shadow is not None]
    copies = [
        param
        for param, master in zip(inputs["params"], inputs["masters"], strict=True)
        if master is not None and master.dtype == torch.float32
    ]
    updated = [*masters, *averages, *inputs["exp_avgs"], *inputs["exp_avg_sqs"]]
    size = tensor_bytes(inputs["grads"]) + 2 * tensor_bytes(updated)
    size += 2 * tensor_bytes(inputs["params"]) - tensor_bytes(copies)
    parameters = element_count(inputs["params"])
    return size, _FLOPS_PER_PARAMETER * parameters + _FLOPS_PER_AVERAGE * element_count(averages)


def _grad_norm_inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shapes: Sequence[tuple[int, ...]] = RAGGED,
    offset: int = 0,
) -> dict[str, Any]:
    return {"grads": flat_tensors(shapes, dtype, device, 1.0, offset)}


def _grad_norm_cost(**inputs: Any) -> tuple[int, int]:
    return tensor_bytes(inputs["grads"]), 2 * element_count(inputs["grads"])


_BFLOAT16 = (torch.bfloat16,)

register(
    Op(
        "adamw_step",
        adamw_step,
        triton="kernels.adamw.kernel:adamw_step",
        inputs=_adamw_inputs,
        cost=_adamw_cost,
        cases={
            "ema": Case(),
            "no_ema": Case({"ema": False}),
            "unaligned": Case({"offset": 1}),
            "l2": Case({"adam_w_mode": False}),
            "no_bias_correction": Case({"bias_correction": False, "ema": False}),
            "remainder": Case({"master": "remainder"}, _BFLOAT16),
            "stochastic": Case({"master": "none"}, _BFLOAT16),
            "remainder_no_ema": Case({"master": "remainder", "ema": False}, _BFLOAT16),
            "remainder_unaligned": Case({"master": "remainder", "offset": 1}, _BFLOAT16),
            "float32_gradients": Case({"grad_dtype": torch.float32}, FLOATS[1:]),
            "plain": Case({"ema": False, "grad_scale": None, "found_inf": None, "clip_coef": None}),
            "skipped": Case({"found_inf": 1.0}),
        },
        sizes=LARGE,
        compiled="kernels.adamw.compiled:adamw_step",
    )
)
register(
    Op(
        "grad_norm",
        grad_norm,
        triton="kernels.adamw.norm_kernel:grad_norm",
        inputs=_grad_norm_inputs,
        cost=_grad_norm_cost,
        cases={"aligned": Case(), "unaligned": Case({"offset": 1})},
        sizes=LARGE,
        compiled="kernels.adamw.compiled:grad_norm",
    )
)

__all__ = ["adamw_step", "grad_norm"]
