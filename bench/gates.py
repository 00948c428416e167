"""What compiled kernels are held to: the one list that the tests and `bench.static` share.

A row is what `row_of` reads from one compiled launch, as plain data; `failures` says in words which
gates it breaks. Registers and overlap are held at the shapes of the 7B model, everything else
always. Architectures outside `GATED` are reported, not held.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.launch import Launch, is_amd

from .compiled import MULTIPROCESSORS, PRODUCTS, Code, access_bits
from .overlap import overlaps

Row = Mapping[str, Any]

GATED = ("sm_80", "sm_90", "sm_100", "gfx942")
LEAST_INSTRUCTIONS = 64  # fewer are the stub that a compiler leaves where something did not fit
# sm_86, sm_89 and sm_120 run the configurations of sm_80 in 99 KB.
SHARED_BYTES = {arch: MULTIPROCESSORS[arch][2] for arch in GATED} | {"sm_80": 99 * 1024}

PRODUCT_KERNELS = ("attention_kernel", "key_gradients_kernel", "query_gradients_kernel")
ATTENTION_KERNELS = (*PRODUCT_KERNELS, "delta_kernel")
MODULATE_KERNELS = ("modulate_forward_kernel", "modulate_backward_kernel")
ROW_KERNELS = (
    *MODULATE_KERNELS, "gated_residual_forward_kernel", "gated_residual_backward_kernel",
)  # fmt: skip
HEAD_KERNELS = ("qk_norm_rope_kernel", "qk_norm_rope_backward_kernel", "weight_gradients_kernel")
UPDATE_KERNELS = (
    "adamw_step_kernel", "ema_update_kernel", "grad_norm_kernel", "finalize_norm_kernel",
)  # fmt: skip

# Most registers per lane at the shapes of the 7B model in 16 bits; of an update always.
REGISTERS = {
    "attention_kernel": 252,
    "key_gradients_kernel": 250,
    "query_gradients_kernel": 250,
    "delta_kernel": 48,
    "modulate_forward_kernel": 80,  # three programs of 8 warps share a multiprocessor
    "modulate_backward_kernel": 104,
    "gated_residual_forward_kernel": 64,
    "gated_residual_backward_kernel": 64,
    "column_sum_kernel": 48,
    "qk_norm_rope_kernel": 48,
    "qk_norm_rope_backward_kernel": 104,
    **dict.fromkeys(UPDATE_KERNELS, 48),  # five programs of 8 warps
}
# Up to 64 a multiprocessor of AMD is full; accumulators of attention lie in its own registers.
REGISTERS_AMD = {
    name: 64 if name == "qk_norm_rope_kernel" else most
    for name, most in REGISTERS.items()
    if name not in (*ATTENTION_KERNELS, *UPDATE_KERNELS)
}
LEAST_OCCUPANCY = dict.fromkeys(UPDATE_KERNELS, 0.6)
WITHOUT_SHARED = ("adamw_step_kernel", "ema_update_kernel")

EXPOSED_MUFU = 2  # exponentials per iteration while the tensor cores idle
EXPOSED_INSTRUCTIONS = 210
TENSOR_BOUND = {
    "attention_kernel": 0.80, "key_gradients_kernel": 0.90, "query_gradients_kernel": 0.80,
}  # fmt: skip
FORWARD_PRODUCTS = 12  # HGMMA per warp group and iteration, 128 queries by 64 keys
MOST_WAITS = 3  # as many waits as products would mean that ptxas has serialised them
LOOP_COPIES = 2  # tiles per iteration through tensor descriptors

# Bytes that a pass asks for, and distinct ones, relative to the least; by op.
BYTES_RATIO = dict.fromkeys(
    ("adaln_modulate", "residual_adaln_modulate", "gated_residual", "qk_norm_rope"), 1.05
) | dict.fromkeys(("adamw_step", "ema_update", "grad_norm"), 1.005)
LAUNCHES = {
    ("adaln_modulate", "forward"): 1,
    ("adaln_modulate", "backward"): 2,
    ("residual_adaln_modulate", "forward"): 1,
    ("residual_adaln_modulate", "backward"): 2,
    ("gated_residual", "forward"): 1,
    ("gated_residual", "backward"): 2,
    ("qk_norm_rope", "forward"): 1,
    ("qk_norm_rope", "backward"): 2,
    ("attention", "forward"): 1,
    ("attention", "backward"): 3,
    ("adamw_step", "forward"): 1,
    ("ema_update", "forward"): 1,
    ("grad_norm", "forward"): 2,
}


def row_of(launch: Launch, code: Code, **labels: Any) -> dict[str, Any]:
    """What `failures` and readers want to know of a compiled launch; `labels` come first."""
    row = {
        **labels,
        "kernel": code.kernel,
        "arch": code.target,
        "triton": triton.__version__,
        "dtype": _dtype(launch),
        "num_warps": launch.options["num_warps"],
        "registers": code.registers,
        "spills": code.spills,
        "shared_bytes": code.shared_bytes,
        "occupancy": code.occupancy,
        "instructions": code.instructions,
        "access_bits": code.widest_access,
        "accesses": _accesses(code),
        "tensor_instructions": len(re.findall(PRODUCTS[code.target], code.assembly)),
        "older_tensor_instructions": len(re.findall(r"\bHMMA", code.assembly)),
        "tf32_instructions": len(re.findall(r"TF32|xf32", code.assembly, re.IGNORECASE)),
        "arguments": {
            name: value if isinstance(value, int | None) else str(value)
            for name, value in launch.arguments.items()
            if not isinstance(value, Tensor | float)
        },
    }
    if code.target == "sm_90" and (loops := overlaps(code.assembly)):
        row |= {
            "exposed_mufu": max(loop.exposed_mufu for loop in loops),
            "exposed_instructions": loops[0].exposed_instructions,
            "tensor_bound": loops[0].tensor_bound,
            "loop": {name: getattr(loops[0], name) for name in ("products", "waits", "copies")},
        }
    return row


def failures(row: Row) -> list[str]:
    """Which gates a row breaks, in words; gates on fields that it lacks (None) hold."""
    if row["arch"] not in GATED:
        return []
    return [*_resources(row), *_accesses_too_narrow(row), *_products(row), *_passes(row)]


def at_model_size(row: Row) -> bool:
    """Whether a launch has the sizes of the 7B model: width 4096, 32 heads of 128; in 16 bits."""
    sizes = row["arguments"]
    kernel = row["kernel"]
    if kernel in UPDATE_KERNELS:
        return True
    if kernel == "column_sum_kernel":  # of partial sums, in float32 always
        return bool(sizes["width"] == 4096)
    if row["dtype"] not in ("bfloat16", "float16"):
        return False
    if kernel in ATTENTION_KERNELS:
        return bool(sizes["K"] == 128)
    if kernel in HEAD_KERNELS:
        return (sizes.get("N"), sizes.get("R")) == (32, 64)
    return bool(sizes.get("D") == 4096)


def _resources(row: Row) -> Iterator[str]:
    kernel, arch = row["kernel"], row["arch"]
    if row["spills"]:
        yield f"{row['spills']} spills"
    if row["instructions"] < LEAST_INSTRUCTIONS:
        yield f"a stub of {row['instructions']} instructions"
    shared = 0 if kernel in WITHOUT_SHARED else SHARED_BYTES[arch]
    if kernel == "qk_norm_rope_kernel" and at_model_size(row):
        shared = 0
    if row["shared_bytes"] > shared:
        yield f"{row['shared_bytes']} bytes of shared memory, at most {shared}"
    most = (REGISTERS_AMD if is_amd(arch) else REGISTERS).get(kernel)
    if most and at_model_size(row) and row["registers"] > most:
        yield f"{row['registers']} registers, at most {most}"
    least = 0.0 if is_amd(arch) else LEAST_OCCUPANCY.get(kernel, 0.0)
    if row["occupancy"] < least:
        yield f"occupancy {row['occupancy']:.2f}, at least {least}"


def _accesses_too_narrow(row: Row) -> Iterator[str]:
    kernel, sizes, accesses = row["kernel"], row["arguments"], row["accesses"]
    bits = {int(name.split()[1]) for name in accesses}
    if kernel in HEAD_KERNELS:
        # One line per program, a sum of weights' gradients, may be stored as it comes.
        allowed = () if kernel == "qk_norm_rope_kernel" else ("store",)
        narrow = sorted(n for n in accesses if "128" not in n and n.split()[0] not in allowed)
        if narrow:
            yield f"narrow accesses: {', '.join(narrow)}"
    elif kernel in UPDATE_KERNELS:
        if sizes.get("ALIGNED"):
            wide = sum(count for name, count in accesses.items() if int(name.split()[1]) >= 64)
            if row["access_bits"] != 128 or wide < _columns(sizes):
                yield f"{wide} accesses of 64 bits or more, at least {_columns(sizes)}: {accesses}"
    elif kernel in ROW_KERNELS and at_model_size(row):
        statistics = {32} if kernel in MODULATE_KERNELS else set()  # one number per row
        if not {128} <= bits <= {128} | statistics:
            yield f"accesses of {sorted(bits)} bits, not 128"
    elif row["access_bits"] != 128 and _has_wide_rows(row):
        yield f"accesses of at most {row['access_bits']} bits, not 128"


def _has_wide_rows(row: Row) -> bool:
    """Whether rows are long enough, and multiples of it, for 128 bits in every lane."""
    if row["kernel"] in ATTENTION_KERNELS:
        return True
    width = row["arguments"].get("D", row["arguments"].get("width", 0))
    return bool(width % 16 == 0 and width >= 512)


def _columns(sizes: Row) -> int:
    """Wide loads and stores that the unmasked path of an update needs at least."""
    if "MASTER" not in sizes:
        return 1 + 2 * (sizes.get("PROFILES") or 0)
    masters = 0 if sizes["MASTER"] is None else 2
    return 1 + 4 + 1 + (0 if masters else 1) + masters + 2 * bool(sizes["EMA"])


def _products(row: Row) -> Iterator[str]:
    kernel, arch = row["kernel"], row["arch"]
    if row["tf32_instructions"]:
        yield f"{row['tf32_instructions']} instructions in TF32"
    if kernel not in PRODUCT_KERNELS:
        if row["tensor_instructions"]:
            yield f"{row['tensor_instructions']} instructions of tensor cores"
        return
    if row["dtype"] == "float32":
        return
    if not row["tensor_instructions"]:
        yield "no instruction of the tensor cores"
    if arch != "sm_90":
        return
    if row["older_tensor_instructions"]:
        yield f"{row['older_tensor_instructions']} instructions of older tensor cores (HMMA)"
    if row["arguments"]["K"] >= 64:
        loop = row["loop"]
        if not loop["waits"] <= MOST_WAITS < loop["products"]:
            yield f"{loop['waits']} waits for {loop['products']} products"
        if loop["copies"] != LOOP_COPIES:
            yield f"{loop['copies']} copies through tensor descriptors, not {LOOP_COPIES}"
    if at_model_size(row):
        if row["tensor_bound"] < TENSOR_BOUND[kernel]:
            yield f"tensor cores at {row['tensor_bound']:.2f}, at least {TENSOR_BOUND[kernel]}"
        if kernel == "attention_kernel":
            yield from _forward_overlap(row)


def _forward_overlap(row: Row) -> Iterator[str]:
    if row["exposed_mufu"] > EXPOSED_MUFU:
        yield f"{row['exposed_mufu']} exposed exponentials, at most {EXPOSED_MUFU}"
    if row["exposed_instructions"] > EXPOSED_INSTRUCTIONS:
        yield f"{row['exposed_instructions']} exposed instructions"
    if row["loop"]["products"] != FORWARD_PRODUCTS:
        yield f"{row['loop']['products']} products per iteration, not {FORWARD_PRODUCTS}"


def _passes(row: Row) -> Iterator[str]:
    """Counts of the whole pass that the launch is part of, where they were made."""
    most = BYTES_RATIO.get(row.get("op", ""))
    # Two heads are fewer than the heads that share the cosines of a token: only the cache does.
    shared = row.get("op") == "qk_norm_rope" and not row.get("config", "").startswith("7B")
    for name in ("unique_ratio",) if shared else ("bytes_ratio", "unique_ratio"):
        ratio = row.get(name)
        if most and ratio is not None and ratio > most:
            yield f"{name} {ratio:.3f}, at most {most}"
    expected = LAUNCHES.get((row.get("op", ""), row.get("pass", "")))
    launches = row.get("launches")
    if row.get("config", "").startswith("position") and row.get("pass") == "backward":
        expected = None  # one more, which sums the gradients of a position over samples
    if expected and launches is not None and launches != expected:
        yield f"{launches} launches, not {expected}"


def _dtype(launch: Launch) -> str:
    """Of the tokens, the first tensor of a kernel; an update has its tensors in a table."""
    first = next((v for v in launch.arguments.values() if isinstance(v, Tensor)), None)
    if launch.kernel.__name__ in UPDATE_KERNELS or first is None:
        first = launch.tensors[0] if launch.tensors else None
    return "" if first is None else str(first.dtype).removeprefix(f"{torch.__name__}.")


def _accesses(code: Code) -> dict[str, int]:
    """ "load 128" -> how often such an access stands in the code."""
    found: Counter[str] = Counter()
    for name, count in code.accesses.items():
        kind = "store" if "STG" in name or "store" in name else "load"
        found[f"{kind} {access_bits(name)}"] += count
    return dict(sorted(found.items()))
