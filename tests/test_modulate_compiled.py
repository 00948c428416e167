"""The compiled form of the adaLN kernels: registers, accesses, and runs of the PTX."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emulator import emulated
from modulate_oracle import TRITON, check, inputs_of, run

import kernels
from kernels.adaln_attention import rows
from kernels.launch import Launch, interpreting

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(interpreting(), reason="compiles kernels: run without TRITON_INTERPRET"),
]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
VARIANTS = [
    ("adaln_modulate", {"position": None}),
    ("adaln_modulate", {}),
    ("residual_adaln_modulate", {}),
    ("gated_residual", {"addend": False}),
    ("gated_residual", {}),
]


def launches(name: str, target: str, dtype: torch.dtype, **options: Any) -> list[Launch]:
    """Of the forward and the backward pass; with 256 tokens, sums have the tiles of any more."""
    from bench.compiled import launches_of

    inputs = inputs_of(name, dtype, L=256, **options)
    return launches_of(lambda **named: run(TRITON[name], named), inputs, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_code_of_the_7b_model(name: str, options: dict[str, Any], target: str) -> None:
    from bench.compiled import inspect
    from bench.gates import failures, row_of

    for launch in launches(name, target, torch.bfloat16, D=4096, **options):
        row = row_of(launch, inspect(launch))
        assert not failures(row), row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("D", [96, 1536, 5120, 8192])
def test_no_width_spills(D: int, dtype: torch.dtype, target: str) -> None:
    from bench.compiled import inspect

    for name in ("residual_adaln_modulate", "gated_residual"):
        for launch in launches(name, target, dtype, D=D):
            code = inspect(launch)
            assert code.spills == 0, code.kernel
            assert code.widest_access == 128 or D == 96


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_rows_are_addressed_in_64_bits(name: str, options: dict[str, Any]) -> None:
    """100,000 tokens of width 8192 in three samples are more than 2^31 elements."""
    from bench.compiled import compile_launch

    for launch in launches(name, "sm_90", torch.bfloat16, D=8192, **options):
        text = compile_launch(launch).asm["ttir"]
        if launch.kernel.__name__ == "column_sum_kernel":
            offsets = re.findall(r"tt.addptr .*, tensor<.*x(i\d+)>", text)
        else:
            offsets = re.findall(r"tt.addptr .* : !tt.ptr<\w+>, (i\d+)", text)
        assert offsets
        assert set(offsets) == {"i64"}, launch.kernel


RUNS: list[Any] = [
    pytest.param(name, case.options, dtype, id=f"{name}-{label}-{str(dtype)[6:]}")
    for name in TRITON
    for label, case in kernels.OPS[name].cases.items()
    for dtype in ([torch.bfloat16] if label == "full_width" else [torch.float32, torch.bfloat16])
] + [
    pytest.param(name, {"B": B, "L": L, "D": D}, torch.bfloat16, id=f"{name}-{B}x{L}x{D}-bfloat16")
    for name in TRITON
    for B, L, D in [(1, 1, 64), (1, 5, 4096)]
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "options", "dtype"), RUNS)
def test_compiled_code_runs_right(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without races, accesses out of bounds or misaligned ones: `emulated` checks for them."""
    monkeypatch.setattr(rows, "PROGRAMS", 2)
    torch.manual_seed(0)
    with emulated(target) as statistics:
        check(name, inputs_of(name, dtype, **options), dtype)
    assert all(launch.clean for launch in statistics)
