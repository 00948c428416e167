"""Command-line options and fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import goldens
import pytest

from kernels.launch import interpreting


def pytest_configure(config: pytest.Config) -> None:
    if interpreting():
        from bench.interpreter import repair

        repair()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, help="folder of golden cases to check instead")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_run" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden-dir")
        runs = goldens.find_runs(folder)
        if not runs:
            raise pytest.UsageError(f"no golden run under {folder or goldens.COMMITTED}")
        metafunc.parametrize("golden_run", runs, ids=str)
