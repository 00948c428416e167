"""Exponential moving averages of the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kernels import Ops, select

from .optimizer import FusedAdamW


class EMA:
    """float32 averages ("shadows") of the trainable parameters of a model.

    Attributes:
        shadows: parameter name, "." written as "-", -> float32 average.
        num_updates: int32 [1] on the device of the parameters, updates applied so far. An update
            that the optimizer skipped does not count.
    """

    def __init__(self, model: nn.Module, ops: Ops | None = None) -> None:
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("the model has no trainable parameter to average")
        self.parameters: list[Tensor] = list(trainable.values())
        self.shadows = {
            name.replace(".", "-"): param.detach().float().clone()
            for name, param in trainable.items()
        }
        self.shadows_by_parameter = dict(zip(self.parameters, self.shadows.values(), strict=True))
        self.num_updates = torch.zeros(1, dtype=torch.int32, device=self.parameters[0].device)
        self.ops = ops or select("reference")

    def beta(self) -> Tensor:
        """Weight of the old average in the next update, float64 [] on the device."""
        raise NotImplementedError

    def shadow(self, param: Tensor) -> Tensor | None:
        """The average of one parameter; None if it is not averaged."""
        return self.shadows_by_parameter.get(param)

    def update(self, optimizer: FusedAdamW | None = None) -> None:
        """Average the current parameters in, their float32 masters where `optimizer` has them."""
        sources = [p if optimizer is None else optimizer.master(p) for p in self.parameters]
        self.ops.ema_update(list(self.shadows.values()), sources, self.beta())
        self.num_updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name: the layout of the original; `num_updates` is saved beside it."""
        return dict(self.shadows)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int | Tensor) -> None:
        """Restore averages and their number of updates.

        Raises:
            ValueError: names or shapes differ from the trainable parameters of the model.
        """
        missing, unexpected = self.shadows.keys() - state.keys(), state.keys() - self.shadows.keys()
        if missing or unexpected:
            raise ValueError(
                f"EMA state does not fit the trainable parameters: missing {sorted(missing)[:5]}, "
                f"unexpected {sorted(unexpected)[:5]} ({len(missing)} and {len(unexpected)} in all)"
            )
        for name, shadow in self.shadows.items():
            if state[name].shape != shadow.shape:
                raise ValueError(
                    f"EMA state {name} has shape {tuple(state[name].shape)}, "
                    f"the parameter {tuple(shadow.shape)}"
                )
            shadow.copy_(state[name])
        self.num_updates.copy_(torch.as_tensor(num_updates).reshape(1))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """During a `with` block the averages are in the model; then it is restored exactly."""
        saved = [param.detach().clone() for param in self.parameters]
        try:
            self._write(list(self.shadows.values()))
            yield
        finally:
            self._write(saved)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for param, value in zip(self.parameters, values, strict=True):
            param.copy_(value)


class PowerEMA(EMA):
    """Average with a power-law profile: its width is a fixed fraction of the training so far.

    beta_t = (1 - 1 / (t + 1))^(gamma + 1) with t updates applied before this one; beta_0 = 0, so
    the first update copies. Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models", section 3.

    Args:
        rate: standard deviation of the profile relative to its length, of rank 0.
        num: ranks k < num use rate / 2^k, so that one run gives several widths; others use `rate`.
        rank: data-parallel rank.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float = 0.1,
        num: int = 3,
        rank: int = 0,
        ops: Ops | None = None,
    ) -> None:
        super().__init__(model, ops)
        self.exponent = power_exponent(rate / 2**rank if rank < num else rate)

    def beta(self) -> Tensor:
        """See the class; float64 []."""
        updates = self.num_updates.double().reshape(())
        return (updates / (updates + 1)) ** (self.exponent + 1)


class ConstantEMA(EMA):
    """Average with a fixed beta.

    Args:
        rate: beta, or one beta per rank.
        num: ranks k < num use the k-th of several rates, others the first.
        rank: data-parallel rank.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float | Sequence[float] = 0.9999,
        num: int = 1,
        rank: int = 0,
        ops: Ops | None = None,
    ) -> None:
        super().__init__(model, ops)
        rates = [rate] if isinstance(rate, float) else list(rate)
        self.rate = rates[rank] if rank < min(num, len(rates)) else rates[0]
        if not 0 <= self.rate < 1:
            raise ValueError(f"model.ema.rate={self.rate}: a constant beta must lie in [0, 1)")

    def beta(self) -> Tensor:
        """The fixed rate; float64 []."""
        return torch.full((), self.rate, dtype=torch.float64, device=self.num_updates.device)


def power_exponent(relative_width: float) -> float:
    """Exponent gamma of the power profile whose relative standard deviation is `relative_width`.

    The largest real part among the roots of x^3 + 7x^2 + (16 - s^-2) x + (12 - s^-2).

    Raises:
        ValueError: the width is not positive, or so large that beta is not defined (gamma <= -1).
    """
    if relative_width <= 0:
        raise ValueError(f"model.ema.rate={relative_width}: must be positive")
    inverse = relative_width**-2
    exponent = float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
    if exponent <= -1:
        raise ValueError(
            f"model.ema.rate={relative_width}: too wide, gamma is {exponent:.3f} <= -1"
        )
    return exponent


def build_power_ema(
    model: nn.Module,
    enabled: bool = True,
    rate: float = 0.1,
    num: int = 3,
    rank: int = 0,
    ops: Ops | None = None,
) -> PowerEMA | None:
    """The `PowerEMA` of a model, or None if averages are switched off."""
    return PowerEMA(model, rate, num, rank, ops) if enabled else None
