"""AdamW with float32 masters whose whole step, moving average included, is one op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels import Ops, select
from kernels.adamw.bfloat16 import join, split

from .optimizer_state import MOMENTS, check_saved_group, check_saved_state, refuse, saved_step
from .shards import local, local_gradient, local_master, shard_like, with_local

if TYPE_CHECKING:
    from .ema import EMA

OPTIONS = (
    "adam_w_mode",
    "master_weights",
    "master_remainder",
    "stochastic_rounding",
    "rounding_seed",
    "set_grad_none",
    "ops",
)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW as `kernels.adamw.reference.adamw_step` defines it.

    Takes the place of `torch.optim.AdamW` and knows the arguments of apex's `FusedAdam`. Everything
    a step needs stays on the device of the parameters: in a group the learning rate (`lr`, a scalar
    tensor) and the number of applied updates (`step`, int32 [1]), per parameter `exp_avg` and
    `exp_avg_sq` (float32) and, for bfloat16 and float16 parameters, `master` (float32) or
    `remainder` (int16). Only parameters that received a gradient have state. DTensor parameters are
    updated shard by shard.

    Saved states hold float32 masters, however they are kept here, and the step of each parameter as
    `torch.optim.AdamW` does: either loads the other's.

    Args:
        params: parameters, pairs of name and parameter, or groups of them.
        lr: learning rate.
        betas, eps, weight_decay: see `kernels.adamw.reference.adamw_step`.
        amsgrad, maximize, differentiable: as in `torch.optim.AdamW`; only False is supported.
        bias_correction: divide the moments by 1 - beta^step.
        adam_w_mode: decoupled weight decay; False adds it to the gradient (L2).
        master_weights: keep float32 masters of parameters in lower precision.
        master_remainder: keep of a bfloat16 parameter's master only the 16 bits it lacks.
        stochastic_rounding: no masters at all, bfloat16 parameters are rounded at random.
        rounding_seed: of stochastic rounding.
        set_grad_none: what `zero_grad` does by default.
        capturable, foreach, fused: taken for code written for the others; all steps are capturable,
            and `ops` says how they run.
        ops: the chosen kernels; None stands for the references.

    Raises:
        ValueError: a hyperparameter is out of range, options exclude each other, or parameters of
            one group lie on several devices.
    """

    # torch.amp.GradScaler then sets the attributes `grad_scale` and `found_inf` around a step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        master_weights: bool = True,
        master_remainder: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        set_grad_none: bool = True,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = True,
        foreach: bool | None = None,
        fused: bool | None = None,
        ops: Ops | None = None,
    ) -> None:
        refuse(amsgrad=amsgrad, maximize=maximize, differentiable=differentiable)
        if stochastic_rounding and (master_weights or master_remainder):
            raise ValueError(
                "optimizer.stochastic_rounding=True works without masters: set "
                "optimizer.master_weights=False and optimizer.master_remainder=False"
            )
        if master_remainder and not master_weights:
            raise ValueError(
                "optimizer.master_remainder=True keeps masters, but optimizer.master_weights=False"
            )
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.master_remainder = master_remainder
        self.stochastic_rounding = stochastic_rounding
        self.rounding_seed = rounding_seed
        self.set_grad_none = set_grad_none
        self.ops = ops or select("reference")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @property
    def group(self) -> dict[str, Any]:
        """The first parameter group; `build_optimizer` makes only one."""
        return self.param_groups[0]

    @property
    def fuses_ema(self) -> bool:
        """Whether `step` may update averages in its own pass: both ops run on one backend."""
        return self.ops.table["adamw_step"] == self.ops.table["ema_update"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its learning rate and step count go to the device of its parameters.

        Raises:
            ValueError: a hyperparameter is out of range, or the parameters lie on several devices.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        device = group["params"][0].device if group["params"] else None
        group["betas"] = tuple(float(beta) for beta in group["betas"])
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).reshape(())
        group["step"] = torch.zeros(1, dtype=torch.int32, device=device)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients, or set them to zero; `set_grad_none` says which by default."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def master(self, param: Tensor) -> Tensor:
        """The float32 values that updates are applied to; the parameter itself if it has no other.

        Made from the remainder where that is what is kept.
        """
        state = self.state.get(param, {})
        if "remainder" in state:
            joined = join(local(param.detach()), local(state["remainder"]))
            return with_local(joined, param)
        return state.get("master", param)

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
        """Apply one update, and the moving average of its result if `ema` is given.

        Args:
            closure: evaluates the model again and returns the loss.
            grad_scale: factor on the gradients, the inverse of the loss scale; one element.
            found_inf: one element; where not 0, the update is skipped: parameters, moments,
                averages and the counters of updates stay.
            clip_coef: factor on the gradients from clipping; one element.
            ema: averages to update in the same pass; those of parameters without gradient too.

        Returns:
            what `closure` returned.

        Raises:
            ValueError: a gradient is sparse, or a parameter has no way to keep small updates.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        loss_scale: Tensor | None = getattr(self, "grad_scale", None)
        if loss_scale is not None:
            grad_scale = 1 / loss_scale
        found_inf = getattr(self, "found_inf", found_inf)
        averaged: set[Tensor] = set()
        for group in self.param_groups:
            averaged |= self._step_group(group, grad_scale, found_inf, clip_coef, ema)
        if ema is not None:
            ema.update(self, found_inf, done=averaged)
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip_coef: Tensor | None,
        ema: EMA | None,
    ) -> set[Tensor]:
        """Update one group and return the parameters whose averages are done."""
        params = [param for param in group["params"] if param.grad is not None]
        states = [self.state.get(param) or self._new_state(param) for param in params]
        shadows = None if ema is None else [ema.shadow(param) for param in params]
        number = group["step"] + (1 if found_inf is None else (found_inf == 0).reshape(1))
        self.ops.adamw_step(
            [local(param) for param in params],
            [local_gradient(param) for param in params],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [local_master(state) for state in states],
            None if shadows is None else [s if s is None else local(s) for s in shadows],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=number,
            grad_scale=grad_scale,
            found_inf=found_inf,
            clip_coef=clip_coef,
            ema_beta=None if ema is None else ema.beta(),
            adam_w_mode=self.adam_w_mode,
            bias_correction=group["bias_correction"],
            rounding_seed=self.rounding_seed if self.stochastic_rounding else None,
        )
        self.state.update(zip(params, states, strict=True))
        group["step"].copy_(number)
        return set(params) if ema is not None else set()

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.AdamW`, with float32 masters beside the moments; see the class."""
        packed = super().state_dict()
        params = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        steps = {
            index: group["step"].float().reshape(())
            for group in packed["param_groups"]
            for index in group["params"]
        }
        packed["state"] = {
            index: self._portable(params[index], steps[index]) for index in packed["state"]
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state bit for bit: ours, that of `torch.optim.AdamW`, or one of the original.

        Masters that are not in the state are taken from the parameters, so load the model first.

        Raises:
            ValueError: groups, number of parameters, names, shapes or options do not fit.
        """
        loaded = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            loaded = pre_hook(self, loaded) or loaded
        saved_groups = loaded["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the optimizer state holds {len(saved_groups)} groups, "
                f"this optimizer {len(self.param_groups)}"
            )
        pairs = list(zip(saved_groups, self.param_groups, strict=True))
        for saved, group in pairs:
            check_saved_group(saved, group)
        params = {
            index: param
            for saved, group in pairs
            for index, param in zip(saved["params"], group["params"], strict=True)
        }
        steps = [saved_step(saved, loaded["state"]) for saved in saved_groups]
        for index, tensors in loaded["state"].items():
            check_saved_state(index, tensors, params[index].shape)
        self.state.clear()
        for index, tensors in loaded["state"].items():
            self.state[params[index]] = self._restored(params[index], tensors)
        for (saved, group), step in zip(pairs, steps, strict=True):
            group["lr"].copy_(torch.as_tensor(saved["lr"]).reshape(()))
            group["step"].copy_(step)
            group["betas"] = tuple(float(beta) for beta in saved["betas"])
            for name in ("weight_decay", "eps", "bias_correction", "initial_lr"):
                if name in saved:
                    group[name] = saved[name]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs; the base class leaves out what it does not know."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OPTIONS}}

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        state = {name: torch.zeros_like(param, dtype=torch.float32) for name in MOMENTS}
        if param.dtype == torch.float32 or not self.master_weights:
            return state
        if self.master_remainder and param.dtype == torch.bfloat16:
            state["remainder"] = torch.zeros_like(param, dtype=torch.int16)
        else:
            state["master"] = param.detach().float()
        return state

    def _portable(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        state = {**self.state[param], "step": step.clone()}
        if state.pop("remainder", None) is not None:
            state["master"] = self.master(param)
        return state

    def _restored(self, param: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        state = self._new_state(param)
        for name in state.keys() & tensors.keys():
            state[name].copy_(shard_like(tensors[name], param))
        if "remainder" in state and "master" in tensors:
            master = shard_like(tensors["master"].to(param.device), param)
            upper, lower = split(local(master))
            local(param).copy_(upper)
            local(state["remainder"]).copy_(lower)
        return state


def build_optimizer(
    model: nn.Module,
    lr: float = 1e-4,
    weight_decay: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    master_weights: bool = True,
    master_remainder: bool = False,
    stochastic_rounding: bool = False,
    capturable: bool = True,
    ops: Ops | None = None,
) -> FusedAdamW:
    """Optimizer of all trainable parameters of `model`, weight decay on all of them.

    Raises:
        ValueError: the model trains nothing, or `capturable` is False.
    """
    if not capturable:
        raise ValueError(
            "optimizer.capturable=false: the step count and the learning rate always stay on the "
            "device, which costs nothing; leave it true"
        )
    return FusedAdamW(
        trainable_parameters(model),
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        master_weights=master_weights,
        master_remainder=master_remainder,
        stochastic_rounding=stochastic_rounding,
        ops=ops,
    )


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and trainable parameters: matrices first, then vectors and scalars, as in the original.

    Raises:
        ValueError: there are none.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    matrices = [pair for pair in trainable if pair[1].ndim >= 2]
    return matrices + [pair for pair in trainable if pair[1].ndim < 2]


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings gradients of this norm down to `max_norm`, at most 1; scalar tensor."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _check_group(group: Mapping[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if group[name] < 0:
            raise ValueError(f"optimizer.{name}={group[name]}: must not be negative")
    if group["eps"] <= 0:
        raise ValueError(
            f"optimizer.eps={group['eps']}: must be positive; a zero gradient divides by it"
        )
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(
            f"optimizer.betas={tuple(group['betas'])}: two numbers, each must lie in [0, 1)"
        )
    devices = {param.device: index for index, param in enumerate(group["params"])}
    if len(devices) > 1:
        places = ", ".join(f"parameter {index} on {device}" for device, index in devices.items())
        raise ValueError(f"parameters of one group lie on several devices ({places}): split it")
