"""The same work by what users would pick instead, and who is ahead.

    python -m bench.peers [--part optimizer network] [--rounds N] [--quick] [--json FILE]

The optimizer: a whole update, the moving average alone and the gradient norm, against PyTorch,
ema-pytorch and timm. The network: forward and backward of diffusers' `CosmosTransformer3DModel`
with our weights. The tables are those of `bench.ops` and `bench.networks`; the last one says of
each work whether transfer1 is ahead of the fastest peer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernels import OPS

from . import networks, ops
from .rivals import MULTI_TENSOR
from .timing import describe, machine, markdown, package_version

PACKAGES = ("torch", "diffusers", "ema-pytorch", "timm")
OPTIMIZER_SIZES = ("flat_48M", "transformer_200")
VERDICT: dict[str, Callable[[Any], str]] = {
    "work": str,
    "transfer1": str,
    "ms": "{:.2f}".format,
    "fastest peer": str,
    "its ms": "{:.2f}".format,
    "speed": "x{:.2f}".format,
    "ahead": str,
}


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__.split("\n")[0]
    )
    parts = ("optimizer", "network")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work at all")
    parser.add_argument("--json", type=Path, help="write machine, versions and rows to this file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = machine(device) | {name: package_version(name) for name in PACKAGES}
    print(f"{describe(facts)}, rounds {options.rounds}\n", flush=True)
    result: dict[str, Any] = {"machine": facts, "optimizer": [], "network": []}
    if "optimizer" in options.part:
        sizes = ["ragged"] if options.quick else OPTIMIZER_SIZES
        for name in MULTI_TENSOR:
            result["optimizer"] += ops.time_op(
                OPS[name], sizes, device, options.rounds, [torch.float32]
            )
        print(markdown(result["optimizer"], ops.COLUMNS) + "\n", flush=True)
    if "network" in options.part:
        for size in list(networks.SIZES)[: 1 if options.quick else None]:
            for dtype in ("float32", "bfloat16"):
                result["network"] += networks.time_networks(size, dtype, ["auto"], options.rounds)
        print(markdown(result["network"], networks.COLUMNS) + "\n", flush=True)
    result["verdict"] = [*optimizer_verdict(result["optimizer"])]
    result["verdict"] += network_verdict(result["network"])
    print(markdown(result["verdict"], VERDICT))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def optimizer_verdict(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our fastest backend against the fastest peer, per work in rows of `bench.ops`."""
    works: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = f"{row['op']} {row['size']} {row['dtype']} {row['pass']}".strip()
        works.setdefault(name, []).append(row)
    lines = []
    for name, rivals in works.items():
        ours = [(row["ms"], row["rival"]) for row in rivals if row["kind"] == "ours"]
        peers = [(row["ms"], row["rival"]) for row in rivals if row["kind"] == "peer"]
        if peers:
            lines.append(_verdict(name, min(ours), min(peers)))
    return lines


def network_verdict(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours against diffusers, per work in rows of `bench.networks`."""
    works: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"network {row['size']} {row['dtype']} threads {row['threads']}"
        works.setdefault(name, {})[row["network"]] = row["ms"]
    lines = []
    for name, ms in works.items():
        peer = (ms.pop("diffusers"), "diffusers")
        lines.append(_verdict(name, min((value, rival) for rival, value in ms.items()), peer))
    return lines


def _verdict(work: str, ours: tuple[float, str], peer: tuple[float, str]) -> dict[str, Any]:
    """One line; within 2 % nobody is ahead."""
    speed = peer[0] / ours[0]
    ahead = "yes" if speed > 1.02 else "no" if speed < 1 / 1.02 else "even"
    return {
        "work": work,
        "transfer1": ours[1],
        "ms": ours[0],
        "fastest peer": peer[1],
        "its ms": peer[0],
        "speed": speed,
        "ahead": ahead,
    }


if __name__ == "__main__":
    main()
