"""`bench.static`: the table that it prints, and that a broken gate is seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kernels import OPS
from kernels.launch import interpreting

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(interpreting(), reason="compiles kernels: run without TRITON_INTERPRET"),
]

FIELDS = (
    "kernel", "config", "arch", "triton", "registers", "spills", "shared_bytes", "access_bits",
    "tensor_instructions", "bytes_ratio",
)  # fmt: skip


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.triton])
def test_no_gate_breaks_at_the_sizes_of_shipped_models(op: str) -> None:
    from bench.gates import GATED
    from bench.static import compiled_rows, mark

    rows = compiled_rows([op], GATED, every=False)
    assert mark(rows) == 0, [row for row in rows if row["failures"]]
    assert {row["arch"] for row in rows} == set(GATED)


def test_tables_files_and_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.static import main

    files = {name: tmp_path / f"static.{name}" for name in ("json", "markdown", "png")}
    paths = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert main(["--op", "gated_residual", "--arch", "sm_90", *paths]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == files["markdown"].read_text().strip()
    assert "Predicted times of the 7B model, not measured" in printed
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    content = json.loads(files["json"].read_text())
    for row in content["rows"]:
        assert set(FIELDS) <= set(row)
        assert row["spills"] == 0 and 1.0 <= row["bytes_ratio"] <= 1.05
    assert {row["evidence"] for row in content["predicted"]} == {"predicted"}
    ours, theirs = (
        next(
            row["unique per element"]
            for row in content["peers"]
            if row["rival"].startswith(rival)
            and (row["config"], row["pass"]) == ("7B addend", "backward")
        )
        for rival in ("transfer1", "torch.compile")
    )
    assert ours < theirs


def row(**changes: Any) -> dict[str, Any]:
    """Of a kernel that breaks no gate."""
    return {
        "kernel": "modulate_forward_kernel", "op": "adaln_modulate", "pass": "forward",
        "config": "7B", "arch": "sm_90", "dtype": "bfloat16", "registers": 64, "spills": 0,
        "shared_bytes": 0, "occupancy": 0.5, "instructions": 500, "access_bits": 128,
        "accesses": {"load 128": 4}, "tensor_instructions": 0, "older_tensor_instructions": 0,
        "tf32_instructions": 0, "arguments": {"D": 4096}, "launches": 1, "bytes_ratio": 1.0,
        "unique_ratio": 1.0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 2}, "2 spills"),
        ({"registers": 81}, "81 registers, at most 80"),
        ({"instructions": 16}, "a stub of 16 instructions"),
        ({"shared_bytes": 2**18}, "262144 bytes of shared memory"),
        ({"accesses": {"load 128": 4, "load 16": 1}}, r"accesses of \[16, 128\] bits, not 128"),
        ({"tf32_instructions": 1}, "1 instructions in TF32"),
        ({"launches": 3}, "3 launches, not 1"),
        ({"bytes_ratio": 1.06}, "bytes_ratio 1.060, at most 1.05"),
    ],
)
def test_a_broken_gate_is_named(changes: dict[str, Any], message: str) -> None:

    from bench.gates import failures

    assert failures(row()) == []
    (found,) = failures(row(**changes))
    assert re.match(message, found), found
    assert failures(row(**changes, arch="sm_120")) == [], "reported, not held"
