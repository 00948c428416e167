"""What Triton's compiler makes of a launch, for GPUs that need not be here.

A launch is taken as `kernels.launch` hands it over and compiled for its target; registers, spills,
shared memory and access widths are read from the machine code with the disassemblers that the
Triton wheel ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import Launch, intercepted

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.bool: "*i1",
}
# Threads that a multiprocessor holds, registers of its file (32 bits), bytes of shared memory.
MULTIPROCESSORS = {
    "sm_80": (2048, 65536, 163 * 1024),
    "sm_90": (2048, 65536, 227 * 1024),
    "sm_100": (2048, 65536, 227 * 1024),
    "sm_120": (1536, 65536, 99 * 1024),
    "gfx942": (2048, 131072, 64 * 1024),
    "gfx950": (2048, 131072, 160 * 1024),
}
# Instructions of the tensor cores that kernels are to use.
PRODUCTS = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\bHGMMA",
    "sm_100": r"\bUTC\w*MMA",
    "sm_120": r"\bHMMA",
    "gfx942": r"\bv_mfma",
    "gfx950": r"\bv_mfma",
}
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """One compiled kernel.

    Attributes:
        kernel, target: what was compiled for which architecture.
        registers: per lane (vector registers on AMD).
        spills: instructions that move registers to and from local memory, or registers spilled.
        shared_bytes: per program.
        instructions: machine instructions in all.
        accesses: instruction of global memory -> how often it stands in the code.
        occupancy: share of the lanes of a multiprocessor that registers and shared memory let run.
        assembly: the text.
        asm: all stages, "ptx" among them.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: int
    accesses: dict[str, int]
    occupancy: float
    assembly: str
    asm: Any

    @property
    def widest_access(self) -> int:
        """Bits of the widest access to global memory."""
        return max((access_bits(name) for name in self.accesses), default=0)


def launches_of(function: Any, inputs: dict[str, Any], target: str) -> list[Launch]:
    """What a Triton implementation would launch on `target` for these inputs."""
    launches: list[Launch] = []
    with intercepted(target, launches.append):
        function(**inputs)
    return launches


def runtime_parameters(launch: Launch) -> list[str]:
    """Names of the parameters that are left in the compiled form, in order."""
    kinds = {p.name: _signature(launch.arguments[p.name], p.is_constexpr) for p in _params(launch)}
    return [name for name, kind in kinds.items() if kind != "constexpr"]


def compile_launch(launch: Launch) -> Any:
    """Compile a launch as Triton's just-in-time launcher would specialise it."""
    signature, constants, attributes = _specialised(launch)
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    return triton.compile(source, target=TARGETS[launch.target], options=dict(launch.options))


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes of the compiled form."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, parameter in enumerate(_params(launch)):
        value = launch.arguments[parameter.name]
        kind = _signature(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif _divides_by_16(value):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


_inspected: dict[str, Code] = {}


def inspect(launch: Launch) -> Code:
    """Compile a launch and read what matters from its machine code; each variant only once."""
    options = sorted(launch.options.items())
    variant = repr((launch.kernel.__name__, launch.target, options, *_specialised(launch)))
    if variant not in _inspected:
        _inspected[variant] = _inspect(launch)
    return _inspected[variant]


def _inspect(launch: Launch) -> Code:
    built = compile_launch(launch)
    read = _read_amd if launch.target.startswith("gfx") else _read_nvidia
    registers, spills, assembly, pattern = read(built)
    lines = [line.strip() for line in assembly.splitlines()]
    return Code(
        kernel=launch.kernel.__name__,
        target=launch.target,
        registers=registers,
        spills=spills,
        shared_bytes=built.metadata.shared,
        instructions=sum(1 for line in lines if pattern.match(line)),
        accesses=dict(Counter(re.findall(_ACCESS, assembly))),
        occupancy=_occupancy(
            launch.target, registers, built.metadata.shared, built.metadata.num_warps
        ),
        assembly=assembly,
        asm=built.asm,
    )


def access_bits(instruction: str) -> int:
    """Bits that one lane moves in an instruction of global memory."""
    if instruction.startswith(("global_", "buffer_")):
        sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
        return next(bits for word, bits in sizes.items() if word in instruction)
    found = re.search(r"\.(?:[US]?(128|64|16|8))\b", instruction)
    return int(found[1]) if found else 32


_ACCESS = re.compile(
    r"\b((?:LDG|STG|LDGSTS)(?:\.[A-Z0-9]+)*|(?:global|buffer)_(?:load|store)_\w+)\b"
)
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\S")
_AMDGCN = re.compile(r"[a-z]\w*_\w+\s")


def _params(launch: Launch) -> Any:
    return launch.kernel.params


def _signature(value: Any, is_constexpr: bool) -> str:
    if is_constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divides_by_16(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _read_nvidia(built: Any) -> tuple[int, int, str, re.Pattern[str]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", cubin)
        assembly = _output("nvdisasm", "-c", cubin)
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    spills = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    return int(found[1]), spills, assembly, _SASS


def _read_amd(built: Any) -> tuple[int, int, str, re.Pattern[str]]:
    assembly = built.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found, name
        return int(found[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), spills, assembly, _AMDGCN


def _output(program: str, *arguments: Any) -> str:
    command = [str(_BINARIES / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _occupancy(target: str, registers: int, shared_bytes: int, warps: int) -> float:
    lanes, file, shared = MULTIPROCESSORS[target]
    width = TARGETS[target].warp_size
    threads = warps * width
    rounded = -(-registers // 8) * 8
    programs = min(lanes // threads, file // (rounded * threads))
    if shared_bytes:
        programs = min(programs, shared // shared_bytes)
    return programs * threads / lanes
