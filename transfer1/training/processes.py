"""The processes of a run: who they are, what they agree on, which samples are whose.

Started by torchrun, a run has RANK, WORLD_SIZE and LOCAL_RANK in its environment; alone it has none
of them. One process, the main one, writes files and logs; all of them do the same work in step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process among those of a run.

    Attributes:
        rank: its number.
        size: how many there are.
        sharing: so many neighbouring ranks work on the same samples.
    """

    rank: int = 0
    size: int = 1
    sharing: int = 1

    @classmethod
    def from_environment(cls, sharing: int = 1) -> Processes:
        """The process as torchrun has started it, or the only one."""
        rank, size = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
        return cls(rank, size, sharing)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Which part of every global batch this process works on."""
        return self.rank // self.sharing

    @property
    def replicas(self) -> int:
        """How many parts a global batch has."""
        return self.size // self.sharing

    @contextmanager
    def connected(self, device: torch.device, alone: bool = False) -> Iterator[None]:
        """Connect the processes; a connection that exists is used and stays.

        Args:
            device: where the tensors lie. Tensors of the host can be exchanged as well.
            alone: make a group even of a single process, for code that needs one.
        """
        if dist.is_initialized() or (self.size == 1 and not alone):
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if self.size == 1 else None  # type: ignore[attr-defined]
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, store=store)
        # Not after an error: the others may wait for this process, and torchrun ends them.
        yield
        dist.destroy_process_group()

    def from_main(self, value: T) -> T:
        """The value that the main process has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def largest(self, value: int) -> int:
        """The largest of the values of all processes; the device is not waited for."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over all processes of scalars, float32 []."""
        if self.size == 1:
            return dict(values)
        row = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        dist.all_reduce(row)
        return dict(zip(values, row / self.size, strict=True))

    def samples(self, batch_size: int | None) -> range | None:
        """Indices in the global batch of the samples of this process; None where it has all."""
        if self.replicas == 1 or batch_size is None:
            return None
        return range(self.replica * batch_size, (self.replica + 1) * batch_size)

    def start_stream(self, loader: Any, seed: int, position: int) -> bool:
        """Set the sampler of a loader to this process's samples from a position of the stream.

        Returns:
            whether the sampler can do that.

        Raises:
            ValueError: it cannot, and several processes would load the same samples.
        """
        start = getattr(getattr(loader, "sampler", None), "start", None)
        if start is not None and self.replicas == 1:
            start(seed, position)
        elif start is not None:
            start(seed, position, self.replica, self.replicas, loader.batch_size)
        elif self.replicas > 1:
            raise ValueError(
                f"the sampler of dataloader_train has no start(): {self.replicas} processes would "
                "train on the same samples; use transfer1.data.sampler.StreamSampler"
            )
        return start is not None
