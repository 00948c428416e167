"""The table of ops: how it resolves; every op, case, dtype and backend against its reference."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from op_cases import all_cases, needs_interpreter

import kernels
from bench.parity import check_parity, inputs_of
from kernels import Op


def test_auto_is_what_the_table_says() -> None:
    ops = kernels.select("auto", device="cpu")
    for name, backend in ops.table.items():
        assert backend == kernels.registry.AUTO["cpu"].get(name, "reference")
        assert kernels.registry.AUTO["cuda"].get(name, "reference") == "reference", "not measured"
    assert ops.gated_residual is kernels.OPS["gated_residual"].reference


def test_auto_without_a_compiler_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.registry.has_cpp_compiler", lambda: False)
    assert set(kernels.select("auto", device="cpu").table.values()) == {"reference"}


def test_one_op_may_differ_from_the_rest() -> None:
    ops = kernels.select("reference", attention="compile")
    assert ops.table["attention"] == "compile"
    assert {b for op, b in ops.table.items() if op != "attention"} == {"reference"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"default": "cuda"}, "auto, triton, compile, reference"),
        ({"attention": "fast"}, "kernels.attention=fast: choose one of"),
        ({"atention": "reference"}, "unknown op atention; ops are .*attention"),
    ],
)
def test_a_wrong_choice_names_the_right_ones(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.select(**choice)


def test_an_op_without_a_kernel_says_so() -> None:
    op = dataclasses.replace(kernels.OPS["attention"], triton=None)
    with pytest.raises(ValueError, match=r"no Triton kernel; set kernels\.attention=reference"):
        op.build("triton")


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.registry.has_cpp_compiler", lambda: False)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        kernels.select("compile")


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"adamw_step=triton.*need a GPU.*TRITON_INTERPRET=1"):
        kernels.select("reference", adamw_step="triton")
    with pytest.raises(ValueError, match=r"ema_update=reference"):
        kernels.OPS["ema_update"].build("triton", torch.device("cpu"))


def test_ops_are_frozen() -> None:
    ops = kernels.select("reference")
    with pytest.raises(AttributeError, match="frozen"):
        ops.attention = None
    assert copy.deepcopy(ops) is ops


def test_two_ops_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        kernels.register(kernels.OPS["attention"])


@needs_interpreter
@pytest.mark.parametrize(("op", "case", "dtype"), all_cases(triton=True))
def test_triton_equals_reference(op: Op, case: str, dtype: torch.dtype) -> None:
    check_parity(op, op.build("triton"), inputs_of(op, case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "case", "dtype"), all_cases())
def test_compile_equals_reference(op: Op, case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(op, case, dtype)
    if inputs.get("rounding_seed") is not None:
        with pytest.raises(ValueError, match=r"adamw_step=compile does not round stochastically"):
            op.build("compile")(**inputs)
        return
    check_parity(op, op.build("compile"), inputs)


def test_every_op_has_a_cost_and_sizes_to_time() -> None:
    for op in kernels.OPS.values():
        for name, case in op.cases.items():
            size, flops = op.cost(**inputs_of(op, name, case.dtypes[0]))
            assert size > 0 and flops > 0, (op.name, name)
