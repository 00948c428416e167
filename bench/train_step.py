"""Times whole training steps, and how their cost grows.

    python -m bench.train_step [--kernels NAME ...] [--part sizes scaling] [--rounds N] [--quick]
                               [--json FILE] [--plot FILE] [experiment=NAME key=value ...]

A step is what a run does with a batch: encode the clip, forward, backward, gradient norm and
clipping, optimizer, moving average. Three sizes of the demo's networks are timed for each choice of
`kernels`; with overrides of the configuration, that configuration instead. The limit is the
arithmetic of the best square matrix product of the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from loguru import logger

from kernels import BACKENDS
from kernels.registry import has_cpp_compiler
from transfer1.config import ConfigError

from .flops import count_flops
from .step_trainer import PHASES, StepTrainer, build_trainer, peak_bytes
from .timing import describe, forget_compiled, machine, markdown, matrix_product, take_turns

DEMO = ("experiment=demo_edge", "model.net.max_frames=64", "model.net_ctrl.max_frames=64")
COLUMNS: dict[str, Callable[[Any], str]] = {
    "configuration": str,
    "kernels": str,
    "tokens": str,
    "ms": "{:.1f}".format,
    "spread": "{:.0%}".format,
    "steps/s": "{:.3g}".format,
    "tokens/s": "{:.0f}".format,
    "GFLOP": "{:.1f}".format,
    "share of GEMM": "{:.2f}".format,
    "state MiB": "{:.0f}".format,
    "peak MiB": "{:.0f}".format,
    **{f"{phase} ms": "{:.1f}".format for phase in PHASES},
}


@dataclass(frozen=True)
class Size:
    """Networks and the batch that they see; tokens are 2 x 2 of a latent frame."""

    width: int
    blocks: int
    latent: tuple[int, int, int]  # frames, rows, columns
    batch: int = 1
    precision: str = "float32"

    def overrides(self) -> list[str]:
        """Of the demo's configuration: heads of 64, a control branch of half as many blocks."""
        heads = max(1, self.width // 64)
        both: dict[str, Any] = {
            "model_channels": self.width,
            "num_blocks": self.blocks,
            "num_heads": heads,
        }
        both |= {"mlp_ratio": 4.0, "max_img_h": 128, "max_img_w": 128}
        return [
            *DEMO,
            f"model.latent_shape=[16,{','.join(map(str, self.latent))}]",
            f"dataloader_train.batch_size={self.batch}",
            f"model.precision={self.precision}",
            f"model.net_ctrl.num_control_blocks={max(1, self.blocks // 2)}",
            *(f"model.{net}.{k}={v}" for net in ("net", "net_ctrl") for k, v in both.items()),
        ]


LATENTS = {
    256: (4, 16, 16),
    512: (8, 16, 16),
    1024: (4, 32, 32),
    2048: (8, 32, 32),
    4096: (16, 32, 32),
    8192: (8, 64, 64),
}  # tokens -> latent
SIZES = {
    "tiny": Size(128, 2, LATENTS[256]),
    "small": Size(256, 4, LATENTS[512]),
    "medium": Size(384, 6, LATENTS[1024]),
}
# Only on a GPU: a step would take minutes on a CPU.
GPU_SIZES = {"large": Size(2048, 8, LATENTS[8192], precision="bfloat16")}
# What grows -> its values and the size with each of them.
SCALING: Mapping[str, Mapping[int, Size]] = {
    "tokens": {tokens: Size(128, 4, latent) for tokens, latent in LATENTS.items()},
    "width": {width: Size(width, 4, LATENTS[512]) for width in (128, 256, 512, 1024)},
    "blocks": {blocks: Size(128, blocks, LATENTS[512]) for blocks in (2, 4, 8, 16)},
    "batch": {batch: Size(128, 4, LATENTS[256], batch) for batch in (1, 2, 4, 8)},
}
QUICK = Size(64, 1, (1, 8, 8))


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; write JSON and the plot where asked. 2 for a wrong configuration."""
    options = _parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = machine(device)
    print(describe(facts), f"rounds {options.rounds}\n", sep=", ", flush=True)
    result: dict[str, Any] = {"machine": facts, "rows": [], "scaling": []}
    try:
        with _quiet_log():
            if "sizes" in options.part:
                for name, overrides in _configurations(options, device).items():
                    chosen = options.kernels or kernels_on(device)
                    result["rows"] += time_step(name, overrides, chosen, options.rounds)
                    _save(result, options.json)
                print(markdown(result["rows"], COLUMNS), flush=True)
            if "scaling" in options.part and not options.overrides:
                result["scaling"] = list(_scaling(options, device))
                print("\n" + markdown(result["scaling"], {"grows": str, **COLUMNS}))
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _save(result, options.json)
    if options.plot and result["scaling"]:
        plot(result["scaling"], facts, options.plot)
        print(f"\nplot: {options.plot}")
    return 0


def kernels_on(device: str) -> list[str]:
    """Options of the group `kernels` that differ on this device."""
    possible = {
        "auto": True,
        "triton": device == "cuda",
        "compile": has_cpp_compiler(),
        "reference": True,
    }
    return [name for name in BACKENDS if possible[name]]


def time_step(
    name: str, overrides: Sequence[str], backends: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Rows of one configuration, one per choice of `kernels`; they take turns.

    Raises:
        ConfigError, ValueError: the configuration cannot be run here.
    """
    if "compile" in backends:  # batches of lists are compiled once for all sizes
        forget_compiled()
    started = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        build = partial(build_trainer, overrides, folder=Path(folder))
        trainers: dict[str, StepTrainer] = {backend: build(backend) for backend in backends}
        first = next(iter(trainers.values()))
        flops = count_flops((trainers.get("reference") or build("reference")).step)
        product, product_flops = matrix_product(first.dtype, first.device)
        calls: dict[str, Callable[[], Any]] = {b: t.step for b, t in trainers.items()}
        times = take_turns({**calls, "GEMM": product}, rounds, warm_up=2)
        limit = product_flops / times["GEMM"].median
        rows = []
        for backend, trainer in trainers.items():
            time = times[backend]
            peak = peak_bytes(trainer.step, trainer.device)
            phases = trainer.phases(max(1, rounds // 2))
            rows.append(
                {
                    "configuration": name,
                    "kernels": backend,
                    "tokens": trainer.tokens,
                    "ms": 1e3 * time.median,
                    "spread": time.spread,
                    "steps/s": 1 / time.median,
                    "tokens/s": trainer.tokens / time.median,
                    "GFLOP": flops / 1e9,
                    "share of GEMM": flops / time.median / limit,
                    "state MiB": trainer.state_bytes / 2**20,
                    "peak MiB": (trainer.state_bytes + peak) / 2**20,
                    **{f"{phase} ms": 1e3 * seconds for phase, seconds in phases.items()},
                }
            )
    del trainers, calls, first
    gc.collect()
    print(f"{name}: done after {monotonic() - started:.0f} s", flush=True)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], file: Path) -> None:
    """Draw seconds per step over what grows, one panel each, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(row["grows"] for row in rows))
    figure = Figure(figsize=(3.6 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        points = [row for row in rows if row["grows"] == name]
        values = [row[name] for row in points]
        seconds = [row["ms"] / 1e3 for row in points]
        axes.loglog(values, seconds, "o-", label=f"kernels={points[0]['kernels']}")
        proportional = [seconds[0] * value / values[0] for value in values]
        axes.loglog(values, proportional, ":", color="grey", label="proportional")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds per training step")
    panels[0].legend()
    figure.suptitle(f"{facts['device']}, {facts['threads']} threads", fontsize=9)
    figure.savefig(file, dpi=120)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_step",
        usage="%(prog)s [options] [experiment=NAME key=value ...]",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument("--kernels", nargs="+", choices=BACKENDS, help="all that differ by default")
    parser.add_argument(
        "--part", nargs="+", choices=("sizes", "scaling"), default=["sizes", "scaling"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one tiny size: does it work at all")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the growth of the cost as a PNG")
    given = sys.argv[1:] if arguments is None else arguments
    overrides = [a for a in given if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    options = parser.parse_args([a for a in given if a not in overrides])
    options.overrides = overrides
    return options


def _save(result: Mapping[str, Any], file: Path | None) -> None:
    """Write what there is so far: a run that is cut off leaves it."""
    if file:
        file.write_text(json.dumps(result, indent=1))


def _configurations(options: argparse.Namespace, device: str) -> dict[str, Sequence[str]]:
    """Name -> overrides of what the first table times."""
    if options.overrides:
        return {" ".join(options.overrides): options.overrides}
    if options.quick:
        return {"quick": QUICK.overrides()}
    sizes = SIZES | GPU_SIZES if device == "cuda" else SIZES
    return {name: size.overrides() for name, size in sizes.items()}


def _scaling(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Rows of the second table, for the first choice of `kernels`."""
    backends = (options.kernels or kernels_on(device))[:1]
    rounds = 1 if options.quick else max(2, options.rounds // 2)
    for name, sizes in SCALING.items():
        for value, size in list(sizes.items())[: 2 if options.quick else None]:
            shown = f"{name} {value}"
            (row,) = time_step(shown, size.overrides(), backends, rounds)
            yield {"grows": name, **row, name: value}


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Building a trainer logs what a run wants to know; a table does not."""
    logger.disable("transfer1")
    try:
        yield
    finally:
        logger.enable("transfer1")


if __name__ == "__main__":
    sys.exit(main())
