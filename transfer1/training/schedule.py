"""Learning-rate schedules: multipliers as functions of the number of updates, and their driver.

Multipliers take a number or a tensor on any device, so that the driver can evaluate them beside the
optimizer's counters: a skipped update is then counted by nobody, without waiting for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .ema import Optimizer

Multiplier = Callable[[int | Tensor], Tensor]


class Cycles:
    """Warm-up and decay in cycles; update n belongs to the first cycle whose cumulated length >= n.

    Args:
        warm_up_steps: per cycle, updates of linear warm-up from f_start to f_max.
        cycle_lengths: per cycle, updates in all.
        f_start, f_max, f_min: per cycle, the multiplier at its start, after warm-up and at its end.

    Raises:
        ValueError: the lists differ in length or are empty, or a warm-up fills its cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        cycle_lengths: Sequence[int],
        f_start: Sequence[float],
        f_max: Sequence[float],
        f_min: Sequence[float],
    ) -> None:
        columns = (warm_up_steps, cycle_lengths, f_start, f_max, f_min)
        counts = [len(column) for column in columns]
        if len(set(counts)) != 1 or counts[0] == 0:
            raise ValueError(
                "scheduler: warm_up_steps, cycle_lengths, f_start, f_max and f_min need one entry "
                f"per cycle each, got {counts} entries"
            )
        for index, (warm_up, length) in enumerate(zip(warm_up_steps, cycle_lengths, strict=True)):
            if not 0 <= warm_up < length:
                raise ValueError(
                    f"scheduler.warm_up_steps[{index}]={warm_up}: must be at least 0 and less than "
                    f"cycle_lengths[{index}]={length}"
                )
        ends = list(itertools.accumulate(cycle_lengths))
        self.last = ends[-1]  # the last update that has a multiplier
        self.table = torch.tensor([ends, *map(list, columns)], dtype=torch.float64)

    def __call__(self, n: int | Tensor) -> Tensor:
        """Multiplier of update n (0-based), float64 [] on the device of n.

        Raises:
            ValueError: a plain number beyond the last cycle. (A tensor there stays in that cycle:
                looking at it would wait for the device. `Schedule` counts on the host as well.)
        """
        if not isinstance(n, Tensor) and n > self.last:
            raise ValueError(
                f"the schedule ends after update {self.last}, update {n} has no learning rate; "
                "extend scheduler.cycle_lengths"
            )
        n = torch.as_tensor(n, dtype=torch.float64)
        table = self.table.to(n.device)
        cycle = torch.searchsorted(table[0], n).clamp(max=table.shape[1] - 1)
        end, warm_up, length, f_start, f_max, f_min = table[:, cycle]
        in_cycle = n - (end - length)
        rising = f_start + (f_max - f_start) * in_cycle / warm_up.clamp(min=1)
        falling = self.decay((in_cycle - warm_up) / (length - warm_up), f_max, f_min)
        return torch.where(in_cycle < warm_up, rising, falling)

    def decay(self, progress: Tensor, f_max: Tensor, f_min: Tensor) -> Tensor:
        """Multiplier at `progress` 0 (end of warm-up) to 1 (end of the cycle)."""
        raise NotImplementedError


class LambdaLinear(Cycles):
    """Linear decay from f_max to f_min after the warm-up of each cycle."""

    def decay(self, progress: Tensor, f_max: Tensor, f_min: Tensor) -> Tensor:
        """See the class."""
        return f_min + (f_max - f_min) * (1 - progress)


class LambdaWarmUpCosine(Cycles):
    """Half a cosine from f_max to f_min after the warm-up of each cycle."""

    def decay(self, progress: Tensor, f_max: Tensor, f_min: Tensor) -> Tensor:
        """See the class."""
        return f_min + 0.5 * (f_max - f_min) * (1 + torch.cos(math.pi * progress.clamp(max=1.0)))


