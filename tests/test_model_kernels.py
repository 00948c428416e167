"""Whole networks on Triton kernels: the loss and every gradient of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import needs_interpreter
from tiny_model import tiny_control, tiny_dit, tiny_inputs

from bench.parity import relative_rms
from kernels import Ops, select
from transfer1.model.transfer import Transfer

pytestmark = needs_interpreter

SIZE: dict[str, Any] = {"model_channels": 64, "num_blocks": 2}  # two heads of 32
CONTROL: dict[str, Any] = {**SIZE, "num_control_blocks": 1}
FLOAT32_TOLERANCE = 2e-5  # a dozen ops of 1e-6 each, forward and backward


def transfer(ops: Ops, **options: Any) -> Transfer:
    base, control = (
        tiny_dit(ops=ops, **SIZE, **options),
        tiny_control(ops=ops, **CONTROL, **options),
    )
    return Transfer(base, control, conditioner=None, tokenizer=None)


def gradients(model: Transfer, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every parameter that has one."""
    x, noise_level, condition = tiny_inputs()
    hint = torch.randn(2, 6, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    loss = model(x, noise_level, condition, [hint]).square().mean()
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


def test_loss_and_every_gradient_equal_those_of_the_reference() -> None:
    expected, found = (gradients(transfer(select(backend))) for backend in ("reference", "triton"))
    assert found.keys() == expected.keys() and len(found) > 40
    for name, value in expected.items():
        error = relative_rms(found[name], value)
        assert error <= FLOAT32_TOLERANCE, f"{name}: {error:.2g}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "block"])
def test_checkpointing_keeps_every_bit(mode: str) -> None:
    """What is computed again is the same; the kernels are ops that a policy can name."""
    build: Callable[..., Transfer] = transfer
    plain, recomputed = (
        gradients(build(select("triton"), activation_checkpoint=m)) for m in ("none", mode)
    )
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name


def test_a_block_compiles_without_a_break() -> None:
    """torch.compile(fullgraph=True) over all kernels of a block, forward and backward."""
    from transfer1.model.block import TransformerBlock

    def block() -> TransformerBlock:
        torch.manual_seed(0)
        built = TransformerBlock("FA-CA-MLP", 64, 12, 2, 2.0, 8, select("triton"))
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return built

    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(7, 16, generator=generator)
    rope = torch.stack([angles.cos(), angles.sin()])
    given = [torch.randn(shape, generator=generator) for shape in ((2, 7, 64), (2, 64), (2, 5, 12))]
    lora = torch.randn(2, 192, generator=generator)
    plain, compiled = block(), block()
    traced = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    outputs = [run(*given, rope, lora) for run in (plain, traced)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, msg=name)
