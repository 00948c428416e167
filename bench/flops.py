"""Arithmetic of a call: the multiplications and additions of its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


# PyTorch counts its attention on GPUs, but not the kernel of CPUs.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and attentions in one call.

    Products inside Triton kernels are not seen: count with references.
    """
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        call()
    return counter.get_total_flops()
