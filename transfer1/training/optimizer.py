"""AdamW with float32 masters whose whole step, moving average included, is one op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels import Ops, select

if TYPE_CHECKING:
    from .ema import EMA


class FusedAdamW(torch.optim.Optimizer):
    """AdamW as `kernels.adamw.reference.adamw_step` defines it, over one parameter group.

    Everything a step needs stays on the device of the parameters: the learning rate (`lr`, a scalar
    tensor) and the number of applied updates (`step`, int32 [1]) in the group, and per parameter
    `exp_avg`, `exp_avg_sq` and, for bfloat16 and float16 parameters, `master` (all float32). Only
    parameters that received a gradient have state. Weight decay applies to all parameters.

    Args:
        params: parameters, or pairs of name and parameter.
        lr: learning rate of a multiplier of 1.
        bias_correction: divide the moments by 1 - beta^step.
        adam_w_mode: decoupled weight decay; False adds it to the gradient (L2).
        master_weights: keep float32 masters of parameters in lower precision.
        ops: the chosen kernels; None stands for the references.

    Raises:
        ValueError: a hyperparameter is out of range, or there are several groups or no parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        master_weights: bool = True,
        ops: Ops | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"optimizer.{name}={value}: must not be negative")
        if eps <= 0:
            raise ValueError(
                f"optimizer.eps={eps}: must be positive; a zero gradient divides by it"
            )
        betas = (float(betas[0]), float(betas[1]))
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optimizer.betas={betas}: each must lie in [0, 1)")
        hyperparameters = {
            "lr": lr,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, hyperparameters)
        if len(self.param_groups) != 1:
            raise ValueError(f"FusedAdamW takes one parameter group, got {len(self.param_groups)}")
        device = self.group["params"][0].device
        self.group["lr"] = torch.tensor(float(lr), dtype=torch.float32, device=device)
        self.group["step"] = torch.zeros(1, dtype=torch.int32, device=device)
        self.adam_w_mode = adam_w_mode
        self.master_weights = master_weights
        self.ops = ops or select("reference")

    @property
    def group(self) -> dict[str, Any]:
        """The one parameter group."""
        return self.param_groups[0]

    def master(self, param: Tensor) -> Tensor:
        """The values that updates are applied to: the float32 master, or the parameter itself."""
        return self.state.get(param, {}).get("master", param)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip_coef: Tensor | None = None,
        ema: EMA | None = None,
    ) -> None:
        """Apply one update, and the moving average of its result if `ema` is given.

        Args:
            grad_scale: factor on the gradients, the inverse of the loss scale; one element.
            found_inf: one element; where not 0, the update is skipped: parameters, moments,
                averages and the counters of updates stay.
            clip_coef: factor on the gradients from clipping; one element.
            ema: averages to update in the same pass; those of parameters without gradient too.
        """
        group = self.group
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if not self.state[param]:
                self.state[param] = self._new_state(param)
        group["step"] += 1 if found_inf is None else (found_inf == 0).reshape(1)
        states = [self.state[param] for param in params]
        beta = None if ema is None else ema.beta()
        if params:
            self.ops.adamw_step(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state.get("master") for state in states],
                None if ema is None else [ema.shadow(param) for param in params],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=group["step"],
                grad_scale=grad_scale,
                found_inf=found_inf,
                clip_coef=clip_coef,
                ema_beta=beta,
                adam_w_mode=self.adam_w_mode,
                bias_correction=group["bias_correction"],
            )
        if ema is not None and beta is not None:
            updated = set(params)
            rest = [param for param in ema.parameters if param not in updated]
            if found_inf is not None:
                beta = torch.where(found_inf.reshape(()) == 0, beta, 1.0)
            shadows = [ema.shadows_by_parameter[param] for param in rest]
            self.ops.ema_update(shadows, [self.master(param) for param in rest], beta)
            ema.num_updates += 1 if found_inf is None else (found_inf == 0).reshape(1)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state bit for bit: ours, or one of the original, which holds no masters.

        Masters that are not in the state are taken from the parameters, so load the model first.

        Raises:
            ValueError: groups, number of parameters, names or shapes do not fit this optimizer.
        """
        if len(state_dict["param_groups"]) != 1:
            raise ValueError(
                f"the optimizer state holds {len(state_dict['param_groups'])} groups, expected one"
            )
        loaded, group = state_dict["param_groups"][0], self.group
        params = group["params"]
        self._check_parameters(loaded)
        self.state.clear()
        for index, tensors in state_dict["state"].items():
            param = params[loaded["params"].index(index)]
            state = self._new_state(param)
            unknown = sorted(set(tensors) - {*state, "master"})
            if unknown:
                raise ValueError(
                    f"the optimizer state of parameter {index} holds unknown {unknown}"
                )
            for name in state.keys() & tensors.keys():
                if tensors[name].shape != param.shape:
                    raise ValueError(
                        f"the optimizer state {name} of parameter {index} has shape "
                        f"{tuple(tensors[name].shape)}, the parameter {tuple(param.shape)}"
                    )
                state[name].copy_(tensors[name])
            self.state[param] = state
        for name in ("lr", "step"):
            group[name].copy_(torch.as_tensor(loaded[name]).reshape(group[name].shape))
        group["betas"] = tuple(float(beta) for beta in loaded["betas"])
        for name in ("weight_decay", "eps", "bias_correction", "initial_lr"):
            if name in loaded:
                group[name] = loaded[name]

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        state = {
            name: torch.zeros_like(param, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")
        }
        if param.dtype != torch.float32 and self.master_weights:
            state["master"] = param.detach().float()
        return state

    def _check_parameters(self, loaded: Mapping[str, Any]) -> None:
        count, expected = len(loaded["params"]), len(self.group["params"])
        if count != expected:
            raise ValueError(
                f"the optimizer state holds {count} parameters, the model trains {expected}; "
                "was it saved with another net or another finetune_base_model?"
            )
        names, own = loaded.get("param_names"), self.group.get("param_names")
        if names and own and names != own:
            index = next(
                i for i, pair in enumerate(zip(names, own, strict=True)) if len({*pair}) == 2
            )
            raise ValueError(
                f"the optimizer state is of other parameters: number {index} is {names[index]!r} "
                f"there and {own[index]!r} here"
            )


def build_optimizer(
    model: nn.Module,
    lr: float = 1e-4,
    weight_decay: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    master_weights: bool = True,
    capturable: bool = True,
    ops: Ops | None = None,
) -> FusedAdamW:
    """Optimizer of all trainable parameters of `model`: matrices first, then vectors and scalars.

    Weight decay applies to both, as in the original, whose two lists end up in one group.

    Raises:
        ValueError: the model trains nothing, or `capturable` is False.
    """
    if not capturable:
        raise ValueError(
            "optimizer.capturable=false: the step count and the learning rate always stay on the "
            "device, which costs nothing; leave it true"
        )
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient")
    matrices = [pair for pair in trainable if pair[1].ndim >= 2]
    others = [pair for pair in trainable if pair[1].ndim < 2]
    return FusedAdamW(
        matrices + others,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        eps=eps,
        master_weights=master_weights,
        ops=ops,
    )


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings gradients of this norm down to `max_norm`, at most 1; scalar tensor."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
