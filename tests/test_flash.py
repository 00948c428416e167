"""Flash attention in Triton's interpreter: every configuration against an explicit softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_cases import needs_interpreter
from torch import Tensor

import kernels
from bench.interpreter import counted, reversed_programs
from bench.parity import FLOAT32_TOLERANCE, FLOOR, LOW_PRECISION_FACTOR, relative_rms
from kernels.adaln_attention.flash import attention, attention_op
from kernels.adaln_attention.flash_tiles import usable
from kernels.adaln_attention.reference import attention as reference
from kernels.launch import Launch, intercepted
from kernels.registry import FLOATS
from transfer1.model.block import checkpointing

pytestmark = needs_interpreter

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHAPES = {  # B, L, M, N, K: each head size, lengths that divide no tile, and a single query
    "cross_32": (2, 77, 53, 3, 32),
    "self_64": (3, 130, 130, 1, 64),
    "cross_96": (2, 70, 33, 2, 96),
    "self_128": (1, 200, 200, 1, 128),
    "cross_256": (1, 70, 133, 1, 256),
    "full_tiles": (1, 128, 256, 1, 128),
    "one_query": (2, 1, 150, 1, 64),
}
RESULTS = ("out", "dq", "dk", "dv")

Qkv = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def unwritten_is_nan() -> Iterator[None]:
    """Empty tensors hold NaN, so an element that no program writes cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def configured(target: str) -> Iterator[list[Launch]]:
    """Interpret the kernels as they are configured for `target`; yields the launches."""
    launches: list[Launch] = []

    def interpret(launch: Launch) -> None:
        launches.append(launch)
        launch.kernel[launch.grid](**launch.arguments, **launch.options)

    with intercepted(target, interpret):
        yield launches


