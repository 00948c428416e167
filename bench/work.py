"""What there is to time of the table of ops: every op, size, dtype and pass, with all rivals.

Nothing is handed out before its parity has been checked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import BACKENDS, OPS, Op
from kernels.registry import has_cpp_compiler

from .costs import forward_cost, training_cost
from .parity import check_parity, differentiable, inputs_of
from .rivals import peers_of
from .timing import forget_compiled, matrix_product, memory_pass

FLOPS_PER_BYTE = 50  # above, arithmetic is the limit and not memory
GPU_SIZES = ("7B", "7B_cross")  # would take minutes on a CPU
FORWARD, TRAINING = "forward", "forward and backward"


@dataclass(frozen=True)
class Work:
    """One thing to time.

    Attributes:
        op, size, dtype: what is computed on which inputs.
        passes: `FORWARD` or `TRAINING`; "" for ops that nothing differentiates.
        bytes, flops: the least that it takes.
        ours: backend -> call.
        peers: name -> call, what one would use instead.
        limit: name and call of a plain pass that moves or computes as much.
        limit_scale: the work's share of that of one call of the limit.
    """

    op: Op
    size: str
    dtype: torch.dtype
    passes: str
    bytes: int
    flops: int
    ours: Mapping[str, Callable[[], Any]]
    peers: Mapping[str, Callable[[], Any]]
    limit: tuple[str, Callable[[], Any]]
    limit_scale: float

    @property
    def name(self) -> str:
        """Op, size, dtype and pass in one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(part for part in (self.op.name, self.size, dtype, self.passes) if part)


def backends_on(device: str, op: Op) -> list[str]:
    """Backends that can be timed here: Triton's interpreter says nothing about speed."""
    possible = {
        "triton": op.triton is not None and device == "cuda",
        "compile": has_cpp_compiler(),
        "reference": True,
    }
    return [backend for backend in BACKENDS if possible.get(backend)]


def check_cases(op: Op, backends: Sequence[str], device: str) -> None:
    """Raise AssertionError where a backend fails one of the op's parity cases.

    `torch.compile` makes new code for every shape: there the inputs that are timed are checked, and
    the cases only where its use is code of ours.
    """
    for backend in backends:
        if backend == "compile" and op.compiled is None:
            continue
        for case, spec in op.cases.items():
            if backend == "compile" and spec.options.get("master") == "none":
                continue  # it does not round stochastically, and says so
            inputs = inputs_of(op, case, spec.dtypes[0], device)
            check_parity(op, op.build(backend, device), inputs)


def works(
    op: Op,
    device: str,
    sizes: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] | None = None,
) -> Iterator[Work]:
    """Check an op, then yield all there is to time of it.

    Args:
        sizes: names of sizes; None for all that make sense on this device.
        dtypes: None for the first one of a size that trainings on this device use.
        backends: of those that run here; None for all.

    Raises:
        AssertionError: a backend is not as exact as the reference; it is not timed then.
    """
    chosen = [b for b in backends_on(device, op) if backends is None or b in backends]
    forget_compiled()
    check_cases(op, chosen, device)
    for size, spec in op.sizes.items():
        if sizes and size not in sizes:
            continue
        if device == "cpu" and size in GPU_SIZES:
            print(f"{op.name} {size}: left to a GPU", flush=True)
            continue
        for dtype in dtypes or [_usual_dtype(spec.dtypes, device)]:
            if dtype in spec.dtypes:
                torch.manual_seed(0)
                inputs = op.inputs(device=device, dtype=dtype, **spec.options)
                yield from _works(op, size, dtype, device, chosen, inputs)


def _usual_dtype(dtypes: Sequence[torch.dtype], device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" and torch.bfloat16 in dtypes else dtypes[0]


def _works(
    op: Op,
    size: str,
    dtype: torch.dtype,
    device: str,
    backends: Sequence[str],
    inputs: dict[str, Any],
) -> Iterator[Work]:
    forget_compiled()
    is_trained = differentiable(inputs)  # and changes none of its inputs
    if "compile" in backends and is_trained:
        check_parity(op, op.build("compile", device), inputs)
    peers = peers_of(op.name, inputs, dtype)
    cost = forward_cost(op, inputs)
    ours = {
        b: _call(op, b, device, inputs if is_trained else copy.deepcopy(inputs)) for b in backends
    }
    if not is_trained:
        yield _work(op, size, dtype, "", cost, ours, peers, device)
        return
    yield _work(op, size, dtype, FORWARD, cost, ours, peers, device)
    outputs = _outputs(next(iter(ours.values())))
    gradients = [torch.randn_like(output) for output in outputs]
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    cost = training_cost(op, inputs, outputs)

    def trained(calls: Mapping[str, Callable[[], Any]]) -> Mapping[str, Callable[[], Any]]:
        return {n: partial(_forward_backward, call, leaves, gradients) for n, call in calls.items()}

    yield _work(op, size, dtype, TRAINING, cost, trained(ours), trained(peers), device)


def _work(
    op: Op,
    size: str,
    dtype: torch.dtype,
    passes: str,
    cost: tuple[int, int],
    ours: Mapping[str, Callable[[], Any]],
    peers: Mapping[str, Callable[[], Any]],
    device: str,
) -> Work:
    moved, flops = cost
    if flops > FLOPS_PER_BYTE * moved:
        product, product_flops = matrix_product(dtype, device)
        limit, scale = ("matrix product", product), flops / product_flops
    else:
        reads_only = op.name == "grad_norm"
        limit, scale = ("memory pass", memory_pass(moved, device, reads_only=reads_only)), 1.0
    return Work(op, size, dtype, passes, moved, flops, ours, peers, limit, scale)


def _call(op: Op, backend: str, device: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call of one backend; that of `adamw_step` is a whole update, gradient norm included."""
    call = op.build(backend, device)
    if op.name != "adamw_step":
        return partial(call, **inputs)
    norm = OPS["grad_norm"].build(backend, device)

    def update() -> None:
        inputs["clip_coef"] = (1.0 / (norm(inputs["grads"]) + 1e-6)).clamp(max=1.0)
        call(**inputs)

    return update


def _outputs(call: Callable[[], Any]) -> list[Tensor]:
    returned = call()
    return [returned] if isinstance(returned, Tensor) else list(returned)


def _forward_backward(
    call: Callable[[], Any], leaves: list[Tensor], gradients: list[Tensor]
) -> None:
    torch.autograd.grad(_outputs(call), leaves, gradients)
