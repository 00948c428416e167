"""Parity with the recorded runs of the original; `--golden-dir DIR` checks another folder."""

from __future__ import annotations

import importlib

import pytest
from goldens import Run

CHECKER_MODULES = (
    "golden_model",
    "golden_diffusion",
    "golden_condition",
    "golden_optimizer",
    "golden_data",
    "golden_training",
)
for module in CHECKER_MODULES:
    importlib.import_module(module)


def test_golden(golden_run: Run) -> None:
    """Outputs and all stored gradients equal the recorded ones."""
    reason = golden_run.out_of_scope()
    if reason:
        pytest.skip(f"{golden_run}: {reason}")
    golden_run.checker()(golden_run)
