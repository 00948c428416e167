"""Flash attention as machine code: gates on what the compiler made, and runs in an emulator."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from emulator import emulated

from bench.compiled import MULTIPROCESSORS, Code, compile_launch, inspect
from bench.overlap import Overlap, exposed_mufu, overlaps
from kernels.adaln_attention.flash import attention, attention_op
from kernels.launch import Launch, intercepted

pytestmark = pytest.mark.static

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADS = (32, 64, 96, 128, 256)
PRODUCTS = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA", "gfx942": r"v_mfma"}
FORWARD, DELTA, KEYS, QUERIES = KERNELS = (
    "attention_kernel",
    "delta_kernel",
    "key_gradients_kernel",
    "query_gradients_kernel",
)
SMALLEST_SHARED = 99 * 1024  # of sm_86, sm_89 and sm_120, which run the configurations of sm_80
SHORTEST = 100  # instructions; less is the stub that ptxas leaves where tensor memory ran out


@cache
def launches(target: str, K: int, dtype: torch.dtype) -> list[Launch]:
    qkv = [torch.randn(1, 256, 2, K, dtype=dtype, requires_grad=True) for _ in range(3)]
    found: list[Launch] = []
    with intercepted(target, found.append):
        out = attention(*qkv)
        torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert [launch.kernel.__name__ for launch in found] == list(KERNELS)
    return found


@cache
def codes(target: str, K: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Code]:
    return {launch.kernel.__name__: inspect(launch) for launch in launches(target, K, dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("K", HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_tensor_cores(target: str, K: int, dtype: torch.dtype) -> None:
    for name, code in codes(target, K, dtype).items():
        check_resources(code)
        products = len(re.findall(PRODUCTS[target], code.assembly))
        assert (products > 0) == (name != DELTA), name
        if target == "sm_90":
            assert not re.search(r"\bHMMA", code.assembly), name


@pytest.mark.parametrize("K", HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_float32_is_exact_and_does_not_spill(target: str, K: int) -> None:
    for name, code in codes(target, K, torch.float32).items():
        check_resources(code)
        assert not re.search(r"TF32|xf32", code.assembly, re.IGNORECASE), name


def check_resources(code: Code) -> None:
    assert code.spills == 0, code.kernel
    shared = SMALLEST_SHARED if code.target == "sm_80" else MULTIPROCESSORS[code.target][2]
    assert code.shared_bytes <= shared, code.kernel
    assert code.instructions >= SHORTEST, code.kernel
    assert code.widest_access == 128, code.kernel


def test_registers_of_the_model() -> None:
    """Heads of 128 in bfloat16, on the targets whose file holds 255 registers per lane."""
    for target in ("sm_80", "sm_90", "sm_100"):
        code = codes(target, 128)
        assert code[FORWARD].registers <= 252
        assert code[KEYS].registers <= 250
        assert code[QUERIES].registers <= 250
        assert code[DELTA].registers <= 48


def test_addresses_are_64_bits_wide() -> None:
    """Products in 32 bits are those of a program or a tile with the constant size of a tile."""
    for target in ("sm_80", "sm_90"):
        for launch in launches(target, 128, torch.bfloat16):
            text = re.sub(r" loc\(.*", "", compile_launch(launch).asm["ttir"], flags=re.MULTILINE)
            products = re.findall(r"arith\.muli .*", text)
            assert len(products) > 6
            for product in products:
                assert "i64" in product or re.search(r"%c\d+_i32 : i32", product), product


def main_loop(kernel: str, K: int = 128) -> Overlap:
    return overlaps(codes("sm_90", K)[kernel].assembly)[0]


def test_softmax_runs_under_the_tensor_cores() -> None:
    assert exposed_mufu(codes("sm_90", 128)[FORWARD].assembly) <= 2
    forward, keys, queries = (main_loop(kernel) for kernel in (FORWARD, KEYS, QUERIES))
    assert forward.products == 12
    assert max(loop.exposed_instructions for loop in (forward, keys, queries)) <= 210
    assert keys.exposed_mufu <= 2
    assert queries.exposed_mufu <= 2
    assert forward.tensor_bound >= 0.80
    assert keys.tensor_bound >= 0.90
    assert queries.tensor_bound >= 0.80


@pytest.mark.parametrize("kernel", [FORWARD, KEYS, QUERIES])
@pytest.mark.parametrize("K", [64, 96, 128, 256])
def test_products_are_not_serialised(K: int, kernel: str) -> None:
    """ptxas waits after every product of a loop whose registers it cannot arrange."""
    loop = main_loop(kernel, K)
    assert loop.waits <= 3 < loop.products
    assert loop.copies == 2


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
