"""How kernels are launched: on the GPU, in Triton's interpreter, or handed to a tool.

All launches go through `launch`, so that whatever looks at kernels (the static report, the parity
tests of compiled code) sees exactly what a training run would launch, and no second list of
configurations exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRETED_TARGET = "sm_90"  # whose configurations the interpreter runs


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the jitted function.
        grid: number of programs per axis.
        arguments: parameter name -> value, constexpr ones included.
        options: compiler options: num_warps, enable_fp_fusion, ...
        target: architecture that the configuration was chosen for, "sm_90" or "gfx942".
        tensors: tensors that the kernel reaches through addresses in a table.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    target: str
    tensors: Sequence[Tensor] = ()


_interceptor: ContextVar[tuple[str, Callable[[Launch], None]] | None] = ContextVar(
    "interceptor", default=None
)


@contextmanager
def intercepted(target: str, handle: Callable[[Launch], None]) -> Iterator[None]:
    """In the block, launches are configured for `target` and given to `handle` instead of a GPU."""
    token = _interceptor.set((target, handle))
    try:
        yield
    finally:
        _interceptor.reset(token)


def interpreting() -> bool:
    """Whether Triton kernels of this process run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_device(op: str, device: torch.device | str) -> None:
    """Raise ValueError where Triton kernels cannot run on tensors of this device."""
    kind = torch.device(device).type
    if kind == "cuda" or interpreting() or _interceptor.get():
        return
    raise ValueError(
        f"kernels.{op}=triton: Triton kernels need a GPU, but the tensors are on {kind}; set "
        f"kernels.{op}=reference or compile, or start the process with TRITON_INTERPRET=1 to "
        "run them slowly in Triton's interpreter"
    )


def target_of(device: torch.device) -> str:
    """The architecture whose configurations apply to tensors of this device."""
    interceptor = _interceptor.get()
    if interceptor:
        return interceptor[0]
    if device.type != "cuda":
        return INTERPRETED_TARGET
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def is_amd(target: str) -> bool:
    """Whether a warp of this architecture has 64 lanes."""
    return target.startswith("gfx")


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int | None = None,
    max_registers: int | None = None,
    fused_multiply_add: bool = False,
    tensors: Sequence[Tensor] = (),
) -> None:
    """Launch a kernel on the current stream of `device`.

    Args:
        kernel: jitted function.
        grid: number of programs per axis; nothing happens where one is 0.
        arguments: parameter name -> value.
        device: where the tensors are.
        num_warps: warps per program.
        num_stages: depth of software pipelines; None leaves it to the compiler.
        max_registers: per lane, so that more programs share a multiprocessor; NVIDIA GPUs only,
            since elsewhere the compiler has no such option.
        fused_multiply_add: contract products and sums. Without, every backend rounds alike, which
            costs nothing where a kernel waits for memory.
        tensors: tensors that the kernel reaches through addresses in a table.
    """
    if not all(grid):
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": fused_multiply_add}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if max_registers is not None and not is_amd(target_of(device)):
        options["maxnreg"] = max_registers
    interceptor = _interceptor.get()
    if interceptor:
        interceptor[1](Launch(kernel, grid, arguments, options, interceptor[0], tensors))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **options)
