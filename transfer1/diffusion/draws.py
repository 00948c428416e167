"""Random numbers that depend on what they are for, never on who draws them.

Every draw has a key (seed, purpose, iteration, micro-step, index of the sample in the global
batch). The order of draws, the rank, the number of workers and the device do not enter, so a run
can be resumed at any step and laid out over any number of processes with the same numbers.

Letters: B samples of this rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """All random draws of one micro-step.

    Args:
        seed: seed of the run.
        iteration: optimizer update, 0-based.
        micro_step: index within the gradient accumulation of that update.
        samples: index in the global batch of each sample of this rank; None means 0, 1, 2, ...
    """

    def __init__(
        self,
        seed: int,
        iteration: int = 0,
        micro_step: int = 0,
        samples: Sequence[int] | None = None,
    ) -> None:
        self.seed = seed
        self.iteration = iteration
        self.micro_step = micro_step
        self.samples = samples

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 of `shape` [B, ...] on the CPU, each sample from its own key."""
        batch, *rest = shape
        return torch.stack(
            [torch.randn(rest, generator=g) for g in self._per_sample(purpose, batch)]
        )

    def uniform(self, purpose: str, batch: int) -> Tensor:
        """Uniform on [0, 1), float64 [B]."""
        draws = [
            torch.rand((), generator=g, dtype=torch.float64)
            for g in self._per_sample(purpose, batch)
        ]
        return torch.stack(draws)

    def bernoulli(self, purpose: str, probability: float, batch: int) -> Tensor:
        """1 with the given probability, else 0, float32 [B]."""
        return (self.uniform(purpose, batch) < probability).float()

    def coin(self, purpose: str, probability: float) -> bool:
        """True with the given probability; one draw for the whole batch."""
        return bool(self.uniform_once(purpose, 1)[0] < probability)

    def integer(self, purpose: str, low: int, high: int) -> int:
        """An integer in [low, high); one draw for the whole batch."""
        return int(torch.randint(low, high, (), generator=self._generator(purpose)))

    def uniform_once(self, purpose: str, count: int) -> Tensor:
        """Uniform on [0, 1), float32 [count]; one draw for the whole batch."""
        return torch.rand(count, generator=self._generator(purpose))

    def _per_sample(self, purpose: str, batch: int) -> list[torch.Generator]:
        samples = range(batch) if self.samples is None else self.samples
        if len(samples) != batch:
            raise ValueError(
                f"{purpose}: a draw for {batch} samples, but the batch holds {len(samples)}"
            )
        return [self._generator(purpose, sample) for sample in samples]

    def _generator(self, purpose: str, sample: int | None = None) -> torch.Generator:
        return keyed_generator(self.seed, purpose, self.iteration, self.micro_step, sample)


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator whose state depends on the printed form of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
