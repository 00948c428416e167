"""AdamW over lists of tensors, optionally with their moving average, and the gradient norm.

All statistics and all updates are float32; what depends on the number of the step alone is computed
in float64 first. A bfloat16 or float16 parameter is the rounded copy of a float32 master, or one of
the two ways of `bfloat16.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.checks import Scalar, check_dtypes, check_matching, check_range
from kernels.ema.reference import FLOATING, average_lists
from kernels.multi_tensor import scalar

from .bfloat16 import join, round_stochastically, rounding_key, split


class StepScalars(NamedTuple):
    """What an update needs besides its tensors; float32 [] each, computed in float64."""

    grad_factor: Tensor
    beta1: Tensor
    beta1_complement: Tensor
    beta2: Tensor
    beta2_complement: Tensor
    eps: Tensor
    weight_decay: Tensor
    root_factor: Tensor  # 1 / sqrt(1 - beta2^step)
    step_size: Tensor  # lr / (1 - beta1^step)
    decay: Tensor  # lr * weight_decay
    ema_beta: Tensor
    ema_complement: Tensor


@torch.no_grad()
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    ema: list[Tensor | None] | None,
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Scalar,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    ema_beta: Scalar | None = None,
    adam_w_mode: bool = True,
    bias_correction: bool = True,
    rounding_seed: int | Tensor | None = None,
    update: Callable[..., None] | None = None,
) -> None:
    """Apply update number `step` (1, 2, ...) in place; gradients are only read.

        g = grad * grad_scale * clip_coef            (+ weight_decay * p, unless adam_w_mode)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        u = (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
        p = p - lr * (u + weight_decay * p)          (p - lr * u, unless adam_w_mode)
        ema = ema_beta * ema + (1 - ema_beta) * p

    Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2; the form of
    apex's FusedAdam.

    Args:
        params: parameters in float32, bfloat16 or float16; all lists have one entry per parameter.
        grads: gradients, any floating dtype.
        exp_avgs: m, float32.
        exp_avg_sqs: v, float32.
        masters: per parameter in lower precision its float32 p, or int16, the remainder that makes
            the exact float32 of a bfloat16 one; None where the parameter itself is p.
        ema: float32 averages of p, None for parameters without one; None for no averages at all.
        lr, step, grad_scale, found_inf, clip_coef, ema_beta: numbers, or tensors of one element on
            the device of the parameters.
        grad_scale: factor on the gradients, the inverse of the loss scale.
        found_inf: where not 0, all values stay.
        adam_w_mode: decoupled weight decay; False adds it to the gradient (L2).
        bias_correction: divide m and v by 1 - beta^step.
        rounding_seed: round bfloat16 parameters without master stochastically, by this seed.
        update: what does the arithmetic, `update_lists` if None; another one may be faster.

    Raises:
        ValueError: lengths, shapes, devices, dtypes or numbers do not fit, or a parameter in lower
            precision has no master and no rounding_seed.
    """
    check_adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, masters, ema,
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_beta=ema_beta,
        rounding_seed=rounding_seed,
    )  # fmt: skip
    if not params:
        return
    device = params[0].device
    applied = None
    if found_inf is not None:
        applied = scalar(found_inf, torch.float64, device).reshape(()) == 0
        if applied.is_cpu:  # looking costs nothing here, and nothing is to be masked below
            if not applied:
                return
            applied = None
    scalars = step_scalars(
        device, lr, betas, eps, weight_decay, step, grad_scale, clip_coef, ema_beta, bias_correction
    )
    keys = None
    if rounding_seed is not None:
        number = scalar(step, torch.int64, device)
        keys = [rounding_key(rounding_seed, number, index) for index in range(len(params))]
    (update or update_lists)(
        params, grads, exp_avgs, exp_avg_sqs, masters, ema, scalars, applied, adam_w_mode, keys
    )


def update_lists(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    ema: list[Tensor | None] | None,
    scalars: StepScalars,
    applied: Tensor | None,
    adam_w_mode: bool,
    keys: Sequence[Tensor] | None = None,
) -> None:
    """The arithmetic of `adamw_step`.

    Args:
        applied: bool [], False leaves all values; None stands for True.
        keys: per parameter, of stochastic rounding.
    """
    s = scalars
    weights = [_weight(param, master) for param, master in zip(params, masters, strict=True)]
    gradients = list(torch._foreach_mul([grad.float() for grad in grads], s.grad_factor))
    if not adam_w_mode:
        torch._foreach_add_(gradients, torch._foreach_mul(weights, s.weight_decay))
    if applied is not None:
        # A skipped update is one of zero gradients, step and decay.
        gradients = [torch.where(applied, gradient, 0.0) for gradient in gradients]
        kept, gone = torch.ones_like(s.decay), torch.zeros_like(s.decay)
        s = s._replace(
            beta1=torch.where(applied, s.beta1, kept),
            beta2=torch.where(applied, s.beta2, kept),
            step_size=torch.where(applied, s.step_size, gone),
            decay=torch.where(applied, s.decay, gone),
            ema_beta=torch.where(applied, s.ema_beta, kept),
            ema_complement=torch.where(applied, s.ema_complement, gone),
        )
    torch._foreach_mul_(exp_avgs, s.beta1)
    torch._foreach_add_(exp_avgs, torch._foreach_mul(gradients, s.beta1_complement))
    squares = torch._foreach_mul(gradients, gradients)
    torch._foreach_mul_(exp_avg_sqs, s.beta2)
    torch._foreach_add_(exp_avg_sqs, torch._foreach_mul(squares, s.beta2_complement))

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, s.root_factor)
    torch._foreach_add_(denominators, s.eps)
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, s.step_size)
    if adam_w_mode:
        # Not weights * (1 - decay): the rounding of that factor would be the same in every step.
        updates = torch._foreach_add(updates, torch._foreach_mul(weights, s.decay))
    torch._foreach_sub_(weights, updates)

    for index, (param, master, weight) in enumerate(zip(params, masters, weights, strict=True)):
        if weight is not param:
            _store(param, master, weight, None if keys is None else keys[index])
    if ema is not None:
        pairs = [(shadow, w) for shadow, w in zip(ema, weights, strict=True) if shadow is not None]
        average_lists(
            [shadow for shadow, _ in pairs],
            [weight for _, weight in pairs],
            s.ema_beta.reshape(1),
            s.ema_complement.reshape(1),
        )


def step_scalars(
    device: torch.device,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Scalar,
    grad_scale: Scalar | None,
    clip_coef: Scalar | None,
    ema_beta: Scalar | None,
    bias_correction: bool,
) -> StepScalars:
    """The scalars of one update, on its device; the arguments are those of `adamw_step`."""

    def exact(value: Scalar) -> Tensor:
        return scalar(value, torch.float64, device).reshape(())

    beta1, beta2 = betas
    rate, number, factor = exact(lr), exact(step), exact(1.0)
    for scale in (grad_scale, clip_coef):
        if scale is not None:
            factor = factor * exact(scale)
    step_size, root_factor = rate, exact(1.0)
    if bias_correction:
        step_size = rate / (1 - beta1**number)
        root_factor = (1 - beta2**number) ** -0.5
    beta = exact(1.0 if ema_beta is None else ema_beta)
    exact_scalars = StepScalars(
        grad_factor=factor,
        beta1=exact(beta1),
        beta1_complement=exact(1 - beta1),
        beta2=exact(beta2),
        beta2_complement=exact(1 - beta2),
        eps=exact(eps),
        weight_decay=exact(weight_decay),
        root_factor=root_factor,
        step_size=step_size,
        decay=rate * weight_decay,
        ema_beta=beta,
        ema_complement=1 - beta,
    )
    return StepScalars(*(value.float() for value in exact_scalars))


def grad_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all gradients together, float32 [] on their device.

    Not finite where a gradient is not finite. Squares are added up in float64: in float32 the sum
    over 10^7 elements can be off by a percent.

    Raises:
        ValueError: a gradient is sparse or not floating, or they are on several devices.
    """
    check_grad_norm(grads)
    if not grads:
        return torch.zeros(())
    return norm_of(squared_norms(grads))


def squared_norms(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares of each gradient, float64 [gradients]."""
    return torch.stack([grad.float().square().sum(dtype=torch.float64) for grad in grads])


def norm_of(squared: Tensor) -> Tensor:
    """Root of the sum of partial sums, float32 []."""
    return squared.sum().sqrt().float()


def check_grad_norm(grads: list[Tensor]) -> None:
    """Raise ValueError for arguments that `grad_norm` cannot take."""
    check_matching("grad_norm", grads=grads)
    check_dtypes("grad_norm", "grads", grads, FLOATING)


def check_adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor | None],
    ema: list[Tensor | None] | None,
    *,
    lr: Scalar,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_beta: Scalar | None,
    rounding_seed: int | Tensor | None,
) -> None:
    """Raise ValueError for arguments that `adamw_step` cannot take."""
    op = "adamw_step"
    lists: dict[str, Any] = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "masters": masters,
    }
    if ema is not None:
        lists["ema"] = ema
        if ema_beta is None:
            raise ValueError(f"{op}: ema is given, but ema_beta is None; give both or neither")
    check_matching(op, params=params, **lists)
    check_dtypes(op, "params", params, (torch.float32, torch.bfloat16, torch.float16))
    check_dtypes(op, "grads", grads, FLOATING)
    for name, tensors in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs), ("ema", ema or ())):
        check_dtypes(op, name, tensors, (torch.float32,))
    check_dtypes(op, "masters", masters, (torch.float32, torch.int16))
    for index, (param, master) in enumerate(zip(params, masters, strict=True)):
        _check_master(index, param, master, rounding_seed is not None)
    check_range(op, "lr", lr, 0.0)
    check_range(op, "eps", eps, 0.0)
    check_range(op, "weight_decay", weight_decay, 0.0)
    for index, beta in enumerate(betas):
        check_range(op, f"betas[{index}]", beta, 0.0, 1.0)
    check_range(op, "ema_beta", ema_beta, 0.0, 1.0 + 1e-12)


def _check_master(index: int, param: Tensor, master: Tensor | None, stochastic: bool) -> None:
    what = f"adamw_step: params[{index}] of shape {tuple(param.shape)} is {param.dtype}"
    if master is None:
        if param.dtype == torch.float32 or (stochastic and param.dtype == torch.bfloat16):
            return
        ways = "" if param.dtype == torch.float16 else ", master_remainder or stochastic_rounding"
        raise ValueError(
            f"{what} and has no float32 master; small updates would be lost: set "
            f"optimizer.master_weights=True{ways}"
        )
    if param.dtype == torch.float32:
        raise ValueError(f"{what} and needs no master, but masters[{index}] is {master.dtype}")
    if master.dtype == torch.int16 and param.dtype != torch.bfloat16:
        raise ValueError(
            f"{what}, but masters[{index}] is torch.int16: only bfloat16 has a remainder"
        )


def _weight(param: Tensor, master: Tensor | None) -> Tensor:
    """The float32 values that are updated: the parameter or master itself, or made of them."""
    if master is None:
        return param if param.dtype == torch.float32 else param.float()
    return master if master.dtype == torch.float32 else join(param, master)


def _store(param: Tensor, master: Tensor | None, weight: Tensor, key: Tensor | None) -> None:
    if master is None:
        assert key is not None, "a parameter in lower precision has a master or is rounded by a key"
        param.copy_(round_stochastically(weight, key))
    elif master.dtype == torch.int16:
        upper, lower = split(weight)
        param.copy_(upper)
        master.copy_(lower)
    else:
        param.copy_(weight)
