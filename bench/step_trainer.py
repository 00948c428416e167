"""The trainer of real runs on a synthetic batch: what `bench.train_step` measures."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from transfer1.config import Config, compose
from transfer1.training.callback import CallBackGroup
from transfer1.training.callbacks import GradClip, LowPrecision
from transfer1.training.ranges import Ranges
from transfer1.training.trainer import Trainer

from .timing import wait

CONFIG = Path(__file__).parents[1] / "configs" / "config_train.py"
TEXT_TOKENS = 512  # where the data set names no number
# What a step does, in its order; names of `Ranges`. The first is a part of forward.
PHASES = ("encode", "forward", "backward", "gradient norm", "optimizer", "ema")


class StepTrainer(Trainer):
    """A trainer whose steps all see one random batch; of the callbacks those that are the step's.

    Args:
        config: of any run; clips have the shape of `model.latent_shape`.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        kept = [c for c in self.callbacks.callbacks if isinstance(c, GradClip | LowPrecision)]
        self.callbacks = CallBackGroup(kept, self)
        self.job.path.mkdir(parents=True, exist_ok=True)
        self.build()
        self.batch = synthetic_batch(config, self.state.model.tokenizer)

    def build_dataloaders(self) -> tuple[Any, Any]:
        return None, None

    def step(self) -> None:
        """Forward, backward, gradient norm and clipping, optimizer, moving average."""
        self.training_step(self.batch, micro_step=0)

    @property
    def tokens(self) -> int:
        """Tokens of a batch that the base network sees."""
        network: Any = self.config.model.net
        _, T, H, W = self.config.model.latent_shape
        grid = T // network.patch_temporal * (H // network.patch_spatial)
        return self.batch["fps"].numel() * grid * (W // network.patch_spatial)

    @property
    def state_bytes(self) -> int:
        """Bytes that stay between steps: parameters, moments and masters, averages."""
        optimizer = self.state.optimizer.state.values()
        kept = [value for state in optimizer for value in state.values()]
        averages = self.state.ema.shadows.values() if self.state.ema else ()
        return sum(
            tensor.nbytes
            for tensor in (*self.state.model.parameters(), *kept, *averages)
            if isinstance(tensor, Tensor)
        )

    def phases(self, rounds: int) -> dict[str, float]:
        """Mean seconds of each phase; "ema" is the rest where it is a part of "optimizer".

        Ranges are put on for good: call it after everything else has been timed.
        """
        watch = Stopwatch()
        ranges = Ranges(watch.push, watch.pop)
        ranges.trainer = self
        self.callbacks.callbacks.append(ranges)
        ranges.on_train_start(self.state.model)
        for _ in range(rounds):
            self.step()
        seconds = {name: watch.seconds.get(name, 0.0) / rounds for name in PHASES}
        seconds["forward"] -= seconds["encode"]
        if self.one_pass:  # the rest of "ema" only counts
            seconds["ema"] = 0.0
        return seconds


class Stopwatch:
    """Adds up the seconds of ranges by name; nested ones count for themselves and their parents."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def push(self, name: str) -> None:
        if name in PHASES:
            wait()
        self._open.append((name, time.perf_counter()))

    def pop(self) -> None:
        name, started = self._open.pop()
        if name in PHASES:
            wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def build_trainer(overrides: Iterable[str], backend: str, folder: Path) -> StepTrainer:
    """Compose a configuration and build its trainer.

    Args:
        overrides: as on the command line of train.py.
        backend: option of the group `kernels`.
        folder: for the files of the job.

    Raises:
        ConfigError: what `compose` and `Trainer` refuse.
    """
    own = [f"kernels={backend}", f"job.path_local={folder}", "trainer.timestamp_seed=false"]
    return StepTrainer(compose(CONFIG, [*overrides, *own]))


def synthetic_batch(config: Config, tokenizer: Any) -> dict[str, Tensor]:
    """A random batch as the data set of a configuration would give it."""
    loader: Any = config.dataloader_train
    batch = loader.batch_size
    _, T, H, W = config.model.latent_shape
    factor = tokenizer.spatial_compression_factor
    frames, height, width = tokenizer.get_pixel_num_frames(T), factor * H, factor * W
    text_tokens = loader.dataset.get("num_text_tokens") or TEXT_TOKENS
    text_width = config.model.net.get("crossattn_emb_channels")
    generator = torch.Generator().manual_seed(0)

    def pixels() -> Tensor:
        shape = (batch, 3, frames, height, width)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return {
        config.model.input_data_key: pixels(),
        config.model.hint_key.hint_key: pixels(),
        "t5_text_embeddings": torch.randn(batch, text_tokens, text_width, generator=generator),
        "t5_text_mask": torch.ones(batch, text_tokens, dtype=torch.int64),
        "fps": torch.full((batch,), 24.0),
        "num_frames": torch.full((batch,), frames),
        "image_size": torch.tensor([[height, width] * 2] * batch, dtype=torch.float32),
        "padding_mask": torch.zeros(batch, 1, height, width),
    }


def peak_bytes(step: Any, device: torch.device) -> int:
    """Most bytes of tensors that a step holds at once beyond those that were there before it.

    On a GPU by the counters of PyTorch's allocator, on a CPU from the profiler's record of every
    allocation.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    )
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
