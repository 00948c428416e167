"""The page on scaling is what its code prints, and the code follows its formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.scaling import (
    GPUS,
    NODE,
    PLANS,
    RECOMPUTATION,
    between_seconds,
    compute_seconds,
    document,
)

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == document(), "run python -m bench.scaling > docs/scaling.md"


def test_more_gpus_never_cost_less_communication() -> None:
    for plan in PLANS:
        times = [between_seconds(plan, gpus) for gpus in GPUS]
        assert times[0] == 0 and times == sorted(times)
    assert NODE * compute_seconds(NODE) == pytest.approx(compute_seconds(1) / RECOMPUTATION)
    assert all(between_seconds(plan, 4096) < 0.01 * compute_seconds(8) for plan in PLANS)