def inputs(B: int, L: int, M: int, N: int, K: int, dtype: torch.dtype = torch.float32) -> Qkv:
    q, k, v = (torch.randn(B, length, N, K, dtype=dtype) for length in (L, M, M))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def oracle(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """Explicit softmax in float64."""
    scores = torch.einsum("blnk,bmnk->bnlm", q_BLNK, k_BMNK) / math.sqrt(q_BLNK.shape[-1])
    return torch.einsum("bnlm,bmnk->blnk", scores.softmax(-1), v_BMNK)


def results(function: Any, qkv: Qkv, grad: Tensor) -> dict[str, Tensor]:
    out = function(*qkv)
    return dict(zip(RESULTS, (out, *torch.autograd.grad(out, qkv, grad)), strict=True))


def exact_results(qkv: Qkv, grad: Tensor) -> dict[str, Tensor]:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    return results(oracle, (q, k, v), grad.double())


def check(actual: dict[str, Tensor], qkv: Qkv, grad: Tensor) -> None:
    exact = exact_results(qkv, grad)
    theirs = results(reference, qkv, grad)
    for name in RESULTS:
        error = relative_rms(actual[name], exact[name])
        allowed = LOW_PRECISION_FACTOR * relative_rms(theirs[name], exact[name]) + FLOOR
        if grad.dtype == torch.float32:
            allowed = FLOAT32_TOLERANCE
        assert error <= allowed, f"{name}: {error:.2g} > {allowed:.2g}"
        assert actual[name].is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("target", TARGETS)
def test_output_and_gradients(target: str, dtype: torch.dtype, shape: str) -> None:
    qkv = inputs(*SHAPES[shape], dtype=dtype)
    grad = torch.randn_like(qkv[0])
    with configured(target) as launches:
        actual = results(attention, qkv, grad)
    check(actual, qkv, grad)
    assert [launch.kernel.__name__ for launch in launches] == [
        "attention_kernel",
        "delta_kernel",
        "key_gradients_kernel",
        "query_gradients_kernel",
    ]


@pytest.mark.parametrize("case", kernels.OPS["attention"].cases)
def test_cases_of_the_table(case: str) -> None:
    op = kernels.OPS["attention"]
    for dtype in op.cases[case].dtypes:
        qkv = tuple(op.inputs(dtype=dtype, **op.cases[case].options).values())
        grad = torch.randn_like(qkv[0])
        check(results(op.build("triton"), qkv, grad), qkv, grad)


@pytest.mark.parametrize("L", [1, 70])
@pytest.mark.parametrize("target", TARGETS)
def test_one_key_takes_all_the_weight(target: str, L: int) -> None:
    qkv = inputs(2, L, 1, 2, 64)
    grad = torch.randn_like(qkv[0])
    with configured(target):
        actual = results(attention, qkv, grad)
    torch.testing.assert_close(actual["out"], qkv[2].expand_as(qkv[0]))
    torch.testing.assert_close(actual["dv"], grad.sum(1, keepdim=True))
    for name in ("dq", "dk"):
        torch.testing.assert_close(
            actual[name], torch.zeros_like(actual[name]), atol=1e-4, rtol=0, msg=name
        )


@pytest.mark.parametrize("target", TARGETS)
def test_log_sum_exp(target: str) -> None:
    q, k, v = inputs(2, 70, 53, 2, 64)
    with configured(target):
        _, lse = attention_op(q, k, v)
    scores = torch.einsum("blnk,bmnk->bnlm", q.double(), k.double()) / 8
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_absent_keys_leak_nothing_where_scores_are_very_low(
    target: str, dtype: torch.dtype
) -> None:
    """All scores are near -300: the weight of a key of zeros would overflow."""
    q, k, v = inputs(1, 33, 70, 1, 64, dtype)
    with torch.no_grad():
        q.copy_(q * 0.1 + 7)
        k.copy_(k * 0.1 - 6)
    grad = torch.randn_like(q)
    with configured(target):
        actual = results(attention, (q, k, v), grad)
    assert all(value.isfinite().all() for value in actual.values())
    exact = exact_results((q, k, v), grad)
    assert relative_rms(actual["out"], exact["out"]) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_strided_inputs_are_read_where_they_lie(target: str) -> None:
    B, L, N, K = 3, 70, 2, 32
    packed = torch.randn(B, L, 3, N, K)
    heads_first = torch.randn(B, N, L, K).transpose(1, 2)
    qkv = (packed[:, :, 1], heads_first, packed[:, :, 2])
    assert all(usable(x) is x for x in qkv)
    leaves = tuple(x.detach().requires_grad_() for x in qkv)
    dense = tuple(x.detach().contiguous().requires_grad_() for x in qkv)
    grad = torch.randn(B, N, L, K).transpose(1, 2)
    with configured(target):
        actual, expected = results(attention, leaves, grad), results(attention, dense, grad)
    for name in RESULTS:
        assert torch.equal(actual[name], expected[name]), name
    check(actual, leaves, grad)


def unusable_layouts() -> dict[str, Tensor]:
    return {
        "last axis not dense": torch.randn(2, 40, 32, 2).transpose(2, 3),
        "same head for all": torch.randn(2, 40, 1, 32).expand(-1, -1, 2, -1),
        "misaligned": torch.randn(2 * 40 * 2 * 32 + 1)[1:].view(2, 40, 2, 32),
        "odd row stride": torch.randn(2, 40, 2 * 32 + 1)[..., :-1].view(2, 40, 2, 32),
    }


@pytest.mark.parametrize("layout", unusable_layouts())
def test_other_layouts_are_copied(layout: str) -> None:
    qkv = tuple(unusable_layouts()[layout].requires_grad_() for _ in range(3))
    assert all(usable(x) is not x for x in qkv)
    grad = torch.ones(2, 40, 2, 1).expand_as(qkv[0])  # as the gradient of a sum
    assert usable(grad) is not grad
    check(results(attention, qkv, grad), qkv, grad)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_addresses_beyond_32_bits(target: str) -> None:
    """Rows 2^30 elements apart; the memory between them is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 3 * 32, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    q, k, v = (
        storage[32 * i :].as_strided((1, 3, 1, 32), (2**40, 2**30, 32, 1), 32 * i).normal_()
        for i in range(3)
    )
    with configured(target):
        out = attention(q, k, v)
    assert relative_rms(out, oracle(q.double(), k.double(), v.double())) < 1e-2


@pytest.mark.parametrize("target", TARGETS)
def test_bits_do_not_depend_on_the_order_of_programs(target: str) -> None:
    qkv = inputs(2, 140, 135, 2, 64, torch.bfloat16)
    grad = torch.randn_like(qkv[0])
    with configured(target):
        forwards = results(attention, qkv, grad)
        with reversed_programs():
            backwards = results(attention, qkv, grad)
    for name in RESULTS:
        assert torch.equal(forwards[name], backwards[name]), name


def test_forward_traffic() -> None:
    """Traffic of the forward pass: K and V once per tile of 128 queries, all else once."""
    q, k, v = inputs(1, 256, 256, 1, 128, torch.bfloat16)
    with counted() as traffic, torch.no_grad():
        attention(q, k, v)
    least = q.nbytes + 2 * (k.nbytes + v.nbytes) + q.nbytes + 4 * 256
    assert traffic.requested == least
    assert traffic.unique == least - k.nbytes - v.nbytes


def test_registration() -> None:
    qkv = inputs(2, 20, 33, 2, 32)
    torch.library.opcheck(attention_op, qkv)
    out, lse = attention_op(*qkv)
    backward = torch.ops.transfer1.attention_backward.default
    with torch.no_grad():
        torch.library.opcheck(backward, (torch.randn_like(out), *qkv, out, lse))


def test_torch_compile() -> None:
    qkv = inputs(2, 20, 33, 2, 32)
    grad = torch.randn_like(qkv[0])
    compiled = torch.compile(lambda *x: attention(*x) + 0, fullgraph=True, backend="aot_eager")
    actual, expected = results(compiled, qkv, grad), results(attention, qkv, grad)
    for name in RESULTS:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize(("mode", "forwards"), [("none", 1), ("selective", 1), ("block", 2)])
def test_activation_checkpointing(mode: str, forwards: int) -> None:
    qkv = inputs(2, 20, 33, 2, 32)
    grad = torch.randn_like(qkv[0])
    expected = results(lambda *x: attention(*x).sin(), qkv, grad)
    with configured("sm_90") as launches:
        run = checkpointing(mode)
        actual = results(lambda *x: run(lambda *y: attention(*y).sin(), *x), qkv, grad)
    for name in RESULTS:
        assert torch.equal(actual[name], expected[name]), name
    names = [launch.kernel.__name__ for launch in launches]
    assert names.count("attention_kernel") == forwards


def test_no_queries() -> None:
    q, k, v = inputs(1, 0, 5, 1, 32)
    out = attention(q, k, v)
    assert out.shape == q.shape
    _, dk, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(dk, torch.zeros_like(k))


BAD: dict[str, tuple[tuple[Tensor, ...], str]] = {
    "three axes": ((torch.zeros(2, 4, 32),) * 3, "q has shape .2, 4, 32., but must have four"),
    "head size": ((torch.zeros(1, 4, 1, 48),) * 3, "head size 48 .* not one of 32, 64, 96"),
    "dtype": ((torch.zeros(1, 4, 1, 32, dtype=torch.float64),) * 3, "q is torch.float64"),
    "mixed dtypes": (
        (torch.zeros(1, 4, 1, 32), *(torch.zeros(1, 4, 1, 32, dtype=torch.bfloat16),) * 2),
        "k is torch.bfloat16 and q is torch.float32",
    ),
    "heads": (
        (torch.zeros(1, 4, 2, 32), torch.zeros(1, 4, 1, 32), torch.zeros(1, 4, 1, 32)),
        r"both must have \[1, M, 2, 32\]",
    ),
    "lengths": (
        (torch.zeros(1, 4, 1, 32), torch.zeros(1, 4, 1, 32), torch.zeros(1, 5, 1, 32)),
        r"v \(1, 5, 1, 32\)",
    ),
    "no keys": ((torch.zeros(1, 4, 1, 32), *(torch.zeros(1, 0, 1, 32),) * 2), "M at least 1"),
    "batch": ((torch.zeros(1, 1, 1, 32).expand(65536, -1, -1, -1),) * 3, "at most 65535"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused(case: str) -> None:
    tensors, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        attention(*tensors)
    assert "kernels.attention=reference" in str(error.value)


def test_an_unknown_architecture_is_refused() -> None:
    with configured("gfx1100"), pytest.raises(ValueError, match="gfx1100.*=reference"):
        attention(*inputs(1, 4, 4, 1, 32))
