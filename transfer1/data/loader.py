"""The loader of a dataset: an endless stream for training, one ordered pass for validation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from transfer1.data.sampler import StreamSampler


def build_dataloader(
    dataset: Dataset[dict[str, Any]],
    stream: bool = True,
    shuffle: bool = True,
    batch_size: int = 1,
    num_workers: int = 8,
    prefetch_factor: int = 2,
    pin_memory: bool = True,
    drop_last: bool = True,
) -> DataLoader[dict[str, Any]]:
    """Wrap a dataset; the loader's `sampler` is the `StreamSampler` of a stream.

    Args:
        dataset: takes `SampleKey` when streamed, indices otherwise.
        stream: endless, epoch after epoch, resumable by `loader.sampler.start(seed, position)`;
            False gives each item once, in order.
        shuffle: permute each epoch of a stream.
        batch_size: samples per batch.
        num_workers: processes that load; 0 loads in this one. The data does not depend on it.
        prefetch_factor: batches that each worker prepares ahead.
        pin_memory: page-locked batches, where there is a GPU to copy to.
        drop_last: leave out a last, smaller batch.
    """
    if num_workers:
        import cv2  # slow to import, and whoever composes a configuration imports this module

        # Workers share the cores. Said before they are forked: afterwards OpenCV would wait for
        # threads that only the parent has.
        cv2.setNumThreads(1)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=StreamSampler(dataset, shuffle) if stream else None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        drop_last=drop_last and stream,
    )
