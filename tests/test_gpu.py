"""Triton kernels on a GPU: parity, determinism, and tensors of more than 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from far import far
from op_cases import all_cases, needs_interpreter

from bench.parity import check_parity, inputs_of, run
from kernels import OPS, Op

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")
BEYOND = 2**31  # elements

# op -> options of inputs whose far copies stay below 60 GB.
FAR: dict[str, dict[str, Any]] = {
    "adamw_step": {"shapes": ((1000,),)},
    "ema_update": {"shapes": ((1000,),)},
    "grad_norm": {"shapes": ((1000,),)},
    "adaln_modulate": {"B": 1, "L": 40, "D": 4096, "position": None},
    "residual_adaln_modulate": {"B": 1, "L": 40, "D": 4096},
    "gated_residual": {"B": 1, "L": 40, "D": 4096},
    "qk_norm_rope": {"B": 1, "L": 40, "N": 32, "K": 128},
    "attention": {"B": 1, "L": 1000, "M": 1000, "N": 32, "K": 128},
}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case", "dtype"), all_cases(triton=True))
def test_triton_on_the_device(op: Op, case: str, dtype: torch.dtype) -> None:
    """Results and gradients of every case; twice the same, bit for bit."""
    inputs = inputs_of(op, case, dtype, "cuda")
    function = op.build("triton", "cuda")
    check_parity(op, function, inputs)
    first, again = run(function, inputs), run(function, inputs)
    for name, value in first.items():
        assert torch.equal(value, again[name]), f"{op.name} {name} differs between two runs"


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", FAR)
def test_beyond_2_to_31_elements(name: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 70e9:
        pytest.skip(f"needs 70 GB of free GPU memory, there are {free / 1e9:.0f}")
    op = OPS[name]
    inputs = op.inputs(dtype=torch.bfloat16, device="cuda", **FAR[name])
    try:
        check_parity(op, far(op, op.build("triton", "cuda"), BEYOND), inputs)
    finally:
        torch.cuda.empty_cache()


@needs_interpreter
@pytest.mark.parametrize("name", FAR)
def test_the_far_end_of_smaller_tensors(name: str) -> None:
    """What the test above relies on: an op of far inputs is the op."""
    op = OPS[name]
    small = {"D": 64, "N": 2, "K": 32, "L": 9, "M": 9}
    options = {key: small.get(key, value) for key, value in FAR[name].items()}
    torch.manual_seed(0)
    inputs = op.inputs(dtype=torch.bfloat16, **options)
    check_parity(op, far(op, op.build("triton"), 700), inputs)


def test_a_kernel_that_does_not_reach_the_end_is_found() -> None:
    op = OPS["gated_residual"]

    def short(x_BLD: Any, y_BLD: Any, gate_BD: Any, addend_BLD: Any) -> Any:
        total = op.reference(x_BLD, y_BLD, gate_BD, addend_BLD)
        return torch.cat([total[:, :-1], x_BLD[:, -1:]], dim=1)

    inputs = op.inputs(B=1, L=4, D=16)
    check_parity(op, far(op, op.reference, 100), inputs)
    with pytest.raises(AssertionError, match="gated_residual output 0"):
        check_parity(op, far(op, short, 100), inputs)
