"""How one launch reaches tensors of any number and size: dense rows, classes, tables of addresses.

A multi-tensor op takes several lists of equal length, here called columns (parameters, gradients,
moments, ...); the tensors of one index form a row and have one shape. Every element of a row is
updated from the elements at the same place, so a row may be walked in any order that all its
tensors share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import Scalar

Column = Sequence[Tensor | None]
Row = tuple[Tensor | None, ...]
Dtypes = tuple[torch.dtype | None, ...]

ALIGNMENT = 16  # bytes that one 128-bit access needs
TABLES_KEPT = 64


class DenseRows:
    """Rows whose tensors are contiguous in one common order; other tensors are copied.

    Args:
        columns: lists of equal length; None where a row has no such tensor.
        written: per column, whether the op writes to it; copies of such tensors are copied back.

    Attributes:
        rows: the rows that have elements, with their index in the lists.
    """

    def __init__(self, columns: Sequence[Column], written: Sequence[bool]) -> None:
        self.written = written
        self.rows: list[tuple[int, Row]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        for index, row in enumerate(zip(*columns, strict=True)):
            leader = row[0]
            assert leader is not None
            if leader.numel():
                self.rows.append((index, self._dense(row)))

    def _dense(self, row: Row) -> Row:
        if all(tensor is None or tensor.is_contiguous() for tensor in row):
            return row
        leader = row[0]
        assert leader is not None
        order = sorted(range(leader.ndim), key=leader.stride, reverse=True)
        permuted = tuple(tensor if tensor is None else tensor.permute(order) for tensor in row)
        if all(tensor is None or tensor.is_contiguous() for tensor in permuted):
            return permuted
        return tuple(
            self._contiguous(tensor, written)
            for tensor, written in zip(row, self.written, strict=True)
        )

    def _contiguous(self, tensor: Tensor | None, written: bool) -> Tensor | None:
        if tensor is None or tensor.is_contiguous():
            return tensor
        copy = tensor.contiguous()
        if written:
            self._copies.append((tensor, copy))
        return copy

    def write_back(self) -> None:
        """Bring what the op wrote into copies to the tensors that they stand for."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)


def classes_of(rows: Sequence[tuple[int, Row]]) -> dict[Dtypes, list[tuple[int, Row]]]:
    """Group rows by their dtypes, None for absent tensors."""
    classes: dict[Dtypes, list[tuple[int, Row]]] = {}
    for index, row in rows:
        key = tuple(None if tensor is None else tensor.dtype for tensor in row)
        classes.setdefault(key, []).append((index, row))
    return classes


@dataclass(frozen=True)
class Table:
    """Rows of one class as a kernel sees them; all tensors int64 or int32, on their device.

    Attributes:
        dtypes: of the columns, None for absent ones.
        aligned: all addresses are multiples of 16 bytes.
        addresses: int64 [T, columns]; an absent tensor has the address of the row's first one.
        sizes: int64 [T, 2]: number of elements, index of the row in the lists.
        chunks: int32 [programs, 2]: row of the table, chunk of its tensors.
        tensors: what the addresses point to.
    """

    dtypes: Dtypes
    aligned: bool
    addresses: Tensor
    sizes: Tensor
    chunks: Tensor
    tensors: Sequence[Tensor]


# Tables by what they were made of. A key holds all addresses and sizes, so an entry is never stale.
_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor, Tensor]] = []  # kept: a CUDA graph reads them at each replay


def tables_of(rows: Sequence[tuple[int, Row]], chunk: int) -> list[Table]:
    """One table per class of dtypes and alignment.

    Building one copies its numbers to the device without waiting; the same tensors get the same
    table again. Rows that were seen in a first step can so be captured in a CUDA graph.

    Args:
        rows: of `DenseRows`.
        chunk: elements per program.
    """
    tables = []
    for dtypes, members in classes_of(rows).items():
        aligned: dict[bool, list[tuple[int, Row, tuple[int, ...]]]] = {}
        for index, row in members:
            leader = row[0]
            assert leader is not None
            base = leader.data_ptr()
            addresses = tuple(base if t is None else t.data_ptr() for t in row)
            fits = not any(address % ALIGNMENT for address in addresses)
            aligned.setdefault(fits, []).append((index, row, addresses))
        for fits, entries in aligned.items():
            tensors = [t for _, row, _ in entries for t in row if t is not None]
            device = tensors[0].device
            sizes = tuple((row[0].numel(), index) for index, row, _ in entries)  # type: ignore[union-attr]
            key = (device, chunk, sizes, tuple(addresses for _, _, addresses in entries))
            if key not in _tables:
                _tables[key] = _build(key)
                while len(_tables) > TABLES_KEPT:
                    _tables.popitem(last=False)
            _tables.move_to_end(key)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                _captured.append(_tables[key])
            tables.append(Table(dtypes, fits, *_tables[key], tensors))
    return tables


def _build(key: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    device, chunk, sizes, addresses = key
    sizes = torch.tensor(sizes, dtype=torch.int64)
    programs = (sizes[:, 0] + chunk - 1) // chunk
    row = torch.arange(len(sizes)).repeat_interleave(programs)
    first = programs.cumsum(0) - programs
    chunks = torch.stack([row, torch.arange(len(row)) - first[row]], dim=1).to(torch.int32)
    built = (torch.tensor(addresses, dtype=torch.int64), sizes, chunks)
    if device.type == "cpu":
        return built
    on_device = [part.pin_memory().to(device, non_blocking=True) for part in built]
    return on_device[0], on_device[1], on_device[2]


def scalar(value: Scalar, dtype: torch.dtype, device: torch.device, count: int = 1) -> Tensor:
    """A number or a tensor of `count` elements as a tensor [count] of this dtype and device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype).reshape(count)
    return torch.full((count,), value, dtype=dtype, device=device)
