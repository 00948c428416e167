"""Predicted times: least bytes and FLOPs of whole samples, by published peaks."""

from __future__ import annotations

import pytest

from bench.roofline import GPUS, predictions, works


def test_least_work_of_the_7b_model() -> None:
    found = {(w["op"], w["config"], w["pass"]): w for w in works(["adaln_modulate", "attention"])}
    tensor = 56_320 * 4096 * 2  # bytes
    opened = found["adaln_modulate", "7B", "forward"]["bytes"]
    assert opened == pytest.approx(2 * tensor, rel=1e-3)
    assert found["attention", "7B", "forward"]["flops"] == 4 * 56_320**2 * 4096
    assert found["attention", "7B", "backward"]["flops"] == 14 * 56_320**2 * 4096
    assert found["attention", "7B", "forward"]["bytes"] == 4 * tensor


def test_limits_and_predictions() -> None:
    rows = [
        {"op": "attention", "config": "7B", "pass": "forward", "kernel": "attention_kernel",
         "tensor_bound": 0.83},
    ]  # fmt: skip
    found = predictions(["residual_adaln_modulate", "attention"], ["sm_80", "sm_90"], rows)
    assert {row["gpu"] for row in found} == {"A100", "H100"}
    assert all(row["evidence"] == "predicted" for row in found)
    by = {(r["op"], r["config"], r["pass"], r["gpu"]): r for r in found}
    norm = by["residual_adaln_modulate", "7B", "forward", "H100"]
    assert norm["bound"] == "memory"
    assert norm["limit_ms"] == pytest.approx(0.551, abs=1e-3)
    assert norm["predicted_ms"] == pytest.approx(0.64, abs=1e-2)
    attention = by["attention", "7B", "forward", "H100"]
    assert attention["bound"] == "products"
    assert attention["limit_ms"] == pytest.approx(52.5, abs=0.1)
    assert attention["predicted_ms"] == pytest.approx(52.5 / 0.83 * 653 / 487, abs=0.2)
    assert "FlashAttention-3 81 ms" in attention["published"]
    # No schedule, no prediction: what is not calibrated is not claimed.
    assert by["attention", "7B", "backward", "H100"]["predicted_ms"] is None
    assert by["attention", "7B", "forward", "A100"]["predicted_ms"] is None
    assert GPUS["H100"].ridge == pytest.approx(295, abs=1)
