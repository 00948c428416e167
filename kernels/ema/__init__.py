"""Op `ema_update`: exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels.inputs import LARGE, RAGGED, element_count, flat_tensors, tensor_bytes
from kernels.registry import Case, Op, register

from .reference import ema_update


def _inputs(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shapes: Sequence[tuple[int, ...]] = RAGGED,
    profiles: int = 1,
    offset: int = 0,
) -> dict[str, Any]:
    """Averages of parameters, one or several of each."""
    betas = [1 - 0.01 / 2**profile for profile in range(profiles)]
    return {
        "shadows": flat_tensors(list(shapes) * profiles, torch.float32, device, 1.0, offset),
        "params": flat_tensors(shapes, dtype, device, 1.0, offset),
        "beta": torch.tensor(betas, dtype=torch.float64, device=device),
    }


def _cost(**inputs: Any) -> tuple[int, int]:
    """Sources are read, shadows read and written; two multiplications and an addition each."""
    size = 2 * tensor_bytes(inputs["shadows"]) + tensor_bytes(inputs["params"])
    return size, 3 * element_count(inputs["shadows"])


register(
    Op(
        "ema_update",
        ema_update,
        triton="kernels.ema.kernel:ema_update",
        inputs=_inputs,
        cost=_cost,
        cases={
            "one": Case(),
            "three_profiles": Case({"profiles": 3}),
            "unaligned": Case({"offset": 1}),
        },
        sizes=LARGE,
        compiled="kernels.ema.compiled:ema_update",
    )
)

__all__ = ["ema_update"]
