"""Flash attention as machine code: gates on what the compiler made, and runs in an emulator."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from emulator import emulated

from bench.compiled import compile_launch, inspect
from bench.gates import failures, row_of
from bench.overlap import exposed_mufu, overlaps
from kernels.adaln_attention.flash import attention, attention_op
from kernels.launch import Launch, intercepted
from kernels.registry import FLOATS

pytestmark = pytest.mark.static

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADS = (32, 64, 96, 128, 256)
FORWARD, DELTA, KEYS, QUERIES = KERNELS = (
    "attention_kernel",
    "delta_kernel",
    "key_gradients_kernel",
    "query_gradients_kernel",
)


@cache
def launches(target: str, K: int, dtype: torch.dtype) -> list[Launch]:
    qkv = [torch.randn(1, 256, 2, K, dtype=dtype, requires_grad=True) for _ in range(3)]
    found: list[Launch] = []
    with intercepted(target, found.append):
        out = attention(*qkv)
        torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert [launch.kernel.__name__ for launch in found] == list(KERNELS)
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("K", HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_no_gate_breaks(target: str, K: int, dtype: torch.dtype) -> None:
    """No spills, no TF32, registers, overlap of softmax and products: `bench.gates`."""
    for launch in launches(target, K, dtype):
        assert not failures(row_of(launch, inspect(launch))), launch.kernel.__name__


def test_addresses_are_64_bits_wide() -> None:
    """Products in 32 bits are those of a program or a tile with the constant size of a tile."""
    for target in ("sm_80", "sm_90"):
        for launch in launches(target, 128, torch.bfloat16):
            text = re.sub(r" loc\(.*", "", compile_launch(launch).asm["ttir"], flags=re.MULTILINE)
            products = re.findall(r"arith\.muli .*", text)
            assert len(products) > 6
            constants = re.findall(r"(%\w+) = arith.constant", text)
            for product in products:
                operands = re.findall(r"%\w+", product)
                assert "i64" in product or set(operands) & set(constants), product


def test_overlap_counts_what_is_exposed() -> None:
    sass = "\n".join(
        [
            ".L_x_1:",
            " /*0010*/ MUFU.EX2 R1, R2 ;",
            " /*0020*/ HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;",
            " /*0030*/ MUFU.EX2 R1, R2 ;",
            " /*0040*/ HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8, gsb0 ;",
            " /*0050*/ HGMMA.64x128x16.F32.BF16 R8, gdesc[UR4], R8, gsb0 ;",
            " /*0060*/ @!P1 UTMALDG.2D [UR8], [UR6] ;",
            " /*0070*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
            " /*0080*/ MUFU.EX2 R1, R2 ;",
            " /*0090*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;",
            " /*00a0*/ MUFU.EX2 R1, R2 ;",
            " /*00b0*/ @P0 BRA `(.L_x_1) ;",
        ]
    )
    (loop,) = overlaps(sass)
    assert (loop.products, loop.product_cycles, loop.waits, loop.copies) == (3, 128, 2, 1)
    assert (loop.mufu, loop.exposed_mufu) == (4, 2)
    assert (loop.instructions, loop.exposed_instructions) == (11, 4)
    assert loop.tensor_bound == 128 / (128 + 16)
    with pytest.raises(ValueError, match="no loop with HGMMA"):
        exposed_mufu("")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("K", HEADS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_compiled_kernels_in_the_emulator(target: str, K: int, dtype: torch.dtype) -> None:
    """Lengths that divide no tile, strided keys and values, against an explicit softmax."""
    torch.manual_seed(0)
    q = torch.randn(2, 133, 1, K, dtype=dtype)
    packed = torch.randn(2, 70, 1, 3 * K, dtype=dtype)
    qkv = [x.requires_grad_() for x in (q, packed[..., :K], packed[..., 2 * K :])]
    grad = torch.randn_like(q)
    with emulated(target) as statistics:
        out, lse = attention_op(*qkv)
        actual = (out, *torch.autograd.grad(out, qkv, grad))
    assert len(statistics) == len(KERNELS)
    assert all(statistic.clean for statistic in statistics)

    exact = [x.detach().double().requires_grad_() for x in qkv]
    scores = torch.einsum("blnk,bmnk->bnlm", exact[0], exact[1]) * K**-0.5
    output = torch.einsum("bnlm,bmnk->blnk", scores.softmax(-1), exact[2])
    expected = (output, *torch.autograd.grad(output, exact, grad.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (ours.double() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error <= tolerance, f"{name}: {error:.2g}"
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-6, rtol=1e-6)
