"""Times every op of the table: each backend, what one would use instead, and the machine's limit.

    python -m bench.ops [--op NAME ...] [--size NAME ...] [--dtype NAME ...] [--backend NAME ...]
                        [--rounds N] [--json FILE]

The work of `adamw_step` is a whole update: gradient norm, clip coefficient, AdamW and average.
Rivals take turns in one process. An op is timed only after its backends have passed parity.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels import BACKENDS, OPS, Op

from .timing import WARM_UP, describe, machine, markdown, take_turns
from .work import Work, works

DTYPES = ("float32", "bfloat16", "float16")
COLUMNS: dict[str, Callable[[Any], str]] = {
    "op": str,
    "size": str,
    "dtype": str,
    "pass": str,
    "rival": str,
    "ms": "{:.2f}".format,
    "spread": "{:.0%}".format,
    "GB/s": "{:.1f}".format,
    "GFLOP/s": "{:.0f}".format,
    "share of limit": "{:.2f}".format,
    "speed against": lambda ratios: ", ".join(f"{n} x{ratio:.2f}" for n, ratio in ratios.items()),
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked, op by op."""
    timed = [name for name, op in OPS.items() if op.sizes]
    sizes = sorted({size for op in OPS.values() for size in op.sizes})
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=timed, default=timed)
    parser.add_argument("--size", nargs="+", choices=sizes, help="all of an op by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="the usual one by default")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS[1:], help="all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = machine(device)
    print(f"{describe(facts)}, warm-up {WARM_UP}, rounds {options.rounds}\n", flush=True)
    dtypes = options.dtype and [getattr(torch, name) for name in options.dtype]
    rows: list[dict[str, Any]] = []
    for name in options.op:
        rows += time_op(
            OPS[name], options.size, device, options.rounds, dtypes, backends=options.backend
        )
        if options.json:
            options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))
        print(f"{name}: done", flush=True)
    print("\n" + markdown(rows, COLUMNS))


def time_op(
    op: Op,
    sizes: Sequence[str] | None,
    device: str,
    rounds: int,
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Rows of one op, one per size, dtype, pass and rival.

    Raises:
        AssertionError: a backend is not as exact as the reference; it is not timed then.
    """
    rows = []
    for work in works(op, device, sizes, dtypes, backends):
        rows += time_work(work, rounds)
        del work
        gc.collect()
    return rows


def time_work(work: Work, rounds: int) -> list[dict[str, Any]]:
    """Rows of one work: our backends, the peers, the limit."""
    limit, limit_call = work.limit
    times = take_turns({**work.ours, **work.peers, limit: limit_call}, rounds)
    least = times[limit].median * work.limit_scale
    rows = []
    for rival, time in times.items():
        seconds = least if rival == limit else time.median
        ratios = {peer: times[peer].median / seconds for peer in work.peers}
        rows.append(
            {
                "op": work.op.name,
                "size": work.size,
                "dtype": str(work.dtype).removeprefix("torch."),
                "pass": work.passes,
                "rival": rival,
                "kind": _kind(work, rival),
                "ms": 1e3 * seconds,
                "spread": time.spread,
                "bytes": work.bytes,
                "flops": work.flops,
                "GB/s": work.bytes / seconds / 1e9 if limit == "memory pass" else None,
                "GFLOP/s": work.flops / seconds / 1e9 if limit == "matrix product" else None,
                "share of limit": least / seconds,
                "speed against": ratios if rival in work.ours and ratios else None,
            }
        )
    return rows


def _kind(work: Work, rival: str) -> str:
    if rival in work.ours:
        return "ours"
    return "peer" if rival in work.peers else "limit"


if __name__ == "__main__":
    main()
