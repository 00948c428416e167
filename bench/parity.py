"""Is a backend of an op as exact as its reference: results, gradients, tensors changed in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import Op

FLOAT32_TOLERANCE = 1e-5  # relative RMS against the reference
LOW_PRECISION_FACTOR = 2.0  # error against float32, relative to that of the reference
FLOOR = 1e-6


def inputs_of(
    op: Op, case: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The inputs of a case, the same every time."""
    torch.manual_seed(0)
    return op.inputs(dtype=dtype, device=device, **op.cases[case].options)


def check_parity(op: Op, function: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """Assert that a backend is as exact as the reference, on everything that it computes."""
    dtypes = {t.dtype for t in tensors_of(inputs) if t.is_floating_point()} - {torch.float64}
    if dtypes <= {torch.float32}:
        for name, actual, expected in paired(function, op.reference, inputs, inputs):
            error = relative_rms(actual, expected)
            assert error <= FLOAT32_TOLERANCE, f"{op.name} {name}: {error:.2g}"
        return
    exact = run(op.reference, to_float32(inputs)) if differentiable(inputs) else None
    theirs = run(op.reference, inputs)
    for name, actual in run(function, inputs).items():
        if exact is None:
            check_rounding(f"{op.name} {name}", actual, theirs[name])
            continue
        allowed = LOW_PRECISION_FACTOR * relative_rms(theirs[name], exact[name]) + FLOOR
        error = relative_rms(actual, exact[name])
        assert error <= allowed, f"{op.name} {name}: {error:.2g}, allowed {allowed:.2g}"


def check_rounding(name: str, actual: Tensor, expected: Tensor) -> None:
    """float32 results agree to 1e-5; rounded ones may differ by one unit where they straddle a tie.

    An int16 remainder says how far a number is from its rounding: it is compared as such.
    """
    if actual.dtype == torch.int16:
        steps = (actual.int() - expected.int()).abs()
        steps = torch.minimum(steps, 2**16 - steps)  # the other side of a tie
        assert steps.float().mean() <= 2, f"{name}: remainders differ by {steps.float().mean():.3g}"
        return
    if actual.dtype == torch.float32:
        assert relative_rms(actual, expected) <= FLOAT32_TOLERANCE, name
        return
    different = actual != expected
    share = different.float().mean().item() if actual.numel() else 0.0
    assert share <= 0.001, f"{name}: {share:.2%} of the roundings differ"
    one_unit = torch.finfo(actual.dtype).eps * expected[different].float().abs()
    error = (actual[different].float() - expected[different].float()).abs()
    assert (error <= one_unit + 1e-30).all(), f"{name}: more than one unit"


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
    """Call a function on copies; its results, gradients, or the lists that it changed."""
    inputs = copy.deepcopy(inputs)
    returned = function(**inputs)
    if returned is None:
        return {
            f"{name}[{index}]": tensor
            for name, value in inputs.items()
            if isinstance(value, list)
            for index, tensor in enumerate(value)
            if tensor is not None and tensor.numel()
        }
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    leaves = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator).to(o.device) for o in outputs]
        total = sum((o.float() * w).sum() for o, w in zip(outputs, weights, strict=True))
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, list(leaves.values()))
        named |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return named


def tensors_of(inputs: dict[str, Any]) -> Iterator[Tensor]:
    for value in inputs.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                yield item


def differentiable(inputs: dict[str, Any]) -> bool:
    return any(tensor.requires_grad for tensor in tensors_of(inputs))


def to_float32(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float32, requiring gradients where the originals do."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            return value.detach().float().requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in inputs.items()}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of the expected values."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt().clamp_min(1e-30)).item()
