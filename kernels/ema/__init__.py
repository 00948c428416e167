"""Op `ema_update`: exponential moving average of parameters."""

from __future__ import annotations

from typing import Any

import torch

from kernels.registry import Op, register

from .reference import ema_update


def _inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    shapes = ((192, 96), (513, 31), (96,), (7, 5, 3), (1,))
    return {
        "shadows": [torch.randn(shape, device=device) for shape in shapes],
        "params": [torch.randn(shape, device=device).to(dtype) for shape in shapes],
        "beta": torch.tensor(0.99, dtype=torch.float64, device=device),
    }


def _cost(**inputs: Any) -> tuple[int, int]:
    """Sources are read, shadows read and written; two multiplications and an addition each."""
    shadows, params = inputs["shadows"], inputs["params"]
    size = sum(2 * s.nbytes + p.nbytes for s, p in zip(shadows, params, strict=True))
    return size, 3 * sum(shadow.numel() for shadow in shadows)


register(Op("ema_update", ema_update, triton=None, inputs=_inputs, cost=_cost))

__all__ = ["ema_update"]
