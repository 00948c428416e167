"""Triton is needed by its own backend alone: everything else works where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.utils._triton

pytestmark = pytest.mark.static  # the session in which nothing else has imported Triton


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `import triton` fail, and forget what was imported of it before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    forget_whether_triton_is_there()
    yield
    forget_whether_triton_is_there()


def forget_whether_triton_is_there() -> None:
    """PyTorch looks once per process and remembers the answer."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("backend", ["reference", pytest.param("compile", marks=pytest.mark.slow)])
def test_import_build_train(backend: str) -> None:
    from tiny_model import tiny_control, tiny_dit, tiny_inputs

    import kernels
    from transfer1.model.transfer import Transfer
    from transfer1.training.optimizer import build_optimizer

    with pytest.raises(ImportError):
        import triton  # noqa: F401

    ops = kernels.select("reference", gated_residual=backend, ema_update=backend)
    model = Transfer(tiny_dit(ops=ops), tiny_control(ops=ops), conditioner=None, tokenizer=None)
    optimizer = build_optimizer(model, lr=1e-2, ops=ops)
    x, noise_level, condition = tiny_inputs()
    hint = torch.randn(2, 6, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        loss = model(x, noise_level, condition, [hint]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
