"""Ops of the optimizer: `adamw_step` and `grad_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.registry import Op, register

from .reference import adamw_step, grad_norm

# Matrices, vectors and scalars of odd sizes, as a transformer has them.
_SHAPES = ((192, 96), (96, 384), (513, 31), (96,), (7, 5, 3), (1,))
_FLOPS_PER_PARAMETER = 14
_FLOPS_PER_AVERAGE = 3


def _tensors(dtype: torch.dtype, device: str, scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(shape, device=device)).to(dtype) for shape in _SHAPES]


def _adamw_inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    params = _tensors(dtype, device)
    low_precision = dtype != torch.float32
    return {
        "params": params,
        "grads": _tensors(dtype, device, 0.1),
        "exp_avgs": _tensors(torch.float32, device, 0.1),
        "exp_avg_sqs": [tensor.square() for tensor in _tensors(torch.float32, device, 0.1)],
        "masters": [param.float() if low_precision else None for param in params],
        "ema": [param.float().clone() for param in params],
        "lr": torch.tensor(1e-3, device=device),
        "betas": (0.9, 0.99),
        "eps": 1e-10,
        "weight_decay": 0.1,
        "step": torch.tensor([3], dtype=torch.int32, device=device),
        "grad_scale": torch.tensor(0.5, device=device),
        "found_inf": torch.zeros(1, device=device),
        "clip_coef": torch.tensor(0.7, device=device),
        "ema_beta": torch.tensor(0.99, dtype=torch.float64, device=device),
    }


def _adamw_cost(**inputs: Any) -> tuple[int, int]:
    """Gradients are read, parameters with a master written, all else is read and written."""
    masters = [master for master in inputs["masters"] if master is not None]
    averages = [shadow for shadow in inputs["ema"] or () if shadow is not None]
    written = [p for p, m in zip(inputs["params"], inputs["masters"], strict=True) if m is not None]
    updated = [p for p, m in zip(inputs["params"], inputs["masters"], strict=True) if m is None]
    updated += [*masters, *averages, *inputs["exp_avgs"], *inputs["exp_avg_sqs"]]
    size = _bytes(inputs["grads"]) + _bytes(written) + 2 * _bytes(updated)
    flops = _FLOPS_PER_PARAMETER * _count(inputs["params"]) + _FLOPS_PER_AVERAGE * _count(averages)
    return size, flops


def _grad_norm_inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return {"grads": _tensors(dtype, device)}


def _grad_norm_cost(**inputs: Any) -> tuple[int, int]:
    return _bytes(inputs["grads"]), 2 * _count(inputs["grads"])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _count(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


register(Op("adamw_step", adamw_step, triton=None, inputs=_adamw_inputs, cost=_adamw_cost))
register(Op("grad_norm", grad_norm, triton=None, inputs=_grad_norm_inputs, cost=_grad_norm_cost))

__all__ = ["adamw_step", "grad_norm"]
