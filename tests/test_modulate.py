"""The Triton kernels of adaLN modulation and gated residuals, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from modulate_oracle import (
    TRITON,
    check,
    converted,
    exact,
    inputs_of,
    outputs_of,
    run,
)
from op_cases import needs_interpreter
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from bench.interpreter import counted, reversed_programs
from bench.parity import relative_rms
from kernels.adaln_attention import rows

pytestmark = needs_interpreter

CASES = [
    pytest.param(name, case.options, dtype, id=f"{name}-{label}-{str(dtype)[6:]}")
    for name in TRITON
    for label, case in kernels.OPS[name].cases.items()
    for dtype in case.dtypes
]
PROGRAMS = rows.PROGRAMS


@pytest.fixture(autouse=True)
def few_programs_and_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs of several rows even for few tokens; new tensors are NaN until they are written."""
    monkeypatch.setattr(rows, "PROGRAMS", 4)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "options", "dtype"), CASES)
def test_outputs_and_gradients(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(name, inputs_of(name, dtype, **options), dtype)


@pytest.mark.parametrize("B", [1, 2, 3])
@pytest.mark.parametrize(("L", "D"), [(1, 64), (35, 8), (9, 100), (3, 5120), (2, 8192)])
@pytest.mark.parametrize("name", TRITON)
def test_sizes(name: str, B: int, L: int, D: int) -> None:
    check(name, inputs_of(name, B=B, L=L, D=D), torch.float32)


@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize(("tokens", "vectors"), [("bfloat16", "float32"), ("float32", "float16")])
def test_dtypes_may_differ(name: str, tokens: str, vectors: str) -> None:
    inputs = inputs_of(name, L=9)
    for key, value in inputs.items():
        if isinstance(value, Tensor):
            kind = tokens if key in ("x_BLD", "addend_BLD") else vectors
            inputs[key] = value.detach().to(getattr(torch, kind)).requires_grad_()
    check(name, inputs, torch.bfloat16)


@pytest.mark.parametrize("name", TRITON)
def test_any_strides(name: str) -> None:
    """Tokens that are not contiguous, one vector for all samples, vectors in a column."""
    inputs = inputs_of(name, L=9)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() == 3:
            inputs[key] = value.detach().mT.contiguous().mT.requires_grad_()
    vectors = [key for key, value in inputs.items() if key.endswith("_BD")]
    inputs[vectors[0]] = inputs[vectors[0]].detach()[:1].expand(2, -1).requires_grad_()
    inputs[vectors[-1]] = inputs[vectors[-1]].detach().t().contiguous().t().requires_grad_()
    check(name, inputs, torch.float32)


@pytest.mark.parametrize("name", ["adaln_modulate", "residual_adaln_modulate"])
def test_a_large_mean_does_not_drown_the_variance(name: str) -> None:
    """As a sum of squares minus a square would: 1e4 in float32 leaves 1e-3 of a variance of 1."""
    inputs = inputs_of(name, L=9)
    inputs["x_BLD"] = (inputs["x_BLD"].detach() + 100).requires_grad_()
    actual = outputs_of(TRITON[name](**inputs))[-1]
    expected = outputs_of(exact(name)(**converted(inputs, torch.float64)))[-1]
    assert relative_rms(actual, expected) <= 3e-5


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("adaln_modulate", {"position": None}, 1),
        ("adaln_modulate", {}, 1),
        ("residual_adaln_modulate", {}, 2),
        ("gated_residual", {}, 1),
    ],
)
def test_what_is_kept_for_the_backward_pass(name: str, options: dict[str, Any], kept: int) -> None:
    """x' and y where they are needed, and never the normalised tokens."""
    inputs = inputs_of(name, B=2, L=9, D=64, **options)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = outputs_of(TRITON[name](**inputs))
    tokens = [tensor for tensor in saved if tensor.shape == (2, 9, 64)]
    others = [*inputs.values(), outputs[0] if len(outputs) == 2 else None]
    known = {tensor.data_ptr() for tensor in others if isinstance(tensor, Tensor)}
    assert len(tokens) == kept
    assert {tensor.data_ptr() for tensor in tokens} <= known
    assert all(tensor.numel() <= 2 * 64 for tensor in saved if tensor.dim() == 2)


