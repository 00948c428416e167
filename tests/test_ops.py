"""Every op of the table, every backend that this machine can run: outputs and all gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Op

FLOAT32_TOLERANCE = 1e-5  # relative RMS against the reference
LOW_PRECISION_FACTOR = 2.0  # error against float32, relative to that of the reference in bfloat16
FLOOR = 1e-6


def test_auto_is_the_reference_until_measured() -> None:
    ops = kernels.select("auto", device="cpu")
    assert dict(ops.table) == dict.fromkeys(kernels.OPS, "reference")
    assert ops.attention is kernels.OPS["attention"].reference


def test_one_op_may_differ_from_the_rest() -> None:
    ops = kernels.select("reference", attention="compile")
    assert ops.table["attention"] == "compile"
    assert {b for op, b in ops.table.items() if op != "attention"} == {"reference"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"default": "cuda"}, "auto, triton, compile, reference"),
        ({"attention": "fast"}, "kernels.attention=fast: choose one of"),
        ({"atention": "reference"}, "unknown op atention; ops are .*attention"),
    ],
)
def test_a_wrong_choice_names_the_right_ones(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.select(**choice)


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="kernels.attention=reference"):
        kernels.select(attention="triton")


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.registry.has_cpp_compiler", lambda: False)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        kernels.select("compile")


def test_ops_are_frozen() -> None:
    ops = kernels.select("reference")
    with pytest.raises(AttributeError, match="frozen"):
        ops.attention = None
    assert copy.deepcopy(ops) is ops


def test_two_ops_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        kernels.register(kernels.OPS["attention"])


@pytest.mark.slow
@pytest.mark.parametrize("op", kernels.OPS.values(), ids=lambda op: op.name)
def test_compile_equals_reference(op: Op) -> None:
    torch.manual_seed(0)
    inputs = op.inputs(dtype=torch.float32)
    for name, actual, expected in paired(op.build("compile"), op.reference, inputs, inputs):
        error = relative_rms(actual, expected)
        assert error <= FLOAT32_TOLERANCE, f"{op.name} {name}: {error:.2g}"


@pytest.mark.slow
@pytest.mark.parametrize("op", kernels.OPS.values(), ids=lambda op: op.name)
def test_compile_in_bfloat16_is_as_exact_as_the_reference(op: Op) -> None:
    torch.manual_seed(0)
    low = op.inputs(dtype=torch.bfloat16)
    full = to_float32(low)
    ours = paired(op.build("compile"), op.reference, low, full)
    theirs = paired(op.reference, op.reference, low, full)
    for (name, actual, exact), (_, reference, _) in zip(ours, theirs, strict=True):
        allowed = LOW_PRECISION_FACTOR * relative_rms(reference, exact) + FLOOR
        assert relative_rms(actual, exact) <= allowed, f"{op.name} {name}"


def paired(
    first: Callable[..., Any],
    second: Callable[..., Any],
    first_inputs: dict[str, Any],
    second_inputs: dict[str, Any],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names and values of what both give: results, gradients, or lists changed in place."""
    results = [run(first, first_inputs), run(second, second_inputs)]
    assert list(results[0]) == list(results[1])
    for name in results[0]:
        yield name, results[0][name], results[1][name]


def run(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    inputs = copy.deepcopy(inputs)
    returned = function(**inputs)
    if returned is None:
        return {
            f"{name}[{index}]": tensor
            for name, value in inputs.items()
            if isinstance(value, list)
            for index, tensor in enumerate(value)
            if tensor is not None
        }
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    leaves = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(output.shape, generator=generator) for output in outputs]
        total = sum((o.float() * w).sum() for o, w in zip(outputs, weights, strict=True))
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, list(leaves.values()))
        named |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return named


def to_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32, requiring gradients where the originals do."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            return value.detach().float().requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in inputs.items()}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt().clamp_min(1e-30)).item()
