"""The order of training samples."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from transfer1.data.sampler import SampleKey, StreamSampler, keyed_rng


def dataset(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def test_every_epoch_is_a_permutation() -> None:
    keys = list(islice(StreamSampler(dataset(7)), 28))
    assert [key.position for key in keys] == list(range(28))
    epochs = [[key.index for key in keys[start : start + 7]] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("position", [0, 3, 7, 20])
def test_resumes_anywhere(position: int) -> None:
    straight, resumed = StreamSampler(dataset(7)), StreamSampler(dataset(7))
    straight.start(seed=3, position=0)
    resumed.start(seed=3, position=position)
    expected = list(islice(straight, 30))[position:]
    assert list(islice(resumed, 30 - position)) == expected
    assert expected[0].seed == 3


def test_seeds_differ_and_order_can_be_kept() -> None:
    first, second = StreamSampler(dataset(50)), StreamSampler(dataset(50))
    second.start(seed=1, position=0)
    assert [k.index for k in islice(first, 50)] != [k.index for k in islice(second, 50)]
    ordered = StreamSampler(dataset(3), shuffle=False)
    assert list(islice(ordered, 4)) == [SampleKey(i % 3, 0, i) for i in range(4)]


def test_keyed_draws_differ_by_every_part_of_the_key() -> None:
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    draws = [keyed_rng(*key).random() for key in keys]
    assert len(set(draws)) == 4
    assert draws == [keyed_rng(*key).random() for key in keys]
    assert isinstance(keyed_rng(2**40, 2**40, "a"), np.random.Generator)


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match="the dataset is empty"):
        StreamSampler(dataset(0))
    with pytest.raises(ValueError, match="has no length"):
        StreamSampler(Dataset())
    with pytest.raises(ValueError, match="position=-1; give 0 or more"):
        StreamSampler(dataset(3)).start(seed=0, position=-1)
