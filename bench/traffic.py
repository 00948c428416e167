"""Bytes that Triton kernels ask for, counted in the interpreter, against the least possible.

    TRITON_INTERPRET=1 python -m bench.traffic [--op NAME ...]

prints JSON, one row per op, configuration and pass. Requested bytes are what reaches the second
level cache, distinct ones what comes from memory when that cache is perfect. Programs own as many
rows as at 56,320 tokens in a forward pass (64) and fewer in a backward pass (64 instead of 220), so
what is counted is at least what is asked for there; attention asks for keys and values once per
tile of queries, of which there are two here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels import OPS, Op
from kernels.adaln_attention import qk_norm_rope, rows

from .costs import backward_cost
from .interpreter import Traffic, counted, repair
from .static_cases import MODELS, Use, as_list, model_uses, uses_of

ROWS_PER_PROGRAM = 64
SHAPES = (
    (32_768,),
    (100, 101),
)  # parameters of an update: as many as most chunks have, and odd ones
FEWER = {"attention": {"N": 1}}  # of the options of a use; others have one program per sample


def main(arguments: list[str] | None = None) -> None:
    """Print the rows of the chosen ops as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic")
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS))
    repair()
    print(json.dumps([row for op in parser.parse_args(arguments).op for row in traffic_rows(op)]))


def traffic_rows(op: str) -> list[dict[str, Any]]:
    """Traffic of every pass of every use of an op by a model."""
    has_models = any(True for name in MODELS for _ in model_uses(op, name))
    found = []
    with long_sequences():
        for use in uses_of(op):
            fewer = FEWER.get(op, {"L": ROWS_PER_PROGRAM}) if has_models else {"shapes": SHAPES}
            for stage, traffic, least in passes(OPS[op], _inputs(use, fewer)):
                found.append(
                    {
                        "op": op,
                        "config": use.config,
                        "pass": stage,
                        "tokens": ROWS_PER_PROGRAM if fewer.get("L") else None,
                        "requested": traffic.requested,
                        "unique": traffic.unique,
                        "least": least,
                        "bytes_ratio": traffic.requested / least,
                        "unique_ratio": traffic.unique / least,
                    }
                )
    return found


def passes(op: Op, inputs: dict[str, Any]) -> Iterator[tuple[str, Traffic, int]]:
    """("forward", what it asked for, the least); the same of a backward pass if there is one."""
    with counted() as traffic:
        outputs = op.build("triton")(**inputs)
    yield "forward", traffic, op.cost(**inputs)[0]
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]
    if leaves:
        outputs = as_list(outputs)
        gradients = [torch.ones_like(output) for output in outputs]
        with counted() as traffic:
            torch.autograd.grad(outputs, leaves, gradients)
        yield "backward", traffic, backward_cost(op, inputs, outputs)[0]


@contextmanager
def long_sequences() -> Iterator[None]:
    """In the block, programs own as many tokens as in a sequence of full length."""
    with (
        mock.patch.object(rows, "PROGRAMS", 1),
        mock.patch.object(qk_norm_rope, "BACKWARD_PROGRAMS", 1),
    ):
        yield


def _inputs(use: Use, others: dict[str, Any]) -> dict[str, Any]:
    if "M" in others or "M" not in use.options:
        return use.inputs(**others)
    return use.inputs(**others, M=min(use.options["M"], others.get("L", use.options["M"])))


if __name__ == "__main__":
    main()
