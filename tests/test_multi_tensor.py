"""How the multi-tensor ops reach all elements: sizes, strides, classes, traffic, launches."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, adamw_inputs, needs_interpreter
from torch import Tensor

import kernels
from bench.parity import check_rounding, relative_rms, run
from kernels import OPS
from kernels.batches import PIECES, SMALL, batches
from kernels.launch import Launch
from kernels.multi_tensor import DenseRows

# Sizes, strides and mixtures ---------------------------------------------------------------------


@needs_interpreter
def test_offsets_beyond_2_to_31_elements() -> None:
    """A table that says the tensor began 2.7 billion elements earlier: addresses need int64."""
    from kernels.ema.kernel import ema_update_kernel
    from kernels.multi_tensor import Table
    from kernels.table_launch import CHUNK, TYPES, launch_table

    chunk = 41_000
    first = chunk * CHUNK
    assert first > 2**31
    param, shadow = torch.randn(1000), torch.randn(1000)
    expected = 0.75 * shadow + 0.25 * param
    table = Table(
        dtypes=(torch.float32, torch.float32),
        aligned=True,
        addresses=torch.tensor([[t.data_ptr() - 4 * first for t in (param, shadow)]]),
        sizes=torch.tensor([[first + 1000, 0]]),
        chunks=torch.tensor([[0, chunk]], dtype=torch.int32),
        tensors=(param, shadow),
    )
    betas = torch.tensor([0.75], dtype=torch.float64)
    arguments = {"betas": betas, "PARAM": TYPES[torch.float32], "PROFILES": 1}
    launch_table(ema_update_kernel, table, arguments)
    torch.testing.assert_close(shadow, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides_and_dtype(backend: str) -> None:
    """Transposed, expanded and sliced gradients; a transposed and a gappy parameter."""
    torch.manual_seed(0)
    inputs = adamw_inputs(((40, 30),) * 5)
    plain = copy.deepcopy(inputs)
    grads = inputs["grads"]
    grads[0] = grads[0].t().contiguous().t()
    grads[1] = torch.randn(1, 30).expand(40, 30)
    grads[2] = torch.stack([grads[2], grads[2]], dim=-1)[..., 0]
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema", "grads"):
        inputs[name][3] = inputs[name][3].t().contiguous().t()
    inputs["params"][4] = torch.stack([inputs["params"][4]] * 2, dim=-1)[..., 0]
    grads[4] = grads[4].double()
    plain["grads"] = [grad.contiguous() for grad in grads]
    function = OPS["adamw_step"].build(backend)
    function(**inputs)
    function(**plain)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "ema"):
        for index, (found, expected) in enumerate(zip(inputs[name], plain[name], strict=True)):
            assert torch.equal(found, expected), (name, index)


def test_dense_rows_copy_only_what_has_no_common_order() -> None:
    transposed = torch.randn(4, 6).t()
    rows = DenseRows(([transposed], [torch.randn(4, 6).t()]), written=(True, False)).rows
    assert rows[0][1][0].data_ptr() == transposed.data_ptr()
    mixed = DenseRows(([transposed], [torch.randn(6, 4)]), written=(True, False))
    copied = mixed.rows[0][1][0]
    assert copied is not None and copied.data_ptr() != transposed.data_ptr()
    copied.fill_(7.0)
    mixed.write_back()
    assert (transposed == 7.0).all()


@needs_interpreter
@pytest.mark.slow
def test_5000_small_tensors_in_three_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1 + index % 17 for index in range(5000)]
    inputs = adamw_inputs([(size,) for size in sizes])
    launches = count_launches(monkeypatch)
    kernels_of = {name: OPS[name].build("triton") for name in ("adamw_step", "grad_norm")}
    norm = kernels_of["grad_norm"](inputs["grads"])
    expected = run(OPS["adamw_step"].reference, inputs)
    kernels_of["adamw_step"](**inputs)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["grad_norm_kernel", "finalize_norm_kernel", "adamw_step_kernel"]
    torch.testing.assert_close(norm, OPS["grad_norm"].reference(inputs["grads"]))
    for index in range(0, 5000, 611):
        torch.testing.assert_close(inputs["params"][index], expected[f"params[{index}]"])


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Keep a record of launches that still run."""
    from kernels import table_launch
    from kernels.adamw import norm_kernel

    launches: list[Launch] = []
    original = kernels.launch.launch

    def recorded(kernel: Any, grid: Any, arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, {}, "sm_90"))
        original(kernel, grid, arguments, **options)

    for module in (table_launch, norm_kernel):
        monkeypatch.setattr(module, "launch", recorded)
    return launches