class TeroPoly:
    """Inverse power of the samples seen, with ramps; samples count in millions (Mimg).

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", eq. 67.

    Args:
        total_Mimg: length of the training; only the ramp down needs it.
        batch_size: samples per update over all ranks.
        ref_Mimg: samples after which the multiplier falls below 1; None = ref_batches batches.
        ref_batches: see ref_Mimg.
        max_lr_ratio: upper bound of the multiplier before the ramps; None = no bound.
        min_lr_ratio: lower bound of the multiplier before the ramps; None = no bound.
        rampup_Mimg: samples of linear rise from 0; 0 = none.
        rampdown_Mimg: samples at the end of linear fall to 0; 0 = none.
        formula: "poly" or "constant" (the ramps and bounds alone).
        poly_exp: exponent of the fall.
    """

    def __init__(
        self,
        total_Mimg: float,
        batch_size: int,
        ref_Mimg: float | None = None,
        ref_batches: float = 70e3 / 1024,
        max_lr_ratio: float | None = 1.0,
        min_lr_ratio: float | None = None,
        rampup_Mimg: float = 0.0,
        rampdown_Mimg: float = 0.0,
        formula: str = "poly",
        poly_exp: float = 0.5,
    ) -> None:
        if formula not in ("poly", "constant"):
            raise ValueError(f"scheduler.formula={formula}: choose poly or constant")
        self.total_Mimg = total_Mimg
        self.batch_size = batch_size
        self.ref_Mimg = ref_batches * batch_size / 1e6 if ref_Mimg is None else ref_Mimg
        self.bounds = (min_lr_ratio, max_lr_ratio)
        self.rampup_Mimg = rampup_Mimg
        self.rampdown_Mimg = rampdown_Mimg
        self.exponent = poly_exp if formula == "poly" else 0.0

    def __call__(self, n: int | Tensor) -> Tensor:
        """Multiplier of update n (0-based), float64 []."""
        return self.at_samples(n * self.batch_size)

    def at_samples(self, samples: int | Tensor) -> Tensor:
        """Multiplier after this many samples, float64 [] on their device."""
        seen_Mimg = torch.as_tensor(samples, dtype=torch.float64) / 1e6
        factor = (seen_Mimg / self.ref_Mimg).clamp(min=1e-8) ** -self.exponent
        lowest, highest = self.bounds
        if highest is not None:
            factor = factor.clamp(max=highest)
        if lowest is not None:
            factor = factor.clamp(min=lowest)
        if self.rampup_Mimg > 0:
            factor = factor * (seen_Mimg / self.rampup_Mimg).clamp(max=1.0)
        if self.rampdown_Mimg > 0:
            remaining = (self.total_Mimg - seen_Mimg) / self.rampdown_Mimg
            factor = factor * remaining.clamp(min=0.0, max=1.0)
        return factor


class Schedule:
    """Sets the learning rates of an optimizer before each update: base rate x multiplier(updates).

    Args:
        optimizer: the learning rate that a group was built with is its base rate.
        multiplier: function of the number of applied updates.
    """

    def __init__(self, optimizer: Optimizer, multiplier: Multiplier) -> None:
        self.groups = optimizer.param_groups
        self.multiplier = multiplier
        self.base_lrs = [
            float(group.setdefault("initial_lr", float(group["lr"]))) for group in self.groups
        ]
        self.count = torch.zeros((), dtype=torch.int64, device=self.groups[0]["lr"].device)
        self.calls = 0  # upper bound of `count` that the host knows
        self._set_lr()

    def step(self, found_inf: Tensor | None = None) -> None:
        """Go on to the next update; stay where `found_inf` is not 0 and the update was skipped.

        Raises:
            ValueError: the schedule has ended.
        """
        self.count += 1 if found_inf is None else (found_inf == 0).reshape(())
        self.calls += 1
        if self.calls > getattr(self.multiplier, "last", math.inf):
            self.calls = int(self.count)
            self.multiplier(self.calls)
        self._set_lr()

    def state_dict(self) -> dict[str, Any]:
        """Position and rates under the names of `torch.optim.lr_scheduler.LambdaLR`."""
        return {
            "last_epoch": int(self.count),
            "base_lrs": list(self.base_lrs),
            "_last_lr": [float(group["lr"]) for group in self.groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at `last_epoch`, with the saved base rate if there is one."""
        if "base_lrs" in state:
            self.base_lrs = [float(rate) for rate in state["base_lrs"]]
        self.calls = int(state["last_epoch"])
        self.count.fill_(self.calls)
        self._set_lr()

    def _set_lr(self) -> None:
        factor = self.multiplier(self.count)
        for group, base_lr in zip(self.groups, self.base_lrs, strict=True):
            group["lr"].copy_(base_lr * factor)
