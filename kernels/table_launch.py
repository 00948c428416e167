"""One launch over all tensors of a class: what the multi-tensor kernels have in common.

A program works on one chunk of one tensor and finds both in a table on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import is_amd, launch, target_of
from .multi_tensor import Dtypes, Row, Table, tables_of

CHUNK = 65536  # elements per program
# Elements per iteration: 4 per lane of 8 warps, one 128-bit access in float32. With 8 per lane, as
# bfloat16 alone would want, tensors of both would be exchanged between lanes in shared memory.
BLOCK = 1024
TYPES = {
    None: None,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int16: tl.int16,
}


@triton.jit
def find_chunk(sizes, chunks, CHUNK: tl.constexpr):
    """Of this program: its row of the table, its first element, and how many are left from there.

    All int64: a tensor may have more than 2^31 elements.
    """
    program = tl.program_id(0)
    row = tl.load(chunks + 2 * program).to(tl.int64)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    return row, first, tl.load(sizes + 2 * row) - first


@triton.jit
def load_pointer(address, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to element `first` of the tensor whose address is stored at `address`."""
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + first


def launch_tables(
    kernel: Any,
    rows: Sequence[tuple[int, Row]],
    arguments_of: Callable[[Dtypes], dict[str, Any]],
) -> None:
    """Launch a kernel once per class of dtypes and alignment.

    Args:
        kernel: takes addresses, sizes, chunks, ALIGNED, CHUNK, BLOCK and further arguments.
        rows: of `DenseRows`.
        arguments_of: dtypes of the columns -> the further arguments.
    """
    for table in tables_of(rows, CHUNK):
        launch_table(kernel, table, arguments_of(table.dtypes))


def launch_table(kernel: Any, table: Table, arguments: dict[str, Any], block: int = BLOCK) -> None:
    """Launch one program per chunk of a table."""
    device = table.chunks.device
    launch(
        kernel,
        (len(table.chunks),),
        {
            "addresses": table.addresses,
            "sizes": table.sizes,
            "chunks": table.chunks,
            **arguments,
            "ALIGNED": table.aligned,
            "CHUNK": CHUNK,
            # Accesses of one element need an address each: half as many at a time.
            "BLOCK": block if table.aligned else block // 2,
        },
        device=device,
        num_warps=4 if is_amd(target_of(device)) else 8,
        tensors=table.tensors,
    )
