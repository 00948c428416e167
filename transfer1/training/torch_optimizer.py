"""PyTorch's own AdamW behind the interface of `FusedAdamW`, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels import Ops

from .optimizer import trainable_parameters

if TYPE_CHECKING:
    from .ema import EMA


class TorchAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` for float32 parameters; averages take a pass of their own.

    Unlike `FusedAdamW` it writes the scaled gradients back.
    """

    fuses_ema = False

    @property
    def group(self) -> dict[str, Any]:
        """The one parameter group."""
        return self.param_groups[0]

    def master(self, param: Tensor) -> Tensor:
        """The values that updates are applied to: the parameter."""
        return param

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip_coef: Tensor | None = None,
        ema: EMA | None = None,
    ) -> Any:
        """Apply one update; the arguments are those of `FusedAdamW.step`."""
        factors = [factor for factor in (grad_scale, clip_coef) if factor is not None]
        # The attributes are those that torch.amp.GradScaler sets; torch divides by its scale.
        self.grad_scale = (
            1 / torch.stack([f.reshape(()) for f in factors]).prod() if factors else None
        )
        self.found_inf = None if found_inf is None else found_inf.float().reshape(())
        loss = super().step(closure)
        if ema is not None:
            ema.update(self, found_inf)
        return loss


def build_adamw(
    model: nn.Module,
    lr: float = 1e-4,
    weight_decay: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    ops: Ops | None = None,
) -> TorchAdamW:
    """PyTorch's optimizer of all trainable parameters of `model`.

    Args:
        ops: not used, this optimizer has its own kernels.

    Raises:
        ValueError: the model trains nothing, or in lower precision, where torch would keep no
            float32 weights and lose small updates.
    """
    named = trainable_parameters(model)
    for name, param in named:
        if param.dtype != torch.float32:
            raise ValueError(
                f"optimizer=adamw: {name} is {param.dtype}, and torch.optim.AdamW keeps no float32 "
                "masters; set model.precision=float32 or optimizer=fusedadamw"
            )
    rate = torch.tensor(lr, dtype=torch.float32, device=named[0][1].device)
    return TorchAdamW(named, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
