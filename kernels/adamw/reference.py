"""AdamW over lists of tensors, optionally with their moving average, and the gradient norm.

All statistics and all updates are float32; a bfloat16 or float16 parameter is the rounded copy of a
float32 master. Written with `torch._foreach_*` because CPU training runs this code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ema.reference import Scalar, ema_update, scalar


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
) -> None:
    """Apply update number `step` (1, 2, ...) in place; gradients are only read.

        g = grad * grad_scale * clip_coef            (+ weight_decay * p, unless adam_w_mode)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        u = (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
        p = p - lr * (u + weight_decay * p)          (p - lr * u, unless adam_w_mode)
        ema = ema_beta * ema + (1 - ema_beta) * p

    Args:
        params: parameters, any floating dtype; all lists have one entry per parameter.
        grads: gradients, any floating dtype.
        exp_avgs: m, float32.
        exp_avg_sqs: v, float32.
        masters: the float32 p of parameters in lower precision; None where the parameter is p.
        ema: float32 averages of p, None for parameters without one; None for no averages at all.
        lr, step, grad_scale, found_inf, clip_coef, ema_beta: numbers, or tensors of one element on
            the device of the parameters.
        grad_scale: factor on the gradients, the inverse of the loss scale.
        found_inf: where not 0, all values stay.
        adam_w_mode: decoupled weight decay; False adds it to the gradient (L2).
        bias_correction: divide m and v by 1 - beta^step.

    Raises:
        ValueError: a parameter in lower precision has no master.
    """
    weights = _float32_weights(params, masters)
    beta1, beta2 = betas
    # A skipped update is one of zero gradients, rate and weight: nothing waits for `found_inf`.
    applied = (scalar(0.0 if found_inf is None else found_inf, weights) == 0).double()
    lr, step = scalar(lr, weights) * applied, scalar(step, weights).clamp(min=1)

    gradients = [grad.float() for grad in grads]
    for factor in (grad_scale, clip_coef):
        if factor is not None:
            gradients = [*torch._foreach_mul(gradients, scalar(factor, weights))]
    if weight_decay and not adam_w_mode:
        gradients = [*torch._foreach_add(gradients, weights, alpha=weight_decay)]
    if found_inf is not None:
        gradients = [torch.where(applied > 0, grad, 0.0) for grad in gradients]

    torch._foreach_mul_(exp_avgs, 1 - (1 - beta1) * applied)
    torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, 1 - (1 - beta2) * applied)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)

    step_size = lr
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    if bias_correction:
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        step_size = lr / (1 - beta1**step)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, step_size)
    if weight_decay and adam_w_mode:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_sub_(weights, updates)

    rounded = [(p, master) for p, master in zip(params, masters, strict=True) if master is not None]
    if rounded:
        torch._foreach_copy_([param for param, _ in rounded], [master for _, master in rounded])
    if ema is not None:
        assert ema_beta is not None, "an average needs its ema_beta"
        ema_beta = 1 - (1 - scalar(ema_beta, weights)) * applied
        averaged = [(s, w) for s, w in zip(ema, weights, strict=True) if s is not None]
        ema_update([shadow for shadow, _ in averaged], [weight for _, weight in averaged], ema_beta)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """L2 norm over all gradients together, float32 [] on their device.

    Not finite where a gradient is not finite (or its square sum exceeds float32).
    """
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def _float32_weights(params: list[Tensor], masters: list[Tensor | None]) -> list[Tensor]:
    weights = []
    for index, (param, master) in enumerate(zip(params, masters, strict=True)):
        if master is None and param.dtype != torch.float32:
            raise ValueError(
                f"adamw_step: parameter {index} of shape {tuple(param.shape)} is {param.dtype} and "
                "has no float32 master; small updates would be lost: "
                "set optimizer.master_weights=True"
            )
        weights.append(param if master is None else master)
    return weights