@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize(("B", "L"), [(2, 0), (0, 3)])
def test_nothing_to_do(name: str, B: int, L: int) -> None:
    actual = run(TRITON[name], inputs_of(name, B=B, L=L))
    assert all(not value.isnan().any() for value in actual.values())


def test_a_result_may_go_unused() -> None:
    """A gradient that is not there counts as zeros; an expanded one is not contiguous."""
    for name, unused in product(["adaln_modulate", "residual_adaln_modulate"], [0, 1]):
        inputs = inputs_of(name, L=9)
        leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
        used = [
            torch.autograd.grad(
                function(**inputs)[1 - unused].sum(),
                leaves,
                allow_unused=True,
                materialize_grads=True,
            )
            for function in (TRITON[name], exact(name))
        ]
        for actual, expected in zip(*used, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_leaf_gets_a_gradient_of_its_own() -> None:
    """Gradients that are equal do not share memory: an optimizer may scale them in place."""
    for inputs, names in (
        (inputs_of("adaln_modulate", B=1, L=9), ("x_BLD", "position_LD")),
        (inputs_of("adaln_modulate", B=1, L=9, position="BLD"), ("x_BLD", "position_LD")),
        (inputs_of("gated_residual", B=1, L=9), ("x_BLD", "addend_BLD")),
    ):
        name = "gated_residual" if "addend_BLD" in inputs else "adaln_modulate"
        returned = TRITON[name](**inputs)
        sum(
            o.square().sum() for o in ([returned] if name == "gated_residual" else returned)
        ).backward()
        first, second = (inputs[key].grad for key in names)
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", TRITON)
def test_gradients_that_nobody_wants(name: str) -> None:
    inputs = inputs_of(name, L=9)
    for value in inputs.values():
        if isinstance(value, Tensor):
            value.requires_grad_(False)
    inputs["x_BLD"].requires_grad_()
    actual, expected = run(TRITON[name], inputs), run(exact(name), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRITON)
def test_order_of_programs_does_not_matter(name: str) -> None:
    inputs = inputs_of(name, torch.bfloat16, B=3, L=19)
    first = run(TRITON[name], inputs)
    with reversed_programs():
        second = run(TRITON[name], inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", TRITON)
def test_a_sample_does_not_depend_on_the_others(name: str) -> None:
    """Bit for bit, its gradients included; the position belongs to all of them."""
    inputs = inputs_of(name, torch.bfloat16, B=3, L=19)
    alone = {
        key: value.detach()[1:2].requires_grad_() if "_B" in key else value
        for key, value in inputs.items()
    }
    results = []
    for named in (inputs, alone):
        outputs = outputs_of(TRITON[name](**named))
        leaves = [v for k, v in named.items() if "_B" in k]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, outputs)])
    for together, single in zip(*results, strict=True):
        assert torch.equal(together[1], single[0])


