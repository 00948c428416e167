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
    "golden_controls",
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


BLOCKS = ("dit_block", "transformer_block")
NETWORKS = ("general_dit", "ctrl_enc")


def check_with_triton_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = run.out_of_scope()
    if reason:
        pytest.skip(f"{run}: {reason}")
    monkeypatch.setattr(original, "OPS", select("triton"))
    run.checker()(run)


@needs_interpreter
def test_golden_blocks_with_triton_kernels(
    golden_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers from the hand-written kernels, gradients included."""
    if golden_run.case in BLOCKS:
        check_with_triton_kernels(golden_run, monkeypatch)


@needs_interpreter
@pytest.mark.slow
def test_golden_networks_with_triton_kernels(
    golden_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for whole networks, with and without control."""
    if golden_run.case in NETWORKS:
        check_with_triton_kernels(golden_run, monkeypatch)
