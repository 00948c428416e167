"""The ops of a transformer block against their formulas, written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import OPS, select

OPS_HERE = (
    "adaln_modulate",
    "residual_adaln_modulate",
    "gated_residual",
    "qk_norm_rope",
    "attention",
)
REFERENCE = select("reference")


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return layer_norm(x, eps) * (1 + scale[:, None]) + shift[:, None]


def norm_rope(x: Tensor, weight: Tensor, rope: Tensor | None, eps: float) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    if rope is None:
        return normed
    turn = torch.complex(rope[0], rope[1])[:, None]
    turned = torch.complex(*normed.chunk(2, -1)) * turn
    return torch.cat([turned.real, turned.imag], -1)


def oracle(name: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op's outputs by its formula."""
    i = inputs
    if name == "adaln_modulate":
        position = i["position_LD"]
        x = i["x_BLD"] if position is None else i["x_BLD"] + position
        h = modulate(x, i["shift_BD"], i["scale_BD"], i["eps"])
        return (h,) if position is None else (x, h)
    if name == "residual_adaln_modulate":
        x = i["x_BLD"] + i["gate_BD"][:, None] * i["y_BLD"]
        return x, modulate(x, i["shift_BD"], i["scale_BD"], i["eps"])
    if name == "gated_residual":
        x = i["x_BLD"] + i["gate_BD"][:, None] * i["y_BLD"]
        return (x if i["addend_BLD"] is None else x + i["addend_BLD"],)
    if name == "qk_norm_rope":
        rope, eps = i["rope_2LR"], i["eps"]
        q = norm_rope(i["q_BLNK"], i["q_weight_K"], rope, eps)
        return q, norm_rope(i["k_BMNK"], i["k_weight_K"], rope, eps)
    scores = torch.einsum("blnk,bmnk->bnlm", i["q_BLNK"], i["k_BMNK"])
    weights = (scores * i["q_BLNK"].shape[-1] ** -0.5).softmax(-1)
    return (torch.einsum("bnlm,bmnk->blnk", weights, i["v_BMNK"]),)


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adaln_modulate": [{}, {"position": False}, {"B": 3, "L": 5, "D": 33}],
    "residual_adaln_modulate": [{}, {"B": 3, "L": 5, "D": 33}],
    "gated_residual": [{}, {"addend": False}, {"B": 1, "L": 1, "D": 7}],
    "qk_norm_rope": [{}, {"M": 11}, {"B": 3, "N": 1, "K": 10}],
    "attention": [{}, {"L": 1, "M": 1}, {"B": 3, "L": 9, "M": 4, "N": 1, "K": 10}],
}
CASES = [(name, variant) for name in OPS_HERE for variant in VARIANTS[name]]


@pytest.mark.parametrize(("name", "variant"), CASES, ids=str)
def test_reference_is_the_formula(name: str, variant: dict[str, Any]) -> None:
    """Outputs and all gradients, with the strides that the model has."""
    torch.manual_seed(0)
    inputs = OPS[name].inputs(**variant)
    exact = double(inputs)
    outputs = getattr(REFERENCE, name)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = oracle(name, exact)
    assert len(outputs) == len(expected)
    weights = [torch.randn(output.shape) for output in outputs]
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, atol=2e-5, rtol=1e-5)
    sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    sum((o * w).sum() for o, w in zip(expected, weights, strict=True)).backward()
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.requires_grad:
            scale = exact[key].grad.abs().max().item()
            error = (value.grad.double() - exact[key].grad).abs().max().item()
            assert error <= 1e-5 * max(scale, 0.1), f"gradient of {key}: {error:.2g} at {scale:.2g}"


@pytest.mark.parametrize("name", OPS_HERE)
def test_bfloat16_in_bfloat16_out_float32_between(name: str) -> None:
    """Outputs are rounded once: as near to the exact result as bfloat16 can be."""
    torch.manual_seed(0)
    inputs = OPS[name].inputs(dtype=torch.bfloat16)
    outputs = getattr(REFERENCE, name)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output, value in zip(outputs, oracle(name, double(inputs)), strict=True):
        assert output.dtype == torch.bfloat16
        # The second output of a joined op starts from the rounded sum, hence the 2 ** -6.
        bound = 2**-6 * value.abs().max().item()
        assert (output.double() - value).abs().max().item() <= bound


@pytest.mark.parametrize("name", OPS_HERE)
def test_modulation_is_strided_and_cost_counts_the_tensors(name: str) -> None:
    inputs = OPS[name].inputs()
    for key in ("shift_BD", "scale_BD", "gate_BD"):
        if key in inputs:
            B, D = inputs[key].shape
            assert B >= 2 and inputs[key].stride() == (3 * D, 1)
    moved, flops = OPS[name].cost(**inputs)
    read = sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    outputs = getattr(REFERENCE, name)(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert moved == read + sum(output.nbytes for output in outputs)
    assert flops >= sum(output.numel() for output in outputs)
