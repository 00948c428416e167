"""Everything that a run needs to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transfer1.diffusion.condition import DataType
from transfer1.model.transfer import Transfer

from .ema import EMA, Optimizer
from .schedule import Schedule
from .shards import shard_like

PARTS = ("model", "optim", "scheduler", "trainer")  # what `checkpoint.keys_not_to_resume` may name


@dataclass
class TrainState:
    """The state of a run between two optimizer updates.

    Random numbers need no generator states: every draw is keyed by (seed, purpose, iteration,
    micro-step, sample), and the data stream is positioned by (seed, samples_seen).
    """

    model: Transfer
    optimizer: Optimizer
    schedule: Schedule
    ema: EMA | None = None
    seed: int = 0
    iteration: int = 0  # optimizer updates so far, skipped ones included
    samples_seen: int = 0  # samples drawn from the data stream so far
    skipped: int = 0  # updates that were skipped because a gradient was not finite
    skipped_in_a_row: int = 0
    trained_data_record: dict[str, int] = field(default_factory=lambda: {"image": 0, "video": 0})
    kernels: dict[str, str] = field(default_factory=dict)  # op name -> backend of this run

    def count_samples(self, samples: int, data_type: DataType) -> None:
        """Record the samples of one micro-step."""
        self.samples_seen += samples
        self.trained_data_record[data_type.value] += samples

    def state_dict(self) -> dict[str, Any]:
        """Return references, not copies: the checkpointer copies before training goes on."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "ema_updates": self.ema.num_updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "seed": self.seed,
            "iteration": self.iteration,
            "samples_seen": self.samples_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "trained_data_record": {**self.trained_data_record, "iteration": self.iteration},
            "kernels": dict(self.kernels),
        }

    def load_state_dict(self, state: Mapping[str, Any], parts: Collection[str] = PARTS) -> None:
        """Take over the named parts of a state dict; the model's weights must fit exactly.

        A file of the original has neither seed nor samples_seen: those keep their values.
        """
        if "model" in parts:
            own = self.model.state_dict()
            weights = {
                name: shard_like(value, own[name]) if name in own else value
                for name, value in state["model"].items()
            }
            self.model.load_state_dict(weights)
            self._load_averages(state if "trainer" in parts else {})
        if "optim" in parts:
            self.optimizer.load_state_dict(state["optimizer"])
        if "scheduler" in parts:
            self.schedule.load_state_dict(state["scheduler"])
        if "trainer" in parts:
            self.iteration = state["iteration"]
            record = state["trained_data_record"]
            self.trained_data_record = {name: record[name] for name in self.trained_data_record}
            for name in ("seed", "samples_seen", "skipped", "skipped_in_a_row"):
                setattr(self, name, state.get(name, getattr(self, name)))

    def _load_averages(self, state: Mapping[str, Any]) -> None:
        """Go on averaging, or start from the parameters where the counts of updates start anew."""
        if self.ema is None:
            return
        averages, updates = state.get("ema"), int(state.get("ema_updates", 0))
        if not averages:
            named = self.model.named_parameters()
            averages = {name.replace(".", "-"): p for name, p in named if p.requires_grad}
            updates = 0
        self.ema.load_state_dict(averages, updates)
