"""How autograd finds the backward op of an attention op, whoever computes both.

Letters: B batch, L queries, M keys, N heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def register_attention_gradients(
    attention_op: Any, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Differentiate `attention_op` by `backward`.

    Args:
        attention_op: a `torch.library.custom_op`, (q, k, v) -> (out, log-sum-exp).
        backward: (gradient of out, q, k, v, out, log-sum-exp) -> gradients of q, k and v. Nothing
            differentiates the log-sum-exp.
    """

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # write no zeros for the log-sum-exp
        ctx.save_for_backward(*inputs, *output)

    def differentiate(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
        return backward(gradient, *ctx.saved_tensors)

    attention_op.register_autograd(differentiate, setup_context=save)
