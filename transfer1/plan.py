"""`python -m transfer1.plan`: memory of a run per process, and layouts that fit other machines.

    python -m transfer1.plan --config FILE [--gpus N --memory GB] -- experiment=NAME key=value ...

One step of the experiment runs on the meta device (`transfer1.training.memory`). What a layout
makes of it is arithmetic: tensor parallelism divides the split weights, sequence and context
parallelism the tokens, sharding (fsdp) everything that lasts but the block at work. All figures
are predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transfer1.config import Config, ConfigError, compose
from transfer1.training.memory import Memory, measure

GB = 1e9
USABLE = 0.92  # of a GPU's memory: the rest is the context of CUDA, libraries and fragments
MACHINES = ((1, 24), (1, 48), (1, 80), (8, 80))
CHECKPOINTING = ("none", "selective", "block")
CLIPS = (16, 8, 4, 2)  # latent frames
ALL_TRAINED, ADAPTERS = "", "lora=linear"


@dataclass(frozen=True)
class Layout:
    """How processes share a model.

    Attributes:
        tensor: ranks that share the matrices (tensor parallelism).
        context: ranks that share the frames of a clip.
        sequence: whether tensor-parallel ranks share the tokens outside the matrices too.
        shards: ranks over which weights, gradients and optimizer are sharded (fsdp).
    """

    tensor: int = 1
    context: int = 1
    sequence: bool = False
    shards: int = 1

    @property
    def weight_ranks(self) -> int:
        """Ranks over which weights are split, one way or the other."""
        return self.tensor * self.shards

    @property
    def token_ranks(self) -> int:
        """Ranks over which the tokens of a clip are split."""
        return self.context * (self.tensor if self.sequence else 1)

    def __str__(self) -> str:
        parts = []
        if self.tensor > 1:
            parts.append(f"tensor parallel {self.tensor}" + (" + sequence" * self.sequence))
        if self.context > 1:
            parts.append(f"context parallel {self.context}")
        if self.shards > 1:
            parts.append(f"fsdp over {self.shards}")
        return ", ".join(parts) or "whole model on each GPU"

    def overrides(self) -> str:
        """What to write after `--`; sizes that the experiment may set are set back to 1."""
        words = [
            f"model_parallel.tensor_model_parallel_size={self.tensor}",
            f"model_parallel.sequence_parallel={str(self.sequence).lower()}",
            f"model_parallel.context_parallel_size={self.context}",
        ]
        if self.shards > 1:
            words.append("trainer.distributed_parallelism=fsdp")
        return " ".join(words)


def rows(memory: Memory, layout: Layout) -> dict[str, float]:
    """Bytes per process: what lasts, by kind, and what one step adds at its peak.

    Two simplifications: weights that tensor parallelism replicates (norms, modulation, embeddings)
    are divided like the others, and activations are divided by `tensor` only with `sequence`.
    """
    split, tokens = layout.weight_ranks, layout.token_ranks
    gathered = 0 if layout.shards == 1 else 3 * memory.largest_block / layout.tensor
    working = max(
        memory.forward / tokens + 4 * memory.pixels,
        (memory.backward - memory.gradients) / tokens + memory.gradients / split,
        memory.step / split,
    )
    return {
        "parameters": memory.parameters / split + gathered,
        "moments of the optimizer": memory.moments / split,
        "masters": memory.masters / split,
        "averages (EMA)": memory.averages / split,
        "batch": float(2 * memory.pixels),
        "working memory of a step at its peak": working,
    }


def current_layout(config: Config, gpus: int) -> Layout:
    """The layout that the configuration asks for."""
    parallel = config.model_parallel
    sharded = config.trainer.distributed_parallelism == "fsdp"
    return Layout(
        tensor=parallel.tensor_model_parallel_size,
        context=parallel.context_parallel_size,
        sequence=parallel.sequence_parallel,
        shards=max(1, gpus // parallel.tensor_model_parallel_size) if sharded else 1,
    )


def layouts(gpus: int) -> Iterator[Layout]:
    """Layouts from the one with the least communication on."""
    yield Layout()
    if gpus > 1:
        yield Layout(shards=gpus)
        yield Layout(context=gpus, shards=gpus)
        yield Layout(tensor=gpus, sequence=True)


class Planner:
    """Measures variants of one experiment, each once."""

    def __init__(self, path: str, overrides: Sequence[str]) -> None:
        self.path = path
        self.overrides = list(overrides)
        self.config = compose(path, self.overrides)
        self._measured: dict[tuple[str, ...], Memory] = {}

    def measure(self, changes: tuple[str, ...]) -> Memory:
        """Memory of the experiment with further overrides."""
        if changes not in self._measured:
            self._measured[changes] = measure(compose(self.path, [*self.overrides, *changes]))
        return self._measured[changes]

    def variants(self) -> Iterator[tuple[str, ...]]:
        """Overrides from what changes a run least: recomputing, adapters, shorter clips."""
        channels, frames, height, width = self.config.model.latent_shape
        networks = ["net"] + (["net_ctrl"] if self.config.model.net_ctrl is not None else [])
        for clip in [frames, *(clip for clip in CLIPS if clip < frames)]:
            for trained in (ALL_TRAINED, ADAPTERS):
                for mode in CHECKPOINTING:
                    words = [f"model.{n}.activation_checkpoint={mode}" for n in networks]
                    words += [trained] if trained else []
                    if clip != frames:
                        words.append(f"model.latent_shape=[{channels},{clip},{height},{width}]")
                        words.append(f"dataloader_train.dataset.num_frames={8 * (clip - 1) + 1}")
                    yield tuple(words)

    def propose(self, gpus: int, gigabytes: float) -> tuple[tuple[str, ...], Layout, float] | None:
        """The first variant and layout that fit, and its bytes per GPU."""
        for words in self.variants():
            memory = self.measure(words)
            for layout in layouts(gpus):
                peak = sum(rows(memory, layout).values())
                if peak <= USABLE * gigabytes * GB:
                    return words, layout, peak
        return None


def report(planner: Planner, gpus: int, machines: Sequence[tuple[int, float]]) -> Iterator[str]:
    """Lines for the terminal."""
    memory = planner.measure(())
    layout = current_layout(planner.config, gpus)
    yield f"{planner.config.job.name}: {layout}. Predicted, GB per GPU:"
    counted = rows(memory, layout)
    for name, size in {
        "gradients (part of the working memory)": memory.gradients / layout.weight_ranks,
        "activations kept for backward (part of it)": memory.activations / layout.token_ranks,
        **counted,
        "peak": sum(counted.values()),
    }.items():
        yield f"  {name:<46}{size / GB:8.2f}"
    yield ""
    for count, gigabytes in machines:
        found = planner.propose(count, gigabytes)
        machine = f"{count} x {gigabytes:g} GB"
        if found is None:
            yield f"{machine}: nothing that was tried fits; use a smaller network or image"
            continue
        words, proposed, peak = found
        yield f"{machine}: {proposed}, {peak / GB:.1f} GB per GPU (predicted)"
        yield f"    {' '.join(words)} {proposed.overrides()}"


def main(arguments: Sequence[str]) -> int:
    """Print the plan; return the exit code, 2 after bad input."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m transfer1.plan", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", default="configs/config_train.py", help="make_config()")
    parser.add_argument("--gpus", type=int, help="propose for this many GPUs")
    parser.add_argument("--memory", type=float, default=80, help="of one GPU, in GB")
    options = parser.parse_args(arguments[:split])
    machines: Any = [(options.gpus, options.memory)] if options.gpus else MACHINES
    try:
        if options.gpus is not None and options.gpus < 1:
            raise ConfigError(f"--gpus {options.gpus}: give 1 or more")
        planner = Planner(options.config, arguments[split + 1 :])
        for line in report(planner, options.gpus or 8, machines):
            print(line)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from loguru import logger

    logger.remove()
    sys.exit(main(sys.argv[1:]))
