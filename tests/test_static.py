"""The gates on compiled kernels, and the command that reports them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gates, static
from bench.static_cases import Use, table_uses, uses_of
from kernels import OPS

pytestmark = pytest.mark.static

TRITON_OPS = [name for name, op in OPS.items() if op.triton]


def representative(op: str) -> list[Use]:
    """Sizes of models, and all cases of the table in bfloat16: odd sizes are the hard ones.

    Of float32, the sizes of heads that differ most.
    """
    chosen = [use for use in table_uses(op) if use.dtype == torch.bfloat16]
    if op == "attention":
        exact = ("head_96 float32", "head_256 float32")
        chosen += [use for use in table_uses(op) if use.config in exact]
    return [*uses_of(op), *chosen]


def check(uses: Iterable[Use], arch: str) -> None:
    rows = static.compiled_rows(uses, [arch])
    static.mark(rows)
    broken = {
        f"{row['kernel']}, {row['config']}": row["failures"] for row in rows if row["failures"]
    }
    assert rows
    assert not broken, "\n".join(f"{label}: {', '.join(found)}" for label, found in broken.items())


@pytest.mark.parametrize("arch", gates.GATED)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_no_gate_breaks(op: str, arch: str) -> None:
    check(representative(op), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", gates.GATED)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_no_gate_breaks_for_any_size_and_dtype(op: str, arch: str) -> None:
    check(uses_of(op, every=True), arch)


def rows_of(op: str, config: str, arch: str) -> dict[str, dict[str, Any]]:
    """Kernel -> its row."""
    uses = [use for use in uses_of(op) if use.config == config]
    return {row["kernel"]: row for row in static.compiled_rows(uses, [arch])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 2}, "2 spills"),
        ({"registers": 253}, "253 registers, at most 252"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"instructions": 16}, "a stub of 16 instructions"),
        ({"tensor_instructions": 0}, "no instruction of the tensor cores"),
        ({"older_tensor_instructions": 4}, "older tensor cores"),
        ({"tf32_instructions": 1}, "1 instructions in TF32"),
        ({"exposed_mufu": 33}, "33 exposed exponentials, at most 2"),
        ({"tensor_bound": 0.66}, "tensor cores at 0.66, at least 0.8"),
        ({"access_bits": 32}, "at most 32 bits"),
        ({"loop": {"products": 12, "waits": 12, "copies": 2}}, "12 waits for 12 products"),
        ({"launches": 2}, "2 launches, not 1"),
    ],
)
def test_a_broken_gate_is_named(change: dict[str, Any], words: str) -> None:
    row = rows_of("attention", "7B", "sm_90")["attention_kernel"]
    assert gates.failures(row) == []
    (found,) = gates.failures(row | change)
    assert words in found
    assert gates.failures(row | change | {"arch": "sm_120"}) == []  # reported, not held


def test_broken_gates_of_norms_are_named() -> None:
    rows = rows_of("residual_adaln_modulate", "7B", "sm_90")
    row = rows["modulate_forward_kernel"] | {"bytes_ratio": 1.03, "unique_ratio": 1.0}
    assert gates.failures(row) == []
    assert gates.failures(row | {"bytes_ratio": 2.0}) == ["bytes_ratio 2.000, at most 1.05"]
    narrow = row | {"accesses": {"load 16": 8, "store 128": 2}}
    assert gates.failures(narrow) == ["accesses of [16, 128] bits, not 128"]
    assert gates.failures(row | {"registers": 81}) == ["81 registers, at most 80"]


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown", "png")}
    arguments = ["--op", "grad_norm", "--arch", "sm_90"]
    for name, file in files.items():
        arguments += [f"--{name}", str(file)]
    assert static.main(arguments) == 0
    content = json.loads(files["json"].read_text())
    for row in content["rows"]:
        assert row["arch"] == "sm_90" and row["spills"] == 0 and row["failures"] == []
        assert row["triton"] == content["triton"]
        assert 0.99 < row["bytes_ratio"] <= 1.005
        assert {"config", "registers", "shared_bytes", "tensor_instructions"} <= set(row)
    assert [row["gpu"] for row in content["predicted"]] == ["H100"]
    assert content["predicted"][0]["evidence"] == "predicted"
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert files["markdown"].read_text() == printed
    assert files["png"].read_bytes().startswith(b"\x89PNG")

    monkeypatch.setitem(gates.REGISTERS, "grad_norm_kernel", 8)
    assert static.main(arguments[:4]) == 1
    assert "registers, at most 8" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_a_broken_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(launch: Any) -> None:
        raise RuntimeError("out of tensor memory\nand more")

    monkeypatch.setattr("bench.compiled.inspect", refuse)
    uses = list(uses_of("grad_norm"))[:1]
    rows = static.compiled_rows(uses, ["sm_90", "sm_120"])
    assert static.mark(rows) == len(rows) / 2
    assert rows[0]["failures"] == ["does not compile: out of tensor memory"]


def test_a_compiler_that_is_not_there_is_asked_for() -> None:
    with pytest.raises(SystemExit, match="Triton 1.2.3 is not in .*make static"):
        static.main(["--triton", "1.2.3"])
