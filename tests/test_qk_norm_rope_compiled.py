"""The Triton kernels of `qk_norm_rope` as machine code: what they cost, and that they run right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import emulated
from torch import Tensor

from bench.compiled import TARGETS, Code, access_bits, inspect
from bench.parity import FLOAT32_TOLERANCE, relative_rms, run
from kernels import OPS
from kernels.adaln_attention import qk_norm_rope as module
from kernels.adaln_attention.qk_norm_rope import qk_norm_rope
from kernels.launch import Launch, intercepted, is_amd
from kernels.registry import FLOATS

pytestmark = pytest.mark.static

OP = OPS["qk_norm_rope"]
NAMES = ["qk_norm_rope_kernel", "qk_norm_rope_backward_kernel", "weight_gradients_kernel"]
SHAPE_7B: dict[str, Any] = {"B": 1, "L": 3, "N": 32, "K": 128}
# Per lane at 32 heads of 128 in bfloat16; up to 64 a multiprocessor of AMD is full.
FORWARD_REGISTERS, FORWARD_REGISTERS_AMD, BACKWARD_REGISTERS = 48, 64, 104
BFLOAT16_TOLERANCE = 5e-3  # twice the rounding of one result


def launches(target: str, inputs: dict[str, Any]) -> list[Launch]:
    """What a forward and a backward pass launch."""
    found: list[Launch] = []
    with intercepted(target, found.append):
        outputs = qk_norm_rope(**inputs)
        leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    return found


def codes(target: str, inputs: dict[str, Any]) -> list[Code]:
    found = [inspect(launch) for launch in launches(target, inputs)]
    assert [code.kernel for code in found] == NAMES
    return found


def assert_sound(code: Code, label: str) -> None:
    """Whole code without spills, and all heads, cosines and weights move in 128-bit accesses."""
    assert code.instructions >= 100, label
    assert code.spills == 0, f"{label}: {code.spills} spills at {code.registers} registers"
    narrow = {name for name in code.accesses if access_bits(name) < 128}
    sums = {name for name in narrow if "STG" in name or "store" in name}  # a line per program
    assert code.kernel in NAMES[1:] or not sums, f"{label}: {sums}"
    assert narrow == sums, f"{label}: {narrow - sums}"


@pytest.mark.parametrize("M", [None, 2], ids=["self", "cross"])
@pytest.mark.parametrize("target", TARGETS)
def test_registers_of_the_7b_model(target: str, M: int | None) -> None:
    forward, backward, sums = codes(target, OP.inputs(dtype=torch.bfloat16, M=M, **SHAPE_7B))
    for code in (forward, backward, sums):
        print(code.kernel, target, code.registers, code.shared_bytes, code.accesses)
        assert_sound(code, f"{code.kernel} on {target}")
    assert forward.registers <= (FORWARD_REGISTERS_AMD if is_amd(target) else FORWARD_REGISTERS)
    assert backward.registers <= BACKWARD_REGISTERS
    assert forward.shared_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OP.cases)
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target: str, name: str) -> None:
    case = OP.cases[name]
    for dtype in case.dtypes:
        for code in codes(target, OP.inputs(dtype=dtype, **case.options)):
            assert_sound(code, f"{code.kernel} on {target}, {name} in {dtype}")


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("name", OP.cases)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiled_code_runs_right(
    target: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 2)  # several tiles per program
    case = OP.cases[name]
    if dtype not in case.dtypes:
        pytest.skip(f"{name} is not meant for {dtype}")
    inputs = OP.inputs(dtype=dtype, **case.options)
    with emulated(target) as statistics:
        actual = run(qk_norm_rope, inputs)
    assert len(statistics) == 3 and all(found.clean for found in statistics)
    expected = run(OP.reference, inputs)
    tolerance = FLOAT32_TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
    for label, value in actual.items():
        assert relative_rms(value, expected[label]) <= tolerance, label
