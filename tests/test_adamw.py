"""The arithmetic of `adamw_step`: long runs, skips, bfloat16 without masters, any options."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, adamw_inputs, needs_interpreter
from torch import Tensor

from bench.parity import check_rounding, run
from kernels import OPS
from kernels.adamw.bfloat16 import join, round_stochastically, rounding_key, split
from kernels.adamw.reference import StepScalars, step_scalars, update_lists
from kernels.registry import FLOATS

# Arithmetic over many steps ----------------------------------------------------------------------


def exact_adamw(state: dict[str, np.ndarray], grad: np.ndarray, step: int, **h: float) -> None:
    """One step in float64, written after the paper."""
    g = grad * h["scale"]
    state["m"] = h["beta1"] * state["m"] + (1 - h["beta1"]) * g
    state["v"] = h["beta2"] * state["v"] + (1 - h["beta2"]) * g * g
    update = (state["m"] / (1 - h["beta1"] ** step)) / (
        np.sqrt(state["v"] / (1 - h["beta2"] ** step)) + h["eps"]
    )
    state["p"] = state["p"] - h["lr"] * (update + h["decay"] * state["p"])
    state["ema"] = h["beta"] * state["ema"] + (1 - h["beta"]) * state["p"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_200_steps_are_within_their_roundings_of_float64(backend: str) -> None:
    """Within 10 ulp (2^-23 of the largest value) after 200 steps.

    Each step rounds p by up to half an ulp. Roundings are random, so they add up to about
    sqrt(200) * 0.3 = 4 ulp, in the worst of hundreds of elements to twice that; the update's own
    error, a few of its ulp, is a thousand times less. An error that is the same in every step, as
    from rounding 1 - lr * weight_decay, would show as 30 ulp.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 7), (5,), (1,), (257,)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    averages = [param.clone() for param in params]
    moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    exact = [
        {name: tensor.double().numpy() for name, tensor in zip("pmv", entry, strict=True)}
        for entry in zip(params, *moments, strict=True)
    ]
    for entry in exact:
        entry["ema"] = entry["p"].copy()
    h = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-10, "decay": 0.1, "scale": 0.35}
    function = OPS["adamw_step"].build(backend)
    masters: list[Tensor | None] = [None] * len(params)
    for step in range(1, 201):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        beta = (1 - 1 / step) ** 7.9
        function(
            params, grads, *moments, masters, averages,
            lr=torch.tensor(1e-3, dtype=torch.float64), betas=(0.9, 0.99), eps=1e-10,
            weight_decay=0.1, step=torch.tensor([step], dtype=torch.int32),
            grad_scale=torch.tensor(0.5), clip_coef=torch.tensor([0.7]),
            found_inf=torch.zeros(1), ema_beta=beta,
        )  # fmt: skip
        for entry, grad in zip(exact, grads, strict=True):
            exact_adamw(entry, grad.double().numpy(), step, beta=beta, **h)
    for index, entry in enumerate(exact):
        found = {"p": params, "m": moments[0], "v": moments[1], "ema": averages}
        for name, tensors in found.items():
            largest = np.abs(entry[name]).max()
            error = np.abs(tensors[index].double().numpy() - entry[name]).max()
            assert error <= 10 * 2**-23 * largest, (name, index, error / largest * 2**23)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_one_pass_equals_two_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    inputs = adamw_inputs(((513, 131), (96,), (7, 5)), dtype=dtype)
    together, apart = copy.deepcopy(inputs), copy.deepcopy(inputs)
    step, average = (OPS[name].build(backend) for name in ("adamw_step", "ema_update"))
    step(**together)
    step(**{**apart, "ema": None, "ema_beta": None})
    sources = [
        param if master is None else master
        for param, master in zip(apart["params"], apart["masters"], strict=True)
    ]
    average(apart["ema"], sources, apart["ema_beta"])
    for one, two in zip(together["ema"], apart["ema"], strict=True):
        assert torch.equal(one, two)
    for one, two in zip(together["params"], apart["params"], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"adam_w_mode": False}])
def test_a_skipped_update_changes_no_bit(backend: str, options: dict[str, Any]) -> None:
    inputs = adamw_inputs(((513, 131), (3,)), **options)
    inputs["found_inf"] = torch.ones(1, dtype=torch.int32)
    for grad in inputs["grads"]:
        grad[0] = float("nan")
    after = run(OPS["adamw_step"].build(backend), inputs)
    for name, tensor in after.items():
        list_name, _, index = name.rstrip("]").partition("[")
        before = inputs[list_name][int(index)]
        assert torch.equal(tensor.isnan(), before.isnan()), name
        assert torch.equal(tensor.nan_to_num(), before.nan_to_num()), name


