"""Parity with the recorded runs of the original; `--golden-dir DIR` checks another folder."""

from __future__ import annotations

import importlib

import original
import pytest
from goldens import Run
from op_cases import needs_interpreter

from kernels import select

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


WITH_KERNELS = ("dit_block", "transformer_block", "general_dit", "ctrl_enc")  # cases of networks


@needs_interpreter
def test_golden_networks_with_triton_kernels(
    golden_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers from the hand-written kernels, gradients included."""
    if golden_run.case not in WITH_KERNELS:
        return
    reason = golden_run.out_of_scope()
    if reason:
        pytest.skip(f"{golden_run}: {reason}")
    monkeypatch.setattr(original, "OPS", select("triton"))
    golden_run.checker()(golden_run)
