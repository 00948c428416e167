"""The work of `python -m bench.ops` for pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.parity import differentiable, inputs_of
from bench.rivals import PEERS
from bench.timing import WARM_UP, wait
from bench.work import FORWARD, GPU_SIZES, TRAINING, Work, backends_on, works
from kernels import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 9


def cases() -> Iterator[Any]:
    """(op and size, pass, rival) of everything that is timed on this device."""
    for name, op in OPS.items():
        first, spec = next(iter(op.cases.items()))
        is_trained = differentiable(inputs_of(op, first, spec.dtypes[0]))
        for size in op.sizes:
            if DEVICE == "cpu" and size in GPU_SIZES:
                continue
            for passes in (FORWARD, TRAINING) if is_trained else ("",):
                for rival in (*backends_on(DEVICE, op), *PEERS.get(name, ()), "limit"):
                    words = [name, size, passes, rival]
                    case_id = "-".join(word.replace(" ", "_") for word in words if word)
                    yield pytest.param((name, size), passes, rival, id=case_id)


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> dict[str, Work]:
    """All passes of one op and size; an op that fails parity is an error here."""
    name, size = request.param
    return {work.passes: work for work in works(OPS[name], DEVICE, [size])}


@pytest.mark.parametrize(("checked", "passes", "rival"), list(cases()), indirect=["checked"])
def test_op(checked: dict[str, Work], passes: str, rival: str, benchmark: Any) -> None:
    work = checked[passes]
    calls = {**work.ours, **work.peers, "limit": work.limit[1]}
    if rival not in calls:
        pytest.skip(f"{rival} does not do this work on {DEVICE}")

    def call() -> None:
        calls[rival]()
        wait()

    benchmark.group = work.name
    benchmark.extra_info.update(bytes=work.bytes, flops=work.flops, threads=torch.get_num_threads())
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=WARM_UP)