def test_without_looking_at_the_flag_a_skipped_update_changes_nothing_either() -> None:
    """On a GPU the references mask the update instead of waiting for the flag."""
    inputs = adamw_inputs(((33, 7),), dtype=torch.bfloat16)
    inputs["grads"][0][0] = float("nan")
    before = copy.deepcopy(inputs)
    scalars: StepScalars = step_scalars(
        torch.device("cpu"), 1e-3, (0.9, 0.99), 1e-8, 0.1, 3, None, None, 0.9, True
    )
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "ema")
    for mode in (True, False):
        update_lists(*(inputs[name] for name in lists), scalars, torch.tensor(False), mode)
    for name in set(lists) - {"grads"}:
        assert torch.equal(inputs[name][0], before[name][0]), name


# bfloat16 without float32 masters ----------------------------------------------------------------


def test_a_remainder_makes_the_exact_float32() -> None:
    """Also of zeros, infinities, subnormals, the largest numbers, ties and NaNs."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).int()
    special = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        1e-40,
        -1e-45,
        3.4e38,
        1.00390625,
        float("nan"),
    ]
    weights = torch.cat([bits.view(torch.float32), torch.tensor(special)])
    param, remainder = split(weights)
    again = join(param, remainder)
    finite = ~weights.isnan()
    assert torch.equal(again[finite].view(torch.int32), weights[finite].view(torch.int32))
    assert again[~finite].isnan().all() and param[~finite].isnan().all()
    nearest = weights.bfloat16()
    tie = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    same = (param == nearest) | tie | ~finite
    assert same.all(), "the parameter is the nearest bfloat16 except at ties"


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_a_nan_weight_stays_visible_with_a_remainder(backend: str) -> None:
    """Rounded up, the bits of a GPU's NaN (0x7FFFFFFF) would be those of -0."""
    inputs = adamw_inputs(((2048,),), dtype=torch.bfloat16, master="remainder")
    inputs["grads"][0][:5] = float("nan")
    OPS["adamw_step"].build(backend)(**inputs)
    assert inputs["params"][0][:5].isnan().all()
    assert join(inputs["params"][0], inputs["masters"][0])[:5].isnan().all()
    assert inputs["params"][0][5:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_stochastic_rounding_is_unbiased(backend: str) -> None:
    """The mean over many draws is the float32 weight, within five standard errors."""
    count = 4096
    weight = 1.0 + 0.3 * 2**-7  # between two bfloat16 numbers, 2^-7 apart
    inputs = adamw_inputs(((count,),) * 8, dtype=torch.bfloat16, master="none", ema=False)
    for name, value in {"params": 1.0, "grads": 0.0, "exp_avgs": 0.0, "exp_avg_sqs": 1.0}.items():
        for tensor in inputs[name]:
            tensor.fill_(value)
    # No gradient, and a decay that moves 1 to `weight`.
    inputs |= {"lr": 1.0, "weight_decay": 0.0, "bias_correction": False, "betas": (0.0, 0.0)}
    inputs |= {"eps": 1.0, "grad_scale": None, "clip_coef": None}
    for grad in inputs["grads"]:
        grad.fill_(-1.0)
    inputs["lr"] = 2 * (weight - 1.0)  # the update is g / (|g| + eps) = -1/2
    OPS["adamw_step"].build(backend)(**inputs)
    rounded = torch.cat(inputs["params"]).double()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    deviation = 2**-7 * (0.3 * 0.7 / rounded.numel()) ** 0.5
    assert abs(rounded.mean().item() - weight) < 5 * deviation
    assert not torch.equal(inputs["params"][0], inputs["params"][1]), "each tensor draws its own"


def test_stochastic_rounding_draws_anew_with_every_step_and_keeps_what_needs_none() -> None:
    weights = torch.cat([torch.randn(1000), torch.tensor([float("inf"), float("nan"), 0.5, -0.0])])
    first, second = (
        round_stochastically(weights, rounding_key(0, torch.tensor(step), 0)) for step in (1, 2)
    )
    assert (first[:1000] != second[:1000]).float().mean() > 0.3
    assert first[1000].isinf() and first[1001].isnan()
    assert torch.equal(first[1002:], weights[1002:].bfloat16())
    error = (first[:1000].float() - weights[:1000]).abs()
    assert (error <= weights[:1000].abs() * 2**-7).all()


# Random shapes, dtypes and options ---------------------------------------------------------------


def options_of_a_step() -> Iterator[Any]:
    low = st.sampled_from(["float32", "remainder", "none"])
    return st.fixed_dictionaries(
        {
            "shapes": st.lists(
                st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6
            ),
            "dtype": st.sampled_from(FLOATS),
            "grad_dtype": st.sampled_from([*FLOATS, None]),
            "master": low,
            "ema": st.booleans(),
            "offset": st.integers(0, 3),
            "adam_w_mode": st.booleans(),
            "bias_correction": st.booleans(),
            "weight_decay": st.sampled_from([0.0, 0.3]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)]),
            "step": st.sampled_from([1, 2, 1000, 10**6]),
            "clip_coef": st.sampled_from([None, 0.25]),
        }
    )


