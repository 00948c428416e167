"""What tests go through: the whole table of ops, where Triton kernels can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import OPS
from kernels.launch import interpreting

needs_interpreter = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(),
    reason="Triton kernels run on a GPU, or in a process started with TRITON_INTERPRET=1",
)


BACKENDS = [
    "reference",
    pytest.param("triton", marks=needs_interpreter),
    pytest.param("compile", marks=pytest.mark.slow),
]


def adamw_inputs(shapes: Any, seed: int = 0, **options: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    return OPS["adamw_step"].inputs(shapes=shapes, **options)


def all_cases(*, triton: bool = False) -> list[Any]:
    """(op, case, dtype) of the whole table, with readable ids; only ops with a Triton kernel."""
    return [
        pytest.param(op, name, dtype, id=f"{op.name}-{name}-{str(dtype).removeprefix('torch.')}")
        for op in OPS.values()
        for name, case in op.cases.items()
        for dtype in case.dtypes
        if op.triton or not triton
    ]
