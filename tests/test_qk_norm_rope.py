"""The Triton kernels of `qk_norm_rope` in the interpreter: numbers, traffic, registration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import needs_interpreter
from torch import Tensor

from bench.interpreter import counted, reversed_programs
from bench.parity import FLOAT32_TOLERANCE, FLOOR, LOW_PRECISION_FACTOR, relative_rms, run
from kernels import OPS, Case
from kernels.adaln_attention import qk_norm_rope as module
from kernels.adaln_attention.qk_norm_rope import qk_norm_rope
from kernels.registry import FLOATS

pytestmark = needs_interpreter

OP = OPS["qk_norm_rope"]
BYTES_RATIO, UNIQUE_RATIO = 1.05, 1.02
CASES = [
    pytest.param(case, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, case in OP.cases.items()
    for dtype in case.dtypes
]
SMALL: dict[str, Any] = {"L": 5, "N": 2, "K": 32}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that no kernel wrote is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def widened(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in a wider dtype; cosines and sines stay as they are."""
    return {
        name: value.detach().to(dtype).requires_grad_()
        if isinstance(value, Tensor) and value.requires_grad
        else value
        for name, value in inputs.items()
    }


def exact(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients of the definition in float64."""

    def norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float) -> Tensor:
        y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        if rope is None:
            return y
        cos, sin = rope.double()[:, :, None]
        turned = torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], dim=-1)
        return y * torch.cat([cos, cos], dim=-1) + turned * torch.cat([sin, sin], dim=-1)

    def definition(**named: Any) -> tuple[Tensor, Tensor]:
        q, k, q_weight, k_weight, rope, eps = named.values()
        return norm_rope(q, q_weight, rope, eps), norm_rope(k, k_weight, rope, eps)

    return run(definition, widened(inputs, torch.float64))


def assert_close(inputs: dict[str, Any], actual: dict[str, Tensor]) -> None:
    """float32 within its tolerance; lower precision as exact as the reference in that precision."""
    expected, reference = exact(inputs), run(OP.reference, inputs)
    for name, value in actual.items():
        assert value.dtype == reference[name].dtype, name
        allowed = FLOAT32_TOLERANCE
        if value.dtype != torch.float32 or inputs["q_BLNK"].dtype != torch.float32:
            allowed = LOW_PRECISION_FACTOR * relative_rms(reference[name], expected[name]) + FLOOR
        error = relative_rms(value, expected[name])
        assert error <= allowed, f"{name}: {error:.2g}, allowed {allowed:.2g}"


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_results_and_gradients(case: Case, dtype: torch.dtype) -> None:
    inputs = OP.inputs(dtype=dtype, **case.options)
    assert_close(inputs, run(qk_norm_rope, inputs))


@pytest.mark.parametrize("B", [1, 2, 3])
@pytest.mark.parametrize("K", [32, 34, 96, 250])
def test_odd_shapes(B: int, K: int) -> None:
    inputs = OP.inputs(B=B, L=37, N=5, K=K)
    assert_close(inputs, run(qk_norm_rope, inputs))


def test_every_operand_may_have_its_own_dtype_and_strides() -> None:
    inputs = OP.inputs(dtype=torch.bfloat16, **SMALL)
    B, L, N, K = inputs["q_BLNK"].shape
    heads_first = torch.randn(B, N, L, K, dtype=torch.float16).transpose(1, 2)
    table = torch.randn(2, 2 * L, K)[:, ::2, : K // 2]
    inputs |= {"k_BMNK": heads_first.requires_grad_(), "rope_2LR": table}
    inputs["k_weight_K"] = torch.randn(K).requires_grad_()
    outputs = qk_norm_rope(**inputs)
    assert [output.dtype for output in outputs] == [torch.bfloat16, torch.float16]
    assert all(output.is_contiguous() for output in outputs)
    assert_close(inputs, run(qk_norm_rope, inputs))


def test_a_gradient_may_be_expanded_or_missing() -> None:
    inputs = OP.inputs(**SMALL)
    q, _ = qk_norm_rope(**inputs)
    q.sum().backward()
    expected, _ = OP.reference(**inputs)
    gradient = torch.autograd.grad(expected.sum(), inputs["q_BLNK"])[0]
    assert relative_rms(inputs["q_BLNK"].grad, gradient) <= FLOAT32_TOLERANCE
    assert not inputs["k_BMNK"].grad.any() and not inputs["k_weight_K"].grad.any()


def test_no_tokens() -> None:
    inputs = OP.inputs(L=0, M=3)
    results = run(qk_norm_rope, inputs)
    assert results["output 0"].shape == inputs["q_BLNK"].shape
    assert not results["gradient of q_weight_K"].any()


def test_offsets_beyond_32_bits() -> None:
    inputs = OP.inputs(dtype=torch.float16, B=3, L=3, N=2, K=32)
    torch.use_deterministic_algorithms(False)  # 4 GiB that are never touched
    storage = torch.empty(2**31 + 3 * 64, dtype=torch.float16)
    far = storage.as_strided((3, 3, 2, 32), (2**30, 64, 32, 1))  # the stride alone has 31 bits
    far.copy_(inputs["q_BLNK"].detach())
    q, _ = qk_norm_rope(**(inputs | {"q_BLNK": far}))
    assert torch.equal(q, qk_norm_rope(**inputs)[0])


@pytest.mark.parametrize("M", [None, 40])
def test_results_do_not_depend_on_the_order_of_programs(
    M: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 5)  # several tiles per program
    inputs = OP.inputs(L=200, M=M, N=3, K=32)
    forwards = run(qk_norm_rope, inputs)
    assert_close(inputs, forwards)
    with reversed_programs():
        backwards = run(qk_norm_rope, inputs)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.parametrize("M", [None, 64])
def test_traffic(M: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 heads of 128 in bfloat16; backward 64 tokens per program."""
    monkeypatch.setattr(module, "BACKWARD_PROGRAMS", 1)
    inputs = OP.inputs(dtype=torch.bfloat16, B=1, L=64, M=M, N=32, K=128)
    with counted() as traffic:
        outputs = qk_norm_rope(**inputs)
    least = OP.cost(**inputs)[0]
    assert traffic.requested <= BYTES_RATIO * least
    assert traffic.unique <= UNIQUE_RATIO * least

    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    out_grads = [torch.randn_like(output) for output in outputs]
    with counted() as traffic:
        torch.autograd.grad(outputs, leaves, out_grads)
    read = sum(t.nbytes for t in (*inputs.values(), *out_grads) if isinstance(t, Tensor))
    least = read + sum(leaf.nbytes for leaf in leaves)
    assert traffic.requested <= BYTES_RATIO * least
    assert traffic.unique <= UNIQUE_RATIO * least


@pytest.mark.parametrize("options", [SMALL, SMALL | {"M": 3}, SMALL | {"packed": True}], ids=str)
def test_registration(options: dict[str, Any]) -> None:
    arguments = tuple(OP.inputs(**options).values())
    torch.library.opcheck(torch.ops.transfer1.qk_norm_rope.default, arguments)
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    out_grads = [torch.randn_like(a) for a in detached[:2]]
    backward = torch.ops.transfer1.qk_norm_rope_backward.default
    torch.library.opcheck(backward, (*out_grads, *detached))


def test_compiled_in_one_graph() -> None:
    inputs = OP.inputs(**SMALL)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    actual, expected = run(compiled, inputs), run(qk_norm_rope, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_activation_checkpointing() -> None:
    inputs = OP.inputs(**SMALL)

    def checkpointed(**named: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(qk_norm_rope, use_reentrant=False, **named)

    actual, expected = run(checkpointed, inputs), run(qk_norm_rope, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_BLNK": zeros(2, 5, 64)}, r"q has shape \(2, 5, 64\), but must be \[B, L, N, K\]"),
        ({"q_BLNK": zeros(2, 5, 2, 33)}, "heads have size 33, but must be even and at most 256"),
        ({"q_BLNK": zeros(2, 5, 2, 258)}, "heads have size 258"),
        ({"k_BMNK": zeros(2, 5, 1, 32)}, r"k has shape \(2, 5, 1, 32\), but must be \[2, M, 2, 32"),
        ({"k_BMNK": zeros(2, 4, 2, 32)}, "with positions .* equally long, but L=5 and M=4"),
        ({"q_weight_K": zeros(16)}, r"q_weight has shape \(16,\), but must be \[32\]"),
        ({"k_weight_K": zeros(1, 32)}, r"k_weight has shape \(1, 32\)"),
        ({"q_BLNK": zeros(2, 5, 2, 32, dtype=torch.float64)}, "q is torch.float64, but must be"),
        ({"rope_2LR": zeros(2, 5, 32)}, r"rope has shape \(2, 5, 32\) .* \[2, 5, 16\]"),
        (
            {"rope_2LR": zeros(2, 5, 16, dtype=torch.bfloat16)},
            "rope .* torch.bfloat16, .* torch.float32",
        ),
        ({"rope_2LR": zeros(2, 5, 16, requires_grad=True)}, "rope requires a gradient"),
        ({"k_BMNK": zeros(2, 5, 32, 2).mT}, r"k has strides \(320, 64, 1, 2\)"),
        ({"k_weight_K": zeros(32, device="meta")}, "k_weight is on meta, but q is on cpu"),
    ],
)
def test_bad_inputs_are_named(changes: dict[str, Any], message: str) -> None:
    inputs = OP.inputs(**SMALL) | changes
    with pytest.raises(
        ValueError, match=f"qk_norm_rope: {message}.*kernels.qk_norm_rope=reference"
    ):
        qk_norm_rope(**inputs)


def test_all_dtypes_are_tested() -> None:
    assert {dtype for case in OP.cases.values() for dtype in case.dtypes} == set(FLOATS)
