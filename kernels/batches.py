"""Lists of tensors of any number and size, in batches of one form, for functions compiled once.

Calling a compiled function costs tens of microseconds, and a function over lists is compiled anew
for every length of list. So tensors become flat pieces: small ones are joined, large ones cut until
the number of pieces divides by `PIECES`, and every call takes that many.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .multi_tensor import DenseRows, Row, classes_of

PIECES = 8  # per call: more save calls and cost compile time
SMALL = 32768  # tensors of fewer elements are joined into one piece
SAMPLE = 2**18  # elements that code is planned for
COMPILATIONS = 64  # of one function in a process

Batch = tuple[Any, ...]  # per column a list of tensors, or None


class Compiled:
    """`torch.compile` of a function over lists of flat pieces, of any size each.

    Every combination of dtypes and options is one compilation of the same code. The compiler plans
    loops and threads for the sizes of the first call, so the first call of every combination is one
    on samples of the size of real work, each of another size.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        limit: dict[str, Any] = {}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:  # PyTorch 2.12
            limit["recompile_limit"] = COMPILATIONS
        self._function = torch.compile(function, dynamic=True, fullgraph=True, **limit)
        self._planned: set[Any] = set()

    def __call__(self, lists: Sequence[Any], *options: Any) -> Any:
        """Call the function with lists of pieces (or None in their place), then other arguments."""
        key = (
            *(_kind(pieces) for pieces in lists),
            *(type(o) if isinstance(o, Tensor | tuple) else o for o in options),
            torch.get_num_threads(),
        )
        if key not in self._planned:
            self._function(*(_samples(pieces) for pieces in lists), *options)
            self._planned.add(key)
        return self._function(*lists, *options)


@cache
def compiled(function: Callable[..., Any]) -> Compiled:
    """The same object for the same function."""
    return Compiled(function)


def batches(
    columns: Sequence[Sequence[Tensor | None]], written: Sequence[bool]
) -> Iterator[tuple[bool, Batch]]:
    """Yield batches of `PIECES` flat pieces per column; what is written to them is taken over.

    Args:
        columns: lists of equal length; None where a row has no such tensor.
        written: per column, whether the function writes to it.

    Yields:
        Whether the batch has the one form that compiled code expects, and per column its pieces,
        None for absent ones. Fewer elements than pieces make a batch of another form.
    """
    dense = DenseRows(columns, written)
    for members in classes_of(dense.rows).values():
        rows = [tuple(None if t is None else t.view(-1) for t in row) for _, row in members]
        small = [row for row in rows if _numel(row) < SMALL]
        rows = [row for row in rows if _numel(row) >= SMALL]
        joined: Row = ()
        if len(small) > 1:
            joined = tuple(
                torch.cat(column) if column[0] is not None else None
                for column in zip(*small, strict=True)
            )
            rows.append(joined)
        else:
            rows += small
        pieces = _cut(rows)
        for start in range(0, len(pieces), PIECES):
            batch = pieces[start : start + PIECES]
            columns_of_batch = tuple(_column(column) for column in zip(*batch, strict=True))
            yield len(batch) == PIECES, columns_of_batch
        if joined:
            _split_back(joined, small, written)
    dense.write_back()


def _numel(row: Row) -> int:
    assert row[0] is not None
    return row[0].numel()


def _column(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    return None if tensors[0] is None else [t for t in tensors if t is not None]


def _cut(rows: list[Row]) -> list[Row]:
    """Cut the largest row so that the number of rows divides by PIECES, if it is large enough."""
    missing = -len(rows) % PIECES
    if not missing:
        return rows
    largest = max(range(len(rows)), key=lambda index: _numel(rows[index]))
    size = _numel(rows[largest]) // (missing + 1)
    if size < 2:  # pieces of 0 or 1 element would be compiled as a case of their own
        return rows
    row = rows[largest]
    bounds = [size * cut for cut in range(missing + 1)] + [_numel(row)]
    cuts = [
        tuple(None if tensor is None else tensor[start:stop] for tensor in row)
        for start, stop in itertools.pairwise(bounds)
    ]
    return rows[:largest] + rows[largest + 1 :] + cuts


def _kind(pieces: Any) -> Any:
    first = pieces[0] if pieces else None
    return None if first is None else (len(pieces), first.dtype, first.device)


def _samples(pieces: Any) -> Any:
    """Zeros in the place of pieces; two of equal size would be compiled as always equal."""
    if _kind(pieces) is None:
        return pieces
    return [
        torch.zeros(SAMPLE + 16 * (index % PIECES), dtype=piece.dtype, device=piece.device)
        for index, piece in enumerate(pieces)
    ]


def _split_back(joined: Row, rows: Sequence[Row], written: Sequence[bool]) -> None:
    sizes = [_numel(row) for row in rows]
    for index, (tensor, is_written) in enumerate(zip(joined, written, strict=True)):
        if tensor is not None and is_written:
            targets = [row[index] for row in rows]
            torch._foreach_copy_(targets, list(tensor.split(sizes)))  # type: ignore[arg-type]
