"""The launches that `bench.static` and its tests look at: ops at the sizes of shipped models.

Sequences are cut to 256 tokens: their length is an argument of the compiled code, which is the same
for any multiple of 16, and 256 tokens make the sums over programs as wide as any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import OPS, Op
from kernels.launch import Launch, intercepted
from kernels.registry import FLOATS

TOKENS = 256
CONTEXT = 512  # tokens of text that cross-attention sees


@dataclass(frozen=True)
class Model:
    """Sizes of a shipped network.

    Attributes:
        width, heads: of every block; a head has `width // heads` elements.
        tokens: of one sample at full length.
    """

    width: int
    heads: int
    tokens: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads


MODELS = {
    "7B": Model(width=4096, heads=32, tokens=56_320),  # 121 frames of 704 x 1280
    "tiny_fa": Model(width=256, heads=2, tokens=2_048),
}


@dataclass(frozen=True)
class Use:
    """One way in which a model calls an op: options of the op's `inputs`."""

    op: str
    config: str
    options: dict[str, Any]
    dtype: torch.dtype

    def inputs(self, **others: Any) -> dict[str, Any]:
        return OPS[self.op].inputs(dtype=self.dtype, **{**self.options, **others})


def model_uses(op: str, name: str, tokens: int = TOKENS) -> Iterator[Use]:
    """How a block of the model calls the op, in bfloat16; nothing for ops of the optimizer."""
    model = MODELS[name]
    rows = {"B": 1, "L": tokens, "D": model.width}
    heads = {"B": 1, "L": tokens, "N": model.heads, "K": model.head_size}
    uses: dict[str, dict[str, dict[str, Any]]] = {
        "adaln_modulate": {"": {**rows, "position": None}, " position": rows},
        "residual_adaln_modulate": {"": rows},
        "gated_residual": {"": {**rows, "addend": False}, " addend": rows},
        "qk_norm_rope": {"": heads, " cross": {**heads, "M": CONTEXT}},
        "attention": {"": {**heads, "M": tokens}, " cross": {**heads, "M": CONTEXT}},
    }
    for label, options in uses.get(op, {}).items():
        yield Use(op, name + label, options, torch.bfloat16)


def table_uses(op: str) -> Iterator[Use]:
    """All cases of the table of ops, which reach every variant of a kernel."""
    for label, case in OPS[op].cases.items():
        for dtype in case.dtypes:
            name = f"{label} {str(dtype).removeprefix('torch.')}"
            yield Use(op, name, dict(case.options), dtype)


def dtype_uses(op: str) -> Iterator[Use]:
    """Widths, head sizes and mixtures of dtypes that no shipped model has but the kernels take."""
    if op == "attention":
        for K, dtype in itertools.product((32, 64, 96, 128, 256), FLOATS):
            name = f"heads of {K} {str(dtype).removeprefix('torch.')}"
            yield Use(op, name, {"B": 1, "L": 256, "M": 256, "N": 2, "K": K}, dtype)
    if op in ("adaln_modulate", "residual_adaln_modulate", "gated_residual"):
        for D, dtype in itertools.product((1536, 4096, 5120, 8191, 8192), FLOATS[:2]):
            for vectors in FLOATS[:2]:
                kinds = [str(kind).removeprefix("torch.") for kind in (dtype, vectors)]
                name = f"width {D} {kinds[0]}, vectors {kinds[1]}"
                options = {"B": 1, "L": 256, "D": D, "vector_dtype": vectors}
                yield Use(op, name, options, dtype)


def uses_of(op: str, every: bool = False) -> Iterator[Use]:
    """What is compiled for an op: models' sizes, or the table of ops where no model has any.

    With `every` also the rest of the table and of what the kernels take.
    """
    found = [use for name in MODELS for use in model_uses(op, name)]
    yield from found
    if every or not found:
        yield from (use for use in table_uses(op) if every or use.dtype != torch.float16)
    if every:
        yield from dtype_uses(op)


def launches_of(use: Use, target: str) -> list[tuple[str, Launch]]:
    """("forward" or "backward", launch) of everything that one call of an op sets off."""
    return launches_for(OPS[use.op], use.inputs(), target)


def launches_for(op: Op, inputs: dict[str, Any], target: str) -> list[tuple[str, Launch]]:
    """As `launches_of`, for given inputs."""
    found: list[tuple[str, Launch]] = []
    stage = "forward"

    def record(launch: Launch) -> None:
        found.append((stage, launch))

    with intercepted(target, record):
        outputs = op.build("triton")(**inputs)
        leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
        if leaves:
            stage = "backward"
            outputs = as_list(outputs)
            torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    return found


def as_list(outputs: Any) -> list[Tensor]:
    """The results of an op, of which there may be one or several."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
