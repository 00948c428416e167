"""Runs the compiled form of kernels on the CPU, where an emulator of PTX lies beside the checkout.

Triton's interpreter runs the source; only the compiled form shows races between warps, accesses out
of bounds and mistakes of the compiler. Use it in the session without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench.compiled import compile_launch, runtime_parameters
from kernels.launch import Launch, intercepted

TOOLS = Path(__file__).parents[2] / "shared" / "tools"


@contextmanager
def emulated(target: str) -> Iterator[list[Any]]:
    """In the block, Triton ops on CPU tensors run as PTX compiled for `target` (sm_80, sm_90).

    Yields:
        the statistics of every launch; a race, a wrong or a misaligned access is an AssertionError.
    """
    if not (TOOLS / "ptxemu").is_dir():
        pytest.skip(f"there is no emulator of PTX in {TOOLS}")
    sys.path.insert(0, str(TOOLS))
    try:
        import ptxemu
    finally:
        sys.path.remove(str(TOOLS))
    statistics: list[Any] = []

    def run(launch: Launch) -> None:
        memory = ptxemu.Memory()
        for tensor in launch.tensors:
            memory.register(tensor)
        names = runtime_parameters(launch)
        arguments = [launch.arguments[name] for name in names]
        for name, value in zip(names, arguments, strict=True):
            if isinstance(value, Tensor):
                memory.register(value, name)
        built = compile_launch(launch)
        statistics.append(
            ptxemu.run(
                built.asm["ptx"],
                launch.grid,
                built.metadata.num_warps,
                arguments,
                built.metadata.shared,
                mem=memory,
                names=names,
                host_tables=[names.index("addresses")] if launch.tensors else (),
                scratch_bytes=getattr(built.metadata, "global_scratch_size", 0) or 0,
                strict=True,
            )
        )

    with intercepted(target, run):
        yield statistics
