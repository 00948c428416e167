"""Liger-Kernel's norms through the counter of bytes that our kernels go through.

    TRITON_INTERPRET=1 python -m bench.liger_peer

prints JSON: launches and bytes per element of LayerNorm and of the modulated RMSNorm, at a width of
4096 in bfloat16. Two of its idioms do not run in Triton's interpreter: `.to` on an argument that is
a Python float, and `rsqrt` of libdevice; both are replaced by what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .interpreter import counted, repair

ROWS, WIDTH = 64, 4096


class Number(float):
    """A float with the `.to` that a scalar has in compiled code."""

    def to(self, dtype: Any) -> Number:
        return self


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.rsqrt(x)


def main() -> None:
    """Print the rows as JSON."""
    repair()
    print(json.dumps(list(rows())))


def rows() -> Iterator[dict[str, Any]]:
    """LayerNorm without modulation, RMSNorm with modulation: forward and backward."""
    from liger_kernel.ops import layer_norm, modulated_rms_norm

    for module in (layer_norm, modulated_rms_norm):
        module.rsqrt = _rsqrt
    x, dy = (torch.randn(ROWS, WIDTH).bfloat16() for _ in range(2))
    weight, bias = torch.ones(WIDTH).bfloat16(), torch.zeros(WIDTH).bfloat16()
    scale, shift = (torch.randn(1, WIDTH).bfloat16() for _ in range(2))
    eps, offset = Number(1e-6), Number(0.0)

    row, saved = _count(
        "LayerNorm", "forward", lambda: layer_norm.layer_norm_forward(x, weight, bias, eps)
    )
    exact = torch.nn.functional.layer_norm(x.float(), (WIDTH,), eps=eps)
    assert (saved[0].float() - exact).abs().max() < 0.05, "the shims changed the result"
    yield row
    row, _ = _count(
        "LayerNorm",
        "backward",
        lambda: layer_norm.layer_norm_backward(dy, saved[1], weight, bias, saved[2], saved[3]),
    )
    yield row
    row, saved = _count(
        "modulated RMSNorm",
        "forward",
        lambda: modulated_rms_norm.modulated_rms_norm_forward(
            x, None, scale, shift, eps, offset, "llama"
        ),
    )
    yield row
    row, _ = _count(
        "modulated RMSNorm",
        "backward",
        lambda: modulated_rms_norm.modulated_rms_norm_backward(
            dy, x, None, scale, shift, saved[1], offset, saved[4], saved[2], saved[3], saved[5],
            False,
        ),
    )  # fmt: skip
    yield row


def _count(name: str, stage: str, call: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    with counted() as traffic, _launches() as launches:
        result = call()
    elements = ROWS * WIDTH
    row = {
        "op": name,
        "config": f"width {WIDTH}",
        "pass": stage,
        "rival": f"Liger-Kernel {version('liger-kernel')}",
        "launches": len(launches),
        "requested per element": traffic.requested / elements,
        "unique per element": traffic.unique / elements,
    }
    return row, result


@contextmanager
def _launches() -> Iterator[list[Any]]:
    """The names of the kernels that are interpreted in the block."""
    names: list[Any] = []
    run = InterpretedFunction.run

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *arguments, **options)

    InterpretedFunction.run = record
    try:
        yield names
    finally:
        InterpretedFunction.run = run


if __name__ == "__main__":
    main()