@needs_interpreter
def test_mixed_dtypes_and_alignments_are_a_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        adamw_inputs(((100,), (3, 5)), dtype=torch.float32),
        adamw_inputs(((64,),), dtype=torch.bfloat16),
        adamw_inputs(((64,),), dtype=torch.bfloat16, master="remainder"),
        adamw_inputs(((64,),), dtype=torch.float32, offset=1),
        adamw_inputs(((64,),), dtype=torch.float32, ema=False),
        adamw_inputs(((0, 3),), dtype=torch.float16),
    ]
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters")
    inputs = {**parts[0]}
    for name in lists:
        inputs[name] = list(itertools.chain.from_iterable(part[name] for part in parts))
    inputs["ema"] = [
        shadow for part in parts for shadow in part["ema"] or [None] * len(part["params"])
    ]
    launches = count_launches(monkeypatch)
    expected = run(OPS["adamw_step"].reference, inputs)
    found = run(OPS["adamw_step"].build("triton"), inputs)
    assert len(launches) == 5, "one per class with elements"
    for name, tensor in expected.items():
        check_rounding(name, found[name], tensor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    step, average, norm = (
        OPS[name].build(backend) for name in ("adamw_step", "ema_update", "grad_norm")
    )
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    step([], [], [], [], [], None, **options)
    average([], [], 0.9)
    assert norm([]) == 0
    empty = [torch.zeros(0, 3)]
    step(empty, empty, empty, empty, [None], empty, ema_beta=0.5, **options)
    average(empty, empty, 0.5)
    assert norm(empty) == 0


# Traffic and order -------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize(
    ("op", "options", "least"),
    [
        ("adamw_step", {"dtype": torch.bfloat16, "ema": False}, 28),
        ("adamw_step", {"dtype": torch.bfloat16}, 36),
        ("adamw_step", {"dtype": torch.bfloat16, "ema": False, "master": "remainder"}, 26),
        ("adamw_step", {"ema": False}, 28),
        ("adamw_step", {}, 36),
        ("ema_update", {}, 12),
        ("ema_update", {"dtype": torch.bfloat16, "profiles": 3}, 26),
        ("grad_norm", {"dtype": torch.bfloat16}, 2),
    ],
)
def test_bytes_per_parameter(op: str, options: dict[str, Any], least: int) -> None:
    """Counted under the masks while the kernels run; `cost` must name the same minimum."""
    from bench.interpreter import counted

    shapes = ((65_536,), (300, 301))
    inputs = OPS[op].inputs(shapes=shapes, **options)
    elements = 65_536 + 300 * 301
    with counted() as traffic:
        OPS[op].build("triton")(**inputs)
    assert OPS[op].cost(**inputs)[0] == least * elements
    assert least <= traffic.requested / elements <= 1.005 * least
    assert traffic.unique / elements <= 1.005 * least


