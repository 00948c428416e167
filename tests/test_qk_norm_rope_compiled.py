"""The Triton kernels of `qk_norm_rope` as machine code: what they cost, and that they run right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import emulated
from torch import Tensor

from bench.compiled import inspect
from bench.gates import GATED as TARGETS
from bench.gates import failures, row_of
from bench.parity import FLOAT32_TOLERANCE, relative_rms, run
from kernels import OPS
from kernels.adaln_attention import qk_norm_rope as module
from kernels.adaln_attention.qk_norm_rope import qk_norm_rope
from kernels.launch import Launch, intercepted
from kernels.registry import FLOATS

pytestmark = pytest.mark.static

OP = OPS["qk_norm_rope"]
NAMES = ["qk_norm_rope_kernel", "qk_norm_rope_backward_kernel", "weight_gradients_kernel"]
SHAPE_7B: dict[str, Any] = {"B": 1, "L": 3, "N": 32, "K": 128}
BFLOAT16_TOLERANCE = 5e-3  # twice the rounding of one result


def launches(target: str, inputs: dict[str, Any]) -> list[Launch]:
    """What a forward and a backward pass launch."""
    found: list[Launch] = []
    with intercepted(target, found.append):
        outputs = qk_norm_rope(**inputs)
        leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    return found


def broken(target: str, inputs: dict[str, Any]) -> list[str]:
    """Gates that the launches of a forward and a backward pass break."""
    found = launches(target, inputs)
    assert [launch.kernel.__name__ for launch in found] == NAMES
    return [text for launch in found for text in failures(row_of(launch, inspect(launch)))]


@pytest.mark.parametrize("M", [None, 2], ids=["self", "cross"])
@pytest.mark.parametrize("target", TARGETS)
def test_code_of_the_7b_model(target: str, M: int | None) -> None:
    assert not broken(target, OP.inputs(dtype=torch.bfloat16, M=M, **SHAPE_7B))


@pytest.mark.slow
@pytest.mark.parametrize("name", OP.cases)
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant(target: str, name: str) -> None:
    case = OP.cases[name]
    for dtype in case.dtypes:
        assert not broken(target, OP.inputs(dtype=dtype, **case.options)), dtype


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
