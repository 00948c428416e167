"""`torch.compile` of the reference of `ema_update`, in batches of flat pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.batches import batches, compiled
from kernels.checks import Scalar

from . import reference


@torch.no_grad()
def ema_update(shadows: list[Tensor], params: list[Tensor], beta: Scalar) -> None:
    """As `reference.ema_update`."""
    reference.ema_update(shadows, params, beta, average=_average)


def _average(shadows: list[Tensor], params: list[Tensor], beta: Tensor, complement: Tensor) -> None:
    count = len(params)
    profiles = [shadows[start : start + count] for start in range(0, len(shadows), count or 1)]
    written = (False,) + (True,) * len(profiles)
    for is_regular, (sources, *averages) in batches((params, *profiles), written):
        flat = [piece for pieces in averages for piece in pieces]
        if is_regular:
            compiled(reference.average_lists)((flat, sources), beta, complement)
        else:
            reference.average_lists(flat, sources, beta, complement)
