"""Triton's interpreter, repaired for bfloat16, and what can be seen while it runs a kernel.

Out of the box (Triton 3.6 to 3.9) the interpreter keeps bfloat16 as bit patterns in uint16: it
multiplies the patterns in `tl.dot` and in arithmetic, and rounds float32 towards zero where a GPU
rounds to nearest even. `repair` replaces those conversions. The process must have been started with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as uint16 bits; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle(from_bfloat16_bits(handle.data), tl.float32)


@cache
def repair() -> None:
    """Give the interpreter the bfloat16 of a GPU, for the rest of the process."""
    builder: Any = InterpreterBuilder
    cast_impl, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    dot, binary_op, unary_op = builder.create_dot, builder.binary_op, builder.unary_op

    def cast(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        kind = target.scalar
        if _is_bfloat16(source) and kind == tl.bfloat16:
            return source
        source = _widened(source)
        if kind == tl.bfloat16:
            return TensorHandle(to_bfloat16_bits(source.data.astype(np.float32)), kind)
        return cast_impl(self, source, target)

    def convert(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    def dot_product(self: Any, a: Any, b: Any, *rest: Any, **named: Any) -> TensorHandle:
        return dot(self, _widened(a), _widened(b), *rest, **named)

    def binary(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> TensorHandle:
        if not (_is_bfloat16(left) and _is_bfloat16(right)):
            return binary_op(self, left, right, op)
        result = op(_widened(left).data, _widened(right).data)
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(to_bfloat16_bits(result), tl.bfloat16)

    def unary(self: Any, argument: Any, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bfloat16(argument):
            return unary_op(self, argument, op)
        return TensorHandle(to_bfloat16_bits(op(_widened(argument).data)), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp = cast, convert
    builder.create_dot, builder.binary_op, builder.unary_op = dot_product, binary, unary
    if not hasattr(builder, "create_descriptor_reduce"):
        builder.create_descriptor_reduce = _descriptor_add
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = _bfloat16_constant


def _bfloat16_constant(self: Any, value: float) -> TensorHandle:
    return TensorHandle(to_bfloat16_bits(np.array([value], dtype=np.float32)), tl.bfloat16)


def _descriptor_add(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> None:
    """`descriptor.atomic_add`, which the interpreter lacks, as atomic additions per element."""
    if "ADD" not in str(kind).upper() or value.dtype.scalar != tl.float32:
        raise NotImplementedError(f"descriptor reduction {kind} of {value.dtype}")
    pointers, mask = descriptor.materialize_pointers(indices)
    relaxed = interpreter._ir.MEM_SEMANTIC.RELAXED
    self.create_atomic_rmw(
        interpreter._ir.ATOMIC_OP.FADD, pointers, value, mask, relaxed, None
    )  # fmt: skip


@dataclass
class Traffic:
    """Bytes that kernels asked for.

    Attributes:
        loaded, stored: bytes under the masks, as often as they were asked for; an atomic operation
            counts as both.
        unique: bytes of distinct addresses, loads and stores apart: what a perfect cache leaves.
    """

    loaded: int = 0
    stored: int = 0
    _addresses: dict[tuple[str, int], list[np.ndarray]] = field(default_factory=dict)

    @property
    def requested(self) -> int:
        return self.loaded + self.stored

    @property
    def unique(self) -> int:
        return sum(
            size * len(np.unique(np.concatenate(parts)))
            for (_, size), parts in self._addresses.items()
        )

    def _count(self, kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        wanted = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data))
        addresses = np.asarray(pointers.data)[wanted].reshape(-1)
        if kind == "load":
            self.loaded += size * len(addresses)
        else:
            self.stored += size * len(addresses)
        self._addresses.setdefault((kind, size), []).append(np.unique(addresses))


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the memory traffic of all kernels that run in the block."""
    builder: Any = InterpreterBuilder
    load, store, atomic = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )
    traffic = Traffic()

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic._count("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        traffic._count("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    def counted_atomic(
        self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        traffic._count("load", pointers, mask)
        traffic._count("store", pointers, mask)
        return atomic(self, op, pointers, value, mask, *rest, **named)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw = counted_atomic
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw = atomic


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Run the programs of every grid in reverse order: what depends on the order changes."""
    builder: Any = InterpreterBuilder
    set_grid_idx = builder.set_grid_idx

    def reverse(self: Any, x: int, y: int, z: int) -> None:
        width, height, depth = self.grid_dim
        set_grid_idx(self, width - 1 - x, height - 1 - y, depth - 1 - z)

    builder.set_grid_idx = reverse
    try:
        yield
    finally:
        builder.set_grid_idx = set_grid_idx
