"""The Triton kernels of `qk_norm_rope` as machine code run right; gates: `test_static.py`."""

from __future__ import annotations

import pytest
import torch
from emulator import emulated

from bench.parity import FLOAT32_TOLERANCE, relative_rms, run
from kernels import OPS
from kernels.adaln_attention import qk_norm_rope as module
from kernels.adaln_attention.qk_norm_rope import qk_norm_rope
from kernels.registry import FLOATS

pytestmark = pytest.mark.static

OP = OPS["qk_norm_rope"]
BFLOAT16_TOLERANCE = 5e-3  # twice the rounding of one result


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
