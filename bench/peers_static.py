"""Bytes and launches of our kernels beside Liger-Kernel and `torch.compile`, without a GPU.

Ours and Liger's bytes are counted in Triton's interpreter; those of `torch.compile` are what
Inductor says of the code that it generates. Each needs a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .gates import LAUNCHES
from .static_cases import TOKENS, model_uses

ROOT = Path(__file__).parents[1]
COMPARED = ("adaln_modulate", "residual_adaln_modulate", "gated_residual", "qk_norm_rope")
COLUMNS: dict[str, Callable[[Any], str]] = {
    "op": str,
    "config": str,
    "pass": str,
    "rival": str,
    "launches": str,
    "requested per element": "{:.2f}".format,
    "unique per element": "{:.2f}".format,
}


def side_by_side(ops: Iterable[str], traffic: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ours, of `torch.compile` and of Liger-Kernel; nothing if none of the ops has a rival.

    Args:
        traffic: rows of `bench.traffic`.
    """
    chosen = [op for op in ops if op in COMPARED]
    if not chosen:
        return []
    rows = ours(chosen, traffic)
    rows += from_process("bench.inductor", ["--op", *chosen], interpret=False)
    rows.sort(key=lambda row: (chosen.index(row["op"]), row["config"], row["pass"] == "backward"))
    if "adaln_modulate" in chosen:
        if find_spec("liger_kernel"):
            rows += from_process("bench.liger_peer", [], interpret=True)
        else:
            print("Liger-Kernel is not installed (make setup-test): its rows are left out")
    return rows


def ours(ops: Sequence[str], traffic: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our kernels at the sizes of the 7B model, per element of the tokens."""
    elements = {
        (op, use.config): next(iter(use.inputs(device="meta").values())).numel() / TOKENS
        for op in ops
        for use in model_uses(op, "7B")
        if "M" not in use.options  # few keys: nothing that is counted per query says something
    }
    return [
        {
            "op": row["op"],
            "config": row["config"],
            "pass": row["pass"],
            "rival": "transfer1",
            "launches": LAUNCHES[row["op"], row["pass"]],
            "requested per element": row["requested"] / row["tokens"] / size,
            "unique per element": row["unique"] / row["tokens"] / size,
        }
        for row in traffic
        if (size := elements.get((row["op"], row["config"])))
    ]


def from_process(module: str, arguments: Sequence[str], *, interpret: bool) -> list[dict[str, Any]]:
    """The JSON that a module of the bench prints, run in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:  # Triton decides at import
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows
