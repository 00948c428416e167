"""Forward and backward of whole networks: ours and diffusers', same weights, dtype and threads.

    python -m bench.networks [--size NAME] [--dtype NAME] [--threads N] [--json FILE]

The limit is the arithmetic of the best square matrix product of the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from configs.net import COMMON
from transfer1.diffusion.condition import Condition
from transfer1.model.dit import DiT

from .diffusers_peer import run_theirs, their_network
from .flops import count_flops
from .timing import describe, machine, markdown, matrix_product, take_turns

CONTEXT_TOKENS = 512
COLUMNS: dict[str, Callable[[Any], str]] = {
    "size": str,
    "dtype": str,
    "threads": str,
    "network": str,
    "ms": "{:.1f}".format,
    "spread": "{:.0%}".format,
    "GFLOP/s": "{:.0f}".format,
    "share of GEMM": "{:.2f}".format,
    "speed against diffusers": "{:.2f}".format,
}


@dataclass(frozen=True)
class Size:
    """A network and the latent it sees."""

    width: int
    blocks: int
    heads: int
    latent: tuple[int, int, int]  # frames, rows, columns; a token is 2 x 2 of a frame


SIZES = {
    "tiny_fa": Size(256, 4, 2, (2, 16, 16)),
    "512x8": Size(512, 8, 4, (8, 32, 32)),  # 2,048 tokens
}


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.networks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--backend", nargs="+", default=["reference"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    options = parser.parse_args(arguments)
    facts = machine("cpu")
    print(describe(facts), end="\n\n", flush=True)
    rows: list[dict[str, Any]] = []
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        for size in options.size:
            for dtype in options.dtype:
                rows += time_networks(size, dtype, options.backend, options.rounds)
    print(markdown(rows, COLUMNS))
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1))


def time_networks(size: str, dtype: str, backends: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of one size and dtype: each backend of ours, then diffusers."""
    spec, kind = SIZES[size], getattr(torch, dtype)
    arguments: dict[str, Any] = {
        **COMMON,
        "extra_per_block_abs_pos_emb": True,
        "extra_per_block_abs_pos_emb_type": "learnable",
        "model_channels": spec.width,
        "num_blocks": spec.blocks,
        "num_heads": spec.heads,
    }
    torch.manual_seed(0)
    reference = DiT(**arguments, ops=kernels.select("reference")).to(kind)
    ours = {b: DiT(**arguments, ops=kernels.select(b)).to(kind) for b in backends}
    for network in ours.values():
        network.load_state_dict(reference.state_dict())
    theirs = their_network(arguments, reference.state_dict()).to(kind)
    frames, rows_, columns = spec.latent
    x = torch.randn(1, 16, *spec.latent).to(kind)
    noise_level = torch.zeros(1, dtype=kind)
    condition = Condition(
        context=torch.randn(1, CONTEXT_TOKENS, 1024).to(kind),
        fps=torch.full((1,), 24.0),
        padding_mask=torch.zeros(1, 1, 8 * rows_, 8 * columns, dtype=kind),
    )

    def forward(network: DiT) -> torch.Tensor:
        return network(x, noise_level, condition)

    calls: dict[str, Callable[[], Any]] = {
        f"transfer1 {backend}": _training(network, forward) for backend, network in ours.items()
    }
    calls["diffusers"] = _training(theirs, lambda n: run_theirs(n, x, noise_level, condition))
    flops = count_flops(_training(reference, forward))
    calls["GEMM"], product_flops = matrix_product(kind, "cpu")
    times = take_turns(calls, rounds, warm_up=2)
    limit = product_flops / times.pop("GEMM").median
    return [
        {
            "size": size,
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "network": name,
            "ms": 1e3 * time.median,
            "spread": time.spread,
            "GFLOP/s": flops / time.median / 1e9,
            "share of GEMM": flops / time.median / limit,
            "speed against diffusers": times["diffusers"].median / time.median,
        }
        for name, time in times.items()
    ]


def _training(network: torch.nn.Module, forward: Callable[[Any], Any]) -> Callable[[], None]:
    def run() -> None:
        network.zero_grad(set_to_none=True)
        forward(network).float().square().mean().backward()

    return run


if __name__ == "__main__":
    main()
