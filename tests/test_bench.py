"""The benchmark of ops: what it prints and writes, and that nothing wrong is ever timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ops, timing, work
from kernels import OPS


@pytest.fixture(autouse=True)
def references_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than all the rest; the slow parity tests do it."""
    monkeypatch.setattr(work, "has_cpp_compiler", lambda: False)


def test_a_table_of_rivals_peers_and_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    ops.main(
        [
            "--op",
            "adamw_step",
            "ema_update",
            "--size",
            "ragged",
            "--rounds",
            "2",
            "--json",
            str(file),
        ]
    )
    content = json.loads(file.read_text())
    rivals = [(row["op"], row["rival"]) for row in content["rows"]]
    assert rivals == [
        ("adamw_step", "reference"),
        ("adamw_step", "torch fused"),
        ("adamw_step", "torch foreach"),
        ("adamw_step", "torch for-loop"),
        ("adamw_step", "memory pass"),
        ("ema_update", "reference"),
        ("ema_update", "torch foreach"),
        ("ema_update", "torch lerp"),
        ("ema_update", "torch swa_utils"),
        ("ema_update", "ema-pytorch"),
        ("ema_update", "ema-pytorch foreach"),
        ("ema_update", "timm ModelEmaV3"),
        ("ema_update", "memory pass"),
    ]
    assert content["machine"]["torch"] == torch.__version__
    assert all(row["ms"] > 0 and row["GB/s"] > 0 for row in content["rows"])
    printed = capsys.readouterr().out
    assert "| adamw_step | ragged | float32 |      | torch fused" in printed
    assert "threads" in printed.splitlines()[0]


def test_an_op_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["ema_update"]

    def wrong(shadows: Any, params: Any, beta: Any) -> None:
        op.reference(shadows, params, 0.9 * beta)

    class Wrong(type(op)):  # type: ignore[misc]
        def build(self, backend: str, device: Any = "cpu") -> Any:
            return wrong

    fields = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
    with pytest.raises(AssertionError, match=r"ema_update shadows\[0\]"):
        ops.time_op(Wrong(**fields), ["ragged"], "cpu", rounds=1)


def test_slow_rivals_take_their_turns_afterwards() -> None:
    calls: list[str] = []

    def busy(name: str, count: int) -> Any:
        def call() -> None:
            calls.append(name)
            torch.randn(count).sort()

        return call

    rivals = {"slow": busy("slow", 400_000), "fast": busy("fast", 400)}
    times = timing.take_turns(rivals, rounds=6)
    rounds = calls[2 * timing.WARM_UP :]
    assert rounds == ["fast"] * 6 + ["slow"] * 3
    assert times["slow"].median > times["fast"].median > 0