@pytest.mark.parametrize("name", TRITON)
def test_checkpointing_recomputes_the_same_bits(name: str) -> None:
    inputs = inputs_of(name, torch.bfloat16, L=9)

    def recomputed(**named: Any) -> Any:
        return checkpoint(TRITON[name], **named, use_reentrant=False)

    first, second = run(TRITON[name], inputs), run(recomputed, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", TRITON)
def test_torch_compile_sees_one_graph(name: str) -> None:
    inputs = inputs_of(name, L=9)
    compiled = torch.compile(TRITON[name], fullgraph=True, backend="aot_eager")
    first, second = run(TRITON[name], inputs), run(compiled, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


def registered_calls() -> Iterator[Any]:
    """Every op of torch.library with arguments of every kind that it takes."""
    ops = torch.ops.transfer1
    for name in ("adaln_modulate", "residual_adaln_modulate"):
        for options in ({}, {"position": "BLD"}, {"position": None}):
            if name == "residual_adaln_modulate" and options:
                continue
            named = inputs_of(name, torch.bfloat16, L=9, D=64, **options)
            y = named.get("y_BLD", named.get("position_LD"))
            vectors = named.get("gate_BD"), named["shift_BD"], named["scale_BD"]
            yield ops.modulate.default, (named["x_BLD"], y, *vectors, 1e-6)
    named = {k: v.detach() for k, v in inputs_of("gated_residual", L=9, D=64).items()}
    x, y, gate, addend = named.values()
    statistics = torch.randn(2, 9), torch.rand(2, 9)
    for rest in ((y, gate), (None, None)):
        for dtotal in (addend, None):
            arguments = (x, dtotal, x, *statistics, gate, *rest, torch.float32)
            yield ops.modulate_backward.default, arguments
    yield ops.sum_over_samples.default, (x, torch.float16)
    yield ops.gated_residual_backward.default, (x, y, gate)
    for last in (addend, None):
        leaves = [None if v is None else v.clone().requires_grad_() for v in (x, y, gate, last)]
        yield ops.gated_residual.default, tuple(leaves)


def test_registrations() -> None:
    for op, arguments in registered_calls():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [
        ("adaln_modulate", "x_BLD", (2, 9, 8193), "x_BLD has shape .* D from 1 to 8192"),
        ("adaln_modulate", "x_BLD", (9, 96), "x_BLD has shape .* must be \\[B, L, D\\]"),
        ("adaln_modulate", "shift_BD", (1, 96), "shift_BD has shape .* must be \\(2, 96\\)"),
        ("adaln_modulate", "position_LD", (8, 96), "position_LD .* \\(9, 96\\) or \\(2, 9, 96\\)"),
        (
            "residual_adaln_modulate",
            "y_BLD",
            (2, 8, 96),
            "y_BLD has shape .* must be \\(2, 9, 96\\)",
        ),
        (
            "residual_adaln_modulate",
            "gate_BD",
            (2, 95),
            "kernels.residual_adaln_modulate=reference",
        ),
        ("gated_residual", "addend_BLD", (9, 96), "addend_BLD has shape"),
    ],
)
def test_wrong_shapes_are_named(name: str, key: str, shape: tuple[int, ...], message: str) -> None:
    inputs = inputs_of(name, L=9) | {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        TRITON[name](**inputs)


def test_wrong_dtypes_and_devices_are_named() -> None:
    inputs = inputs_of("gated_residual", L=9)
    with pytest.raises(ValueError, match="y_BLD is torch.float64, but must be one of .*float32"):
        TRITON["gated_residual"](**(inputs | {"y_BLD": inputs["y_BLD"].double()}))
    with pytest.raises(ValueError, match="gate_BD is on meta, but x_BLD is on cpu"):
        TRITON["gated_residual"](**(inputs | {"gate_BD": inputs["gate_BD"].to("meta")}))


@pytest.mark.parametrize(
    ("L", "forward", "backward"),
    [(1, 1, 8), (512, 2, 8), (4096, 16, 16), (16384, 64, 64), (56320, 64, 220), (100_000, 64, 391)],
)
def test_rows_per_program(
    L: int, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PROGRAMS", PROGRAMS)
    assert (rows.forward_rows(L), rows.backward_rows(L)) == (forward, backward)


def backward_bytes(name: str, inputs: dict[str, Any]) -> int:
    """The least: read gradients and what they are made of, write gradients, each once."""
    x, vectors = inputs["x_BLD"].nbytes, inputs["x_BLD"][:, 0].nbytes
    large, small = {
        "adaln_modulate": (3 if inputs.get("position_LD") is None else 4, 3),
        "residual_adaln_modulate": (6, 5),
        "gated_residual": (3, 2),
    }[name]
    return large * x + small * vectors


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adaln_modulate", {"position": None}),
        ("adaln_modulate", {"position": "LD"}),
        ("residual_adaln_modulate", {}),
        ("gated_residual", {}),
        ("gated_residual", {"addend": False}),
    ],
)
def test_bytes(name: str, options: dict[str, Any]) -> None:
    """At 64 rows per program at most 1.05 times the least; `-s` shows how many."""
    inputs = inputs_of(name, torch.bfloat16, B=1, L=256, D=1024, **options)
    with counted() as forward:
        outputs = outputs_of(TRITON[name](**inputs))
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
    with counted() as backward:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    least = kernels.OPS[name].cost(**inputs)[0], backward_bytes(name, inputs)
    for what, traffic, bytes_ in zip(
        ("forward", "backward"), (forward, backward), least, strict=True
    ):
        ratio = traffic.requested / bytes_
        unique = traffic.unique / bytes_
        print(f"\n{name} {options} {what}: requested {ratio:.4f}, unique {unique:.4f}")
        assert ratio <= 1.05
        assert unique <= 1.05