@needs_interpreter
def test_the_norm_does_not_depend_on_the_order_of_programs() -> None:
    from bench.interpreter import reversed_programs

    grads = OPS["grad_norm"].inputs(shapes=((300, 500), (70_000,), (3,)))["grads"]
    norm = OPS["grad_norm"].build("triton")
    forward = norm(grads)
    with reversed_programs():
        assert torch.equal(norm(grads), forward)
    assert relative_rms(forward, torch.cat([g.flatten() for g in grads]).double().norm()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(backend: str, bad: float) -> None:
    grads = [torch.randn(300, 7), torch.randn(5)]
    norm = OPS["grad_norm"].build(backend)
    assert norm(grads).isfinite()
    grads[1][2] = bad
    assert not norm(grads).isfinite()


def test_the_norm_is_exact_over_many_elements() -> None:
    """float32 sums of this many squares are off by up to a percent."""
    grads = [torch.full((30_000_000,), 0.1)]
    assert relative_rms(OPS["grad_norm"].reference(grads), torch.tensor(3e5**0.5)) < 1e-6


# Batches of the compiled backend -----------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3 * SMALL), max_size=30), st.randoms())
def test_batches_cover_every_element_once(sizes: list[int], random: Any) -> None:
    tensors = [torch.zeros(size) for size in sizes]
    absent = [None] * len(sizes)
    regular = []
    for is_regular, (pieces, nothing) in batches((tensors, absent), (True, False)):
        assert nothing is None
        assert is_regular == (len(pieces) == PIECES)
        assert not is_regular or all(piece.numel() >= 2 for piece in pieces)
        regular.append(is_regular)
        for piece in pieces:
            piece.add_(1.0)
    assert all((tensor == 1.0).all() for tensor in tensors)
    if sum(sizes) >= 2 * PIECES * max(1, len(sizes)):
        assert all(regular), "compiled code is used wherever there is something to gain"


@pytest.mark.slow
def test_code_is_compiled_once_whatever_the_sizes() -> None:
    """Odd, equal, tiny and large sizes: the code for the first ones serves all others."""
    step, norm = (OPS[name].build("compile") for name in ("adamw_step", "grad_norm"))

    def update(sizes: list[int]) -> int:
        inputs = adamw_inputs([(size,) for size in sizes])
        norm(inputs["grads"])
        step(**inputs)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    compiled = update([300_001])
    for sizes in ([123, 32_769, 40_961], [100_003] * 8, [77_777, 33_333, 65_537, 1, 2, 0]):
        assert update(sizes) == compiled, sizes


# What traces and captures programs ---------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_traced_as_three_ops(dtype: torch.dtype) -> None:
    """torch.compile of a whole update, without a break, sees the ops and not their launches."""
    inputs = adamw_inputs(((33, 7), (5,)), dtype=dtype)
    names = ("grad_norm", "adamw_step", "ema_update")
    norm, step, average = (OPS[name].build("triton") for name in names)
    shadows = [param.float() for param in inputs["params"]]

    def update(inputs: dict[str, Any], shadows: list[Tensor]) -> Tensor:
        length = norm(inputs["grads"])
        step(**{**inputs, "clip_coef": (1.0 / length).clamp(max=1.0)})
        average(shadows, inputs["params"], 0.5)
        return length

    expected, traced = (copy.deepcopy((inputs, shadows)) for _ in range(2))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    lengths = [
        update(*expected),
        torch.compile(update, fullgraph=True, backend=backend)(*traced),
    ]
    assert torch.equal(*lengths)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "masters", "ema"):
        for one, two in zip(expected[0][name], traced[0][name], strict=True):
            assert one is two is None or torch.equal(one, two), name
    assert all(torch.equal(one, two) for one, two in zip(expected[1], traced[1], strict=True))
    ours = [str(node.target) for node in graphs[0].graph.nodes if "transfer1" in str(node.target)]
    assert [name.split(".")[1] for name in ours] == list(names)


@needs_interpreter
def test_the_ops_keep_the_rules_of_torch_library() -> None:
    from kernels.adamw.kernel import step_op
    from kernels.adamw.norm_kernel import norm_op
    from kernels.ema.kernel import ema_op

    tensors = [torch.rand(4, 3), torch.rand(5)]
    again = [tensor.clone() for tensor in tensors]
    one = torch.ones(1)
    torch.library.opcheck(norm_op, (tensors,))
    torch.library.opcheck(ema_op, (again, tensors, one.double()))
    lists = [[tensor.clone() for tensor in tensors] for _ in range(4)]
    arguments = (
        *lists, [], [-1, -1], again, [0, 1],
        one, one.int(), None, None, None, one.double(), None, [0.9, 0.99], 1e-8, 0.1, True, True,
    )  # fmt: skip
    torch.library.opcheck(step_op, arguments)
