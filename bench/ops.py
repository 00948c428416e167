"""Times every op of the table: each backend, what one would use instead, and the machine's limit.

    python -m bench.ops [--op NAME ...] [--size NAME ...] [--rounds N] [--json FILE]

The work of `adamw_step` is a whole update: gradient norm, clip coefficient, AdamW and average.
Rivals take turns in one process. An op is timed only after its backends have passed parity on all
its cases.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels import BACKENDS, OPS, Op
from kernels.registry import has_cpp_compiler

from .parity import check_parity, inputs_of
from .peers import PEERS
from .timing import describe, machine, markdown, memory_pass, take_turns

LIMIT = "memory pass"
GPU_SIZES = ("7B", "7B_cross")  # would take minutes on a CPU
COLUMNS: dict[str, Callable[[Any], str]] = {
    "op": str,
    "size": str,
    "rival": str,
    "ms": "{:.2f}".format,
    "spread": "{:.0%}".format,
    "GB/s": "{:.1f}".format,
    "share of limit": "{:.2f}".format,
    "speed against": str,
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked."""
    timed = [name for name, op in OPS.items() if op.sizes]
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=timed, default=timed)
    parser.add_argument("--size", nargs="+", help="names of sizes; all of an op by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = machine(device)
    print(describe(facts), f"rounds {options.rounds}", sep=", ", end="\n\n", flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.op:
        rows += time_op(OPS[name], options.size, device, options.rounds)
    print(markdown(rows, COLUMNS))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


def time_op(op: Op, sizes: list[str] | None, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one op, one per size and rival.

    Raises:
        AssertionError: a backend is not as exact as the reference; it is not timed then.
    """
    backends = backends_on(op, device)
    for backend in backends:
        for case, spec in op.cases.items():
            if backend == "compile" and spec.options.get("master") == "none":
                continue  # it does not round stochastically, and says so
            inputs = inputs_of(op, case, spec.dtypes[0])
            check_parity(op, op.build(backend, device), _on(inputs, device))
    rows = []
    for size, spec in op.sizes.items():
        if sizes and size not in sizes:
            continue
        if device == "cpu" and size in GPU_SIZES:
            print(f"{op.name} {size}: left to a GPU", flush=True)
            continue
        inputs = op.inputs(device=device, dtype=spec.dtypes[0], **spec.options)
        work = {b: _work(op, b, device, copy.deepcopy(inputs)) for b in backends}
        peers = {name: make(inputs) for name, make in PEERS.get(op.name, {}).items()}
        moved = _bytes(op, inputs)
        limit = memory_pass(moved, device, reads_only=op.name == "grad_norm")
        times = take_turns({**work, **peers, LIMIT: limit}, rounds)
        for rival, time in times.items():
            against = [f"{p} x{times[p].median / time.median:.2f}" for p in peers if p != rival]
            rows.append(
                {
                    "op": op.name,
                    "size": size,
                    "rival": rival,
                    "ms": 1e3 * time.median,
                    "spread": time.spread,
                    "GB/s": moved / time.median / 1e9,
                    "share of limit": times[LIMIT].median / time.median,
                    "speed against": ", ".join(against) if rival in work else None,
                }
            )
    return rows


def backends_on(op: Op, device: str) -> list[str]:
    """Backends that can be timed here: Triton's interpreter says nothing about speed."""
    possible = {
        "triton": op.triton is not None and device == "cuda",
        "compile": has_cpp_compiler(),
        "reference": True,
    }
    return [backend for backend in BACKENDS if possible.get(backend)]


def _work(op: Op, backend: str, device: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    call = op.build(backend, device)
    if op.name != "adamw_step":
        return partial(call, **inputs)
    norm = OPS["grad_norm"].build(backend, device)

    def update() -> None:
        inputs["clip_coef"] = (1.0 / (norm(inputs["grads"]) + 1e-6)).clamp(max=1.0)
        call(**inputs)

    return update


def _bytes(op: Op, inputs: dict[str, Any]) -> int:
    size = op.cost(**inputs)[0]
    if op.name == "adamw_step":
        size += OPS["grad_norm"].cost(grads=inputs["grads"])[0]
    return size


def _on(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {name: _on(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    main()
