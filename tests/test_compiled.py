"""What the compiler makes of every kernel, for GPUs that are not here, and what that code does.

All launches of all cases of the table of ops are compiled; most cases share variants. No
TRITON_INTERPRET here: Triton decides at import whether kernels are interpreted or compiled.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator import emulated
from op_cases import all_cases

from bench.parity import check_parity, inputs_of
from kernels import Op
from kernels.launch import interpreting

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(interpreting(), reason="compiles kernels: run without TRITON_INTERPRET"),
]

OPTIMIZER = {"adamw_step", "ema_update", "grad_norm"}
CASES = [case for case in all_cases(triton=True) if case.values[0].name in OPTIMIZER]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def triton_of(op: Op) -> Callable[..., Any]:
    assert op.triton
    module, _, function = op.triton.partition(":")
    return getattr(importlib.import_module(module), function)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_no_gate_breaks(op: Op, case: str, dtype: torch.dtype, target: str) -> None:
    from bench.compiled import inspect
    from bench.gates import failures, row_of
    from bench.static_cases import launches_for

    for stage, launch in launches_for(op, inputs_of(op, case, dtype), target):
        assert not failures(row_of(launch, inspect(launch), **{"op": op.name, "pass": stage}))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_compiled_code_equals_reference(op: Op, case: str, dtype: torch.dtype, target: str) -> None:
    """Run as PTX, with checks for races, bounds and alignment (`emulated` asserts none is hit)."""
    with emulated(target) as launches:
        check_parity(op, triton_of(op), inputs_of(op, case, dtype))
    assert launches


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_an_emulated_step_is_three_launches(target: str) -> None:
    from kernels import OPS

    inputs = copy.deepcopy(inputs_of(OPS["adamw_step"], "ema", torch.float32))
    with emulated(target) as launches:
        norm = triton_of(OPS["grad_norm"])(inputs["grads"])
        inputs["clip_coef"] = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        triton_of(OPS["adamw_step"])(**inputs)
    assert [launch.kernel for launch in launches] == [
        "grad_norm_kernel", "finalize_norm_kernel", "adamw_step_kernel",
    ]  # fmt: skip