@needs_interpreter
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options_of_a_step(), st.integers(0, 2**16))
def test_any_step_equals_the_reference(options: dict[str, Any], seed: int) -> None:
    if options["dtype"] == torch.float16 and options["master"] != "float32":
        options["master"] = "float32"
    inputs = adamw_inputs(seed=seed, **options)
    expected = run(OPS["adamw_step"].reference, inputs)
    found = run(OPS["adamw_step"].build("triton"), inputs)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6, msg=name)
        elif tensor.numel() > 1000:
            check_rounding(name, tensor, expected[name])


@needs_interpreter
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.integers(0, 50), max_size=3).map(tuple), min_size=1, max_size=5),
    st.sampled_from(FLOATS),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_any_average_equals_the_reference(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, profiles: int, offset: int
) -> None:
    op = OPS["ema_update"]
    inputs = op.inputs(shapes=shapes, dtype=dtype, profiles=profiles, offset=offset)
    expected = run(op.reference, inputs)
    for name, tensor in run(op.build("triton"), inputs).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)


# Wrong arguments ---------------------------------------------------------------------------------


def broken(inputs: dict[str, Any], name: str, index: int | None, value: Any) -> dict[str, Any]:
    inputs = copy.deepcopy(inputs)
    if index is None:
        inputs[name] = value
    else:
        inputs[name][index] = value
    return inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("grads", 1, torch.zeros(2), r"grads\[1\] has shape \(2,\), but params\[1\] has \(3, 5\)"),
        ("exp_avgs", None, [torch.zeros(4)], "exp_avgs has 1 entries, but params has 2"),
        ("masters", None, [None], "masters has 1 entries, but params has 2"),
        ("exp_avg_sqs", 0, torch.zeros(4).half(), r"exp_avg_sqs\[0\] .*float16.*float32"),
        ("ema", 1, torch.zeros(3, 5).bfloat16(), r"ema\[1\] of shape \(3, 5\) is torch.bfloat16"),
        ("grads", 0, torch.zeros(4, dtype=torch.int32), r"grads\[0\] .*int32"),
        ("grads", 0, torch.zeros(4).to_sparse(), r"grads\[0\] has layout torch.sparse_coo"),
        ("params", 0, torch.zeros(4).double(), r"params\[0\] .*float64.*must be torch.float32"),
        ("params", 0, torch.zeros(4).bfloat16(), r"params\[0\] .*bfloat16 and has no float32 mas"),
        ("masters", 0, torch.zeros(4), r"params\[0\] .*float32 and needs no master"),
        ("lr", None, -0.1, r"lr=-0.1 must be 0 or more"),
        ("eps", None, -1e-8, r"eps=-1e-08"),
        ("weight_decay", None, -1.0, "weight_decay=-1.0"),
        ("betas", None, (1.0, 0.9), r"betas\[0\]=1.0 must be in \[0, 1\)"),
        ("betas", None, (0.9, -0.1), r"betas\[1\]=-0.1"),
        ("ema_beta", None, None, "ema_beta is None"),
        ("ema_beta", None, 1.5, r"ema_beta=1.5"),
        ("exp_avgs", 1, torch.zeros(3, 5, device="meta"), r"exp_avgs\[1\] is on meta"),
    ],
)
def test_wrong_arguments_of_a_step_are_named(
    backend: str, name: str, index: int | None, value: Any, message: str
) -> None:
    inputs = adamw_inputs(((4,), (3, 5)))
    before = copy.deepcopy(inputs)
    with pytest.raises(ValueError, match=message):
        OPS["adamw_step"].build(backend)(**broken(inputs, name, index, value))
    assert torch.equal(inputs["params"][0], before["params"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_of_an_average_are_named(backend: str) -> None:
    average = OPS["ema_update"].build(backend)
    params = [torch.zeros(3), torch.zeros(2)]
    with pytest.raises(ValueError, match="1 shadows for 2 params and 1 betas"):
        average([torch.zeros(3)], params, 0.9)
    with pytest.raises(ValueError, match=r"params\[1\] has shape \(2,\), but shadows\[1\] has"):
        average([torch.zeros(3), torch.zeros(3)], params, 0.9)
    with pytest.raises(ValueError, match=r"shadows\[0\] .*bfloat16, but must be torch.float32"):
        average([torch.zeros(3).bfloat16(), torch.zeros(2)], params, 0.9)
    with pytest.raises(ValueError, match="beta=-0.1"):
        average([torch.zeros(3), torch.zeros(2)], params, -0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_gradient_has_no_norm(backend: str) -> None:
    with pytest.raises(ValueError, match=r"grad_norm: grads\[1\] has layout torch.sparse_coo"):
        OPS["grad_norm"].build(backend)([torch.zeros(3), torch.zeros(3).to_sparse()])


def test_half_precision_has_no_remainder() -> None:
    inputs = adamw_inputs(((4,),), dtype=torch.float16)
    inputs["masters"] = [torch.zeros(4, dtype=torch.int16)]
    with pytest.raises(ValueError, match=r"only bfloat16 has a remainder"):
        OPS["adamw_step"].reference(**inputs)
