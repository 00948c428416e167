"""Attention by bfloat16 products on the CPU: its arithmetic, whoever compiles the steps between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kernels
from bench.parity import check_parity, inputs_of
from kernels.adaln_attention import compiled, reference

ATTENTION = kernels.OPS["attention"]


@pytest.fixture
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the products for every bfloat16 input, in small blocks."""
    monkeypatch.setattr(compiled, "faster_by_products", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(compiled, "LEAST", 0)
    monkeypatch.setattr(compiled, "BLOCK", 4096)
    monkeypatch.setattr(compiled, "LEAST_ROWS", 32)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the steps as they are written, which takes no time to compile."""
    monkeypatch.setattr(compiled, "planned", lambda function, *_: function)
    yield


@pytest.mark.parametrize("case", ATTENTION.cases)
def test_products_equal_the_reference(case: str, by_products: None, uncompiled: None) -> None:
    check_parity(ATTENTION, compiled.attention, inputs_of(ATTENTION, case, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("case", ATTENTION.cases)
def test_compiled_steps_equal_the_reference(case: str, by_products: None) -> None:
    check_parity(ATTENTION, compiled.attention, inputs_of(ATTENTION, case, torch.bfloat16))


@pytest.mark.parametrize(("name", "factor", "addend"), [("q_BLNK", 16, 0), ("v_BMNK", 1, 30)])
def test_large_scores_and_values_are_as_exact(
    name: str, factor: float, addend: float, by_products: None, uncompiled: None
) -> None:
    """Scores must not be rounded to bfloat16; values may have a large part in common."""
    torch.manual_seed(0)
    inputs = ATTENTION.inputs(dtype=torch.bfloat16, B=1, L=64, M=96, N=1, K=32)
    inputs[name] = (factor * inputs[name].detach() + addend).requires_grad_()
    check_parity(ATTENTION, compiled.attention, inputs)


def test_other_inputs_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def library(q: torch.Tensor, *_: Any) -> torch.Tensor:
        calls.append(q.dtype)
        return q

    monkeypatch.setattr(reference, "attention", library)
    for dtype, length in ((torch.float32, 512), (torch.float16, 512), (torch.bfloat16, 4)):
        q = torch.zeros(1, length, 1, 32, dtype=dtype)
        compiled.attention(q, q, q)
    assert calls == [torch.float32, torch.float16, torch.bfloat16]


def test_the_op_is_one_that_pytorch_can_trace(by_products: None, uncompiled: None) -> None:
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.bfloat16) for length in (5, 7, 7))
    arguments = tuple(x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(compiled.product_attention, arguments, rtol=0.05, atol=0.05)
