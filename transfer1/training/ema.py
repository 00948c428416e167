"""Exponential moving averages of the trainable parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from kernels import Ops, select

from .optimizer import FusedAdamW
from .shards import local, shard_like
from .torch_optimizer import TorchAdamW

Optimizer = FusedAdamW | TorchAdamW


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

    @torch.no_grad()
    def update(
        self,
        optimizer: Optimizer | None = None,
        found_inf: Tensor | None = None,
        done: Collection[Tensor] = (),
    ) -> None:
        """Average the current parameters in and count the update.

        Args:
            optimizer: where it has float32 masters, those are averaged.
            found_inf: one element; where not 0, averages and counter stay.
            done: parameters whose averages the optimizer has updated in its own pass.
        """
        rest = [param for param in self.parameters if param not in done]
        sources = [p if optimizer is None else optimizer.master(p) for p in rest]
        beta = self.beta()
        applied: Tensor | int = 1
        if found_inf is not None:
            applied = (found_inf == 0).reshape(1)
            beta = torch.where(applied.reshape(()), beta, 1.0)
        shadows = [self.shadows_by_parameter[param] for param in rest]
        self.ops.ema_update([local(s) for s in shadows], [local(s) for s in sources], beta)
        self.num_updates += applied

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
            shadow.copy_(shard_like(state[name], shadow))
        self.num_updates.copy_(torch.as_tensor(num_updates).reshape(1))

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
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


def build_constant_ema(
    model: nn.Module,
    enabled: bool = True,
    rate: float | Sequence[float] = 0.9999,
    num: int = 1,
    rank: int = 0,
    ops: Ops | None = None,
) -> ConstantEMA | None:
    """The `ConstantEMA` of a model, or None if averages are switched off."""
    return ConstantEMA(model, rate, num, rank, ops) if enabled else None


@torch.no_grad()
def update_average(
    source: nn.Module, target: nn.Module, beta: float | Tensor, ops: Ops | None = None
) -> None:
    """Average all parameters of `source` into those of `target`, a model of the same structure.

    For sharded models: each process averages its own shards, and no names are looked at. The
    original's `FastEmaModelUpdater`.

    Args:
        beta: weight of the old average, a number or a tensor of one element.

    Raises:
        ValueError: the models differ in number, shapes or names of their parameters, or those of
            `target` are not float32.
    """
    sources, targets = dict(source.named_parameters()), dict(target.named_parameters())
    if sources.keys() != targets.keys():
        raise ValueError(
            f"the models differ: only one of them has {sorted(sources.keys() ^ targets.keys())[:5]}"
        )
    (ops or select("reference")).ema_update(
        [local(targets[name]) for name in sources], [local(p) for p in sources.values()], beta
    )
