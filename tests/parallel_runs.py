"""Runs of every parallel layout for one number of processes; started by torchrun.

`torchrun --nproc_per_node=N tests/parallel_runs.py FOLDER NAME...` trains each named layout into
FOLDER/NAME. What a process saw goes to FOLDER/NAME/rank_R.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import FRAMES, TinyClips, TinyTrainer, tiny_config
from torch import Tensor
from torch.utils.data import DataLoader

from transfer1.config import Config
from transfer1.data.sampler import StreamSampler
from transfer1.training.callback import Callback
from transfer1.training.processes import Processes
from transfer1.training.shards import gather, is_sharded, local
from transfer1.training.state import TrainState

SAMPLES = 4  # of a global batch
BASIC = ("trainer.max_iter=5", "model.finetune_base_model=true", "optimizer.lr=0.0003")


class Layout(NamedTuple):
    """Overrides of a run, and of the run of one process that it must equal."""

    parallel: tuple[str, ...]
    both: tuple[str, ...] = ()
    stops: int | None = None  # the run ends after so many updates and is resumed


FSDP = ("trainer.distributed_parallelism=fsdp", "model.fsdp_enabled=true")
CONTEXT = ("model_parallel.context_parallel_size=2",)
TENSOR = ("model_parallel.tensor_model_parallel_size=2",)
EVEN = ("model.latent_shape=[16,6,2,2]",)  # of frames, to be shared out
REMAINDER = ("model.precision=bfloat16", "optimizer.master_remainder=true")
LAYOUTS = {
    "ddp": Layout(()),
    "ddp_accumulating": Layout((), ("trainer.grad_accum_iter=2",)),
    "fsdp": Layout(FSDP),
    "fsdp_accumulating": Layout(FSDP, ("trainer.grad_accum_iter=2",)),
    "fsdp_hybrid": Layout(
        (*FSDP, "model.fsdp.sharding_strategy=hybrid", "model.fsdp.sharding_group_size=1")
    ),
    "fsdp_offload_frozen_base": Layout(
        (*FSDP, "model.fsdp.cpu_offload=true"), ("model.finetune_base_model=false",)
    ),
    "fsdp_resumed": Layout(FSDP, stops=3),
    "fsdp_from_one": Layout(FSDP),
    "fsdp_bfloat16": Layout((*FSDP, *REMAINDER), REMAINDER),
    "fsdp_bfloat16_resumed": Layout((*FSDP, *REMAINDER), REMAINDER, stops=3),
    "ddp_context": Layout(CONTEXT, EVEN),
    "fsdp_context": Layout((*FSDP, *CONTEXT), EVEN),
    "fsdp_context_checkpointing": Layout(
        (*FSDP, *CONTEXT, "model.net.activation_checkpoint=selective"),
        (*EVEN, "model.net_ctrl.activation_checkpoint=block"),
    ),
    "fsdp_tensor": Layout((*FSDP, *TENSOR)),
    "fsdp_tensor_resumed": Layout((*FSDP, *TENSOR), stops=3),
    "ddp_frozen_base": Layout((), ("model.finetune_base_model=false",)),
}

OF_FOUR = {  # layouts that need four processes, or are others there
    "four_ddp": Layout(()),
    "four_ddp_context": Layout(CONTEXT, EVEN),
    "four_hybrid": Layout(
        (*FSDP, "model.fsdp.sharding_strategy=hybrid", "model.fsdp.sharding_group_size=2")
    ),
    "four_fsdp_context": Layout((*FSDP, *CONTEXT), EVEN),
    "four_fsdp_tensor": Layout((*FSDP, *TENSOR)),
    "four_tensor_context": Layout((*FSDP, *TENSOR, *CONTEXT), EVEN),
    "four_fsdp_tensor_resumed": Layout((*FSDP, *TENSOR), stops=3),
}


class Watch(Callback):
    """Keeps losses and gradient norms as this process sees them."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.norms.append(self.trainer.gradients.norm.clone())

    def on_training_step_end(self, *args: Any) -> None:
        self.losses.append(args[3].clone())


class LongerClips(TinyClips):
    """Tiny clips of 3 latent frames, or of 6: the clip, then the same backwards."""

    def __init__(self, latent_frames: int) -> None:
        self.frames = FRAMES * latent_frames // 3

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        clip = super().__getitem__(key)
        for name in ("video", "control_input_edge"):
            clip[name] = torch.cat([clip[name], clip[name].flip(1)], dim=1)[:, : self.frames]
        return clip


class SharedTrainer(TinyTrainer):
    """A trainer whose global batch has `SAMPLES` samples, however many processes there are."""

    def build_dataloaders(self) -> tuple[Any, Any]:
        clips = LongerClips(self.config.model.latent_shape[1])
        size = SAMPLES // self.processes.replicas
        training = DataLoader(clips, batch_size=size, sampler=StreamSampler(clips))
        return training, DataLoader(clips, batch_size=2)


def run(config: Config) -> dict[str, Any]:
    """Train and return what the process saw, with the whole model and its averages."""
    watch = Watch()
    trainer = SharedTrainer(config, watch)
    assert trainer.run() == 0
    state = trainer.state
    assert state.ema is not None
    with trainer.processes.connected(trainer.device):
        return {
            "losses": torch.stack(watch.losses),
            "norms": torch.stack(watch.norms),
            "model": whole(state.model.state_dict()),
            "ema": whole(state.ema.state_dict()),
            "sharded": sum(map(is_sharded, state.model.parameters())),
            "local_elements": sum(local(v).numel() for v in state.ema.shadows.values()),
        }


def load(config: Config) -> TrainState:
    """What a run starts from."""
    trainer = SharedTrainer(config)
    trainer.build()
    trainer.load()
    return trainer.state


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unsharded copies."""
    return {k: gather(v) if is_sharded(v) else v.detach().clone() for k, v in tensors.items()}


def main(folder: Path, names: list[str]) -> None:
    """Train the named layouts, one after the other, in one connection of the processes."""
    processes = Processes.from_environment()
    with processes.connected(torch.device("cpu")):
        for name in names:
            layout = {**LAYOUTS, **OF_FOUR}[name]
            overrides = (*BASIC, *layout.both, *layout.parallel)
            if layout.stops:
                run(tiny_config(folder / name, *overrides, f"trainer.max_iter={layout.stops}"))
            seen = run(tiny_config(folder / name, *overrides))
            torch.save(seen, folder / name / f"rank_{processes.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
