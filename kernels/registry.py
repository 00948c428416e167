"""The table of ops: one record per op, resolved once into a frozen set of callables.

Every op has a readable PyTorch reference, which is its specification. `compile` is `torch.compile`
of that reference; `triton` is a hand-written kernel, imported only when it is chosen. Models and
optimizers receive the resolved `Ops` as an argument and never know which backend they run on.
"""

from __future__ import annotations

import importlib
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from .launch import check_device

BACKENDS = ("auto", "triton", "compile", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One way to call an op: options of its `inputs`, and the dtypes that they make sense for."""

    options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS


@dataclass(frozen=True)
class Op:
    """One op and its implementations.

    Attributes:
        name: key of the op in the config group `kernels`.
        reference: plain PyTorch, fp32 statistics inside; the specification.
        triton: "module:function" of the hand-written kernel, None while there is none.
        inputs: `inputs(dtype=..., device=..., **options) -> dict` of realistic keyword arguments,
            laid out (shapes, strides) as the model or the optimizer lays them out.
        cost: `cost(**inputs) -> (bytes, flops)`, the least that any implementation must do.
        cases: name -> options of `inputs` that reach every variant of a kernel; the parity tests
            and the static report go through all of them.
        sizes: name -> options of `inputs` of the size of real work; what the benchmarks time.
        compiled: "module:function" that calls `torch.compile` of the reference's arithmetic in
            batches, for references over lists of tensors; None compiles the reference as it is.
    """

    name: str
    reference: Callable[..., Any]
    triton: str | None
    inputs: Callable[..., dict[str, Any]]
    cost: Callable[..., tuple[int, int]]
    cases: Mapping[str, Case] = field(default_factory=lambda: {"default": Case()})
    sizes: Mapping[str, Case] = field(default_factory=dict)
    compiled: str | None = None

    def build(self, backend: str, device: torch.device | str = "cpu") -> Callable[..., Any]:
        """Return the callable of one backend, for tensors on a type of device.

        Raises:
            ValueError: the backend is unknown, or this op or this machine cannot run it.
        """
        if backend == "reference":
            return self.reference
        if backend == "compile":
            if not has_cpp_compiler():
                raise ValueError(
                    f"kernels.{self.name}=compile needs a C++ compiler (g++, clang++) on the PATH "
                    "and the headers of Python (python3-dev); install them or set "
                    f"kernels.{self.name}=reference"
                )
            return _load(self.compiled) if self.compiled else torch.compile(self.reference)
        if backend == "triton":
            if self.triton is None:
                raise ValueError(
                    f"kernels.{self.name}=triton: this op has no Triton kernel; "
                    f"set kernels.{self.name}=reference or kernels.{self.name}=compile"
                )
            check_device(self.name, device)
            return _load(self.triton)
        raise ValueError(f"kernels.{self.name}={backend}: choose one of {', '.join(BACKENDS)}")


def _load(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


OPS: dict[str, Op] = {}

# What `auto` means per device type and op. An op that is not listed runs its reference: a row is
# entered only once `bench.ops` on that device has shown another backend to be faster.
AUTO: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "cpu": {
            "adamw_step": "compile",
            "attention": "compile",
            "ema_update": "compile",
            "grad_norm": "compile",
        },
        "cuda": {},
    }
)


def register(op: Op) -> Op:
    """Enter an op into the table; a second op of the same name is a ValueError."""
    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    OPS[op.name] = op
    return op


def automatic(name: str, device: str) -> str:
    """The backend that `auto` stands for; without a C++ compiler a CPU runs references."""
    if device == "cpu" and not has_cpp_compiler():
        return "reference"
    return AUTO.get(device, {}).get(name, "reference")


def has_cpp_compiler() -> bool:
    """Whether `torch.compile` can build CPU code here: a compiler, and the headers of Python."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.exists() and any(map(shutil.which, ("c++", "g++", "clang++")))


class Ops(SimpleNamespace):
    """The chosen callables, one attribute per op, and `table`: op name -> backend name.

    Frozen: assignment raises AttributeError, so what was logged is what runs.
    """

    table: Mapping[str, str]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Ops is frozen; choose another backend with kernels.{name}=...")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def replaced(self, **functions: Callable[..., Any]) -> Ops:
        """The same ops and the same table, but for some functions: what wraps or stands for them.

        Raises:
            ValueError: an op that the table does not have.
        """
        if unknown := sorted(functions.keys() - self.table.keys()):
            raise ValueError(f"unknown op {unknown[0]}; ops are {', '.join(sorted(self.table))}")
        return Ops(**{**vars(self), **functions})

    def __deepcopy__(self, memo: dict[int, object]) -> Ops:
        return self


def select(default: str = "auto", device: str = "cpu", **per_op: str | None) -> Ops:
    """Resolve every op of the table to one callable.

    Args:
        default: backend of every op that has no choice of its own.
        device: device type for which `auto` is resolved.
        per_op: op name -> backend; None stands for the default.

    Raises:
        ValueError: unknown op or backend, or a backend that this op or machine cannot run.
    """
    unknown = sorted(set(per_op) - set(OPS))
    if unknown:
        raise ValueError(
            f"kernels: unknown op {', '.join(unknown)}; ops are {', '.join(sorted(OPS))}"
        )
    if default not in BACKENDS:
        raise ValueError(f"kernels={default}: choose one of {', '.join(BACKENDS)}")
    table = {}
    for name in OPS:
        backend = per_op.get(name) or default
        table[name] = automatic(name, device) if backend == "auto" else backend
    functions = {name: OPS[name].build(backend, device) for name, backend in table.items()}
    return Ops(table=MappingProxyType(table), **functions)
