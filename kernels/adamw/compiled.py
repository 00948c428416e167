"""`torch.compile` of the references of `adamw_step` and `grad_norm`, in batches of flat pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.batches import batches, compiled

from . import reference

WRITTEN = (True, False, True, True, True, True)  # params, grads, the two moments, masters, ema


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    ema: list[Tensor | None] | None,
    scalars: reference.StepScalars,
    applied: Tensor | None,
    adam_w_mode: bool,
    keys: Sequence[Tensor] | None,
) -> None:
    if keys is not None:
        raise ValueError(
            "kernels.adamw_step=compile does not round stochastically; set "
            "kernels.adamw_step=reference or triton, or optimizer.master_weights=True"
        )
    absent = [None] * len(params)
    columns = (params, grads, exp_avgs, exp_avg_sqs, masters, ema or absent)
    for is_regular, batch in batches(columns, WRITTEN):
        arguments: list[Any] = list(batch)
        arguments[4] = batch[4] or [None] * len(batch[0])  # masters
        if is_regular:
            compiled(reference.update_lists)(arguments, scalars, applied, adam_w_mode)
        else:
            reference.update_lists(*arguments, scalars, applied, adam_w_mode)  # type: ignore[call-arg]


adamw_step = partial(reference.adamw_step, update=_update)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """As `reference.grad_norm`."""
    reference.check_grad_norm(grads)
    if not grads:
        return torch.zeros(())
    squared: list[Any] = [torch.zeros(1, dtype=torch.float64, device=grads[0].device)]
    for is_regular, batch in batches((grads,), (False,)):
        squared_norms = reference.squared_norms
        squared.append(compiled(squared_norms)(batch) if is_regular else squared_norms(*batch))
    return reference.norm_of(torch.cat(squared))
