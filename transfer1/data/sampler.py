"""The order of training samples, reproducible and resumable at any position."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler


class SampleKey(NamedTuple):
    """Which item to load, and the key of its random draws.

    Attributes:
        index: item of the dataset.
        seed: seed of the run.
        position: number of samples before this one in the whole run.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a key
    seed: int
    position: int


def keyed_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Return the generator of one purpose at one position: the same in any process and order."""
    return np.random.default_rng([seed, position, zlib.crc32(purpose.encode())])


class StreamSampler(Sampler[SampleKey]):
    """An endless stream of `SampleKey`: epoch after epoch, each a permutation of the dataset.

    The stream is a pure function of (dataset size, seed): `start(seed, position)` continues it
    anywhere. Position p belongs to epoch p // len(dataset).
    """

    def __init__(self, dataset: Dataset[Any], shuffle: bool = True) -> None:
        if not isinstance(dataset, Sized):
            raise ValueError("StreamSampler: the dataset has no length; give a map-style dataset")
        if len(dataset) == 0:
            raise ValueError("StreamSampler: the dataset is empty; there is nothing to sample")
        self.size = len(dataset)
        self.shuffle = shuffle
        self.start(seed=0, position=0)

    def start(
        self, seed: int, position: int, replica: int = 0, replicas: int = 1, batch_size: int = 1
    ) -> None:
        """Set the seed and the position at which the next iteration begins.

        Of several replicas each gets `batch_size` samples of every `replicas * batch_size`, so that
        together they see what one sees that takes them all.

        Args:
            seed: seed of the run.
            position: number of samples that all replicas together have had.
            replica: which of them this is.
            replicas: how many there are.
            batch_size: samples per batch of one replica.
        """
        if position < 0:
            raise ValueError(f"StreamSampler.start: position={position}; give 0 or more")
        self.seed, self.position = seed, position
        self._first, self._global_batch = replica * batch_size, replicas * batch_size
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, order = -1, np.empty(0)
        for batch in itertools.count(self.position + self._first, self._global_batch):
            for position in range(batch, batch + self._batch_size):
                if epoch != position // self.size:
                    epoch = position // self.size
                    order = self._order(epoch)
                yield SampleKey(int(order[position % self.size]), self.seed, position)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return keyed_rng(self.seed, epoch, "order of epoch").permutation(self.size)
