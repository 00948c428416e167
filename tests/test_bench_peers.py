"""Peers: that they do the work of the op they are compared with, and what their table says."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import networks, ops, peers, timing, work
from bench.costs import training_cost
from bench.flops import count_flops
from bench.parity import relative_rms
from bench.rivals import AVERAGES, MULTI_TENSOR, PEERS, peers_of, torch_update
from bench.work import FORWARD, TRAINING
from kernels import OPS, Case


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.MATRIX, "cpu", 128)


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_peers_are_ours(name: str) -> None:
    inputs = OPS["ema_update"].inputs()
    update, shadows = AVERAGES[name](copy.deepcopy(inputs))
    update()
    OPS["ema_update"].reference(**inputs)
    for found, expected in zip(shadows, inputs["shadows"], strict=True):
        torch.testing.assert_close(found.view_as(expected), expected)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_updates_of_peers_are_ours(how: dict[str, bool]) -> None:
    """From moments of zero, as the peer starts, and with its coefficient of clipping."""
    inputs = OPS["adamw_step"].inputs(grad_scale=None, found_inf=None)
    norm = torch.cat([grad.flatten() for grad in inputs["grads"]]).norm()
    inputs |= {"step": 1, "clip_coef": 1 / (norm + 1e-6)}
    for moment in (*inputs["exp_avgs"], *inputs["exp_avg_sqs"]):
        moment.zero_()
    update = torch_update(inputs, **how)
    update()
    theirs = inspect.getclosurevars(update).nonlocals["params"]
    OPS["adamw_step"].reference(**inputs)
    for found, expected in zip(theirs, inputs["params"], strict=True):
        torch.testing.assert_close(found.data, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PEERS if name not in MULTI_TENSOR])
def test_other_peers_compute_the_same(name: str) -> None:
    op = OPS[name]
    for case in op.cases.values():
        torch.manual_seed(0)
        inputs = op.inputs(**case.options)
        expected = _listed(op.reference(**inputs))
        for peer, call in peers_of(name, inputs, torch.float32).items():
            for found, wanted in zip(_listed(call()), expected, strict=True):
                assert relative_rms(found, wanted) < 1e-5, peer


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def test_norms_of_peers_are_ours() -> None:
    inputs = OPS["grad_norm"].inputs()
    expected = OPS["grad_norm"].reference(**inputs)
    for call in peers_of("grad_norm", inputs, torch.float32).values():
        torch.testing.assert_close(call(), expected)


def test_lower_precision_has_no_peer_that_keeps_float32_numbers() -> None:
    inputs = OPS["adamw_step"].inputs(dtype=torch.bfloat16)
    assert peers_of("adamw_step", inputs, torch.bfloat16) == {}


def test_least_bytes_of_a_backward_pass() -> None:
    """Bytes per element in bfloat16, forward and backward, in the limit of many tokens."""
    expected = {
        "adaln_modulate": 4 + 6,
        "residual_adaln_modulate": 8 + 12,
        "gated_residual": 6 + 6,
        "qk_norm_rope": 8 + 12,
    }
    options: dict[str, dict[str, Any]] = {
        "adaln_modulate": {"position": None},
        "gated_residual": {"addend": False},
        "qk_norm_rope": {"N": 1, "K": 64},
    }
    for name, least in expected.items():
        op, tokens = OPS[name], 4000
        given = options.get(name, {})
        width = {} if name == "qk_norm_rope" else {"D": 64}
        inputs = op.inputs(dtype=torch.bfloat16, B=1, L=tokens, **width, **given)
        if name == "qk_norm_rope":
            inputs["rope_2LR"] = None  # read by all heads, negligible where there are many
        size, _ = training_cost(op, inputs, _listed(op.reference(**inputs)))
        assert size / (64 * tokens) == pytest.approx(least, rel=0.01), name


def test_attention_on_a_cpu_is_counted() -> None:
    q = torch.randn(1, 2, 64, 32, requires_grad=True)

    def train() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    assert count_flops(train) == (2 + 5) * 2 * (2 * 64 * 64 * 32)


def test_the_table_of_peers_says_who_is_ahead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "has_cpp_compiler", lambda: False)
    monkeypatch.setattr(networks, "SIZES", {"one": networks.Size(64, 1, 1, (1, 4, 4))})
    monkeypatch.setattr("kernels.registry.has_cpp_compiler", lambda: False)
    file = tmp_path / "peers.json"
    peers.main(["--quick", "--rounds", "1", "--json", str(file)])
    content = json.loads(file.read_text())
    assert content["machine"]["timm"] == "1.0.31"
    works = [line["work"] for line in content["verdict"]]
    assert works == [
        "adamw_step ragged float32",
        "grad_norm ragged float32",
        "ema_update ragged float32",
        f"network one float32 threads {torch.get_num_threads()}",
        f"network one bfloat16 threads {torch.get_num_threads()}",
    ]
    for line in content["verdict"]:
        assert line["speed"] == pytest.approx(line["its ms"] / line["ms"])
        assert line["ahead"] in ("yes", "even", "no")
    assert "| ahead |" in capsys.readouterr().out


def test_who_is_slower_is_not_ahead() -> None:
    rows = [
        {"op": "o", "size": "s", "dtype": "d", "pass": "", "rival": rival, "kind": kind, "ms": ms}
        for rival, kind, ms in (
            ("compile", "ours", 2.0),
            ("reference", "ours", 3.0),
            ("fast", "peer", 1.0),
            ("slow", "peer", 9.0),
            ("memory pass", "limit", 0.5),
        )
    ]
    (line,) = peers.optimizer_verdict(rows)
    assert (line["transfer1"], line["fastest peer"]) == ("compile", "fast")
    assert (line["speed"], line["ahead"]) == (0.5, "no")
    rows[2]["ms"] = 1.99
    assert peers.optimizer_verdict(rows)[0]["ahead"] == "even"


def test_forward_and_backward_of_an_op() -> None:
    """Attention is held against a matrix product, what only moves tokens against memory."""
    sizes = {"attention": {"B": 1, "L": 256, "M": 256, "N": 2, "K": 64}, "gated_residual": {}}
    shown = set()
    for name, options in sizes.items():
        op = dataclasses.replace(OPS[name], sizes={"small": Case(options)}, cases={})
        for row in ops.time_op(op, None, "cpu", rounds=1, backends=["reference"]):
            shown.add((name, row["pass"], row["rival"]))
            assert row["ms"] > 0 and (row["GB/s"] or row["GFLOP/s"]), row
    limits = {"attention": "matrix product", "gated_residual": "memory pass"}
    for passes in (FORWARD, TRAINING):
        for name, limit in limits.items():
            assert {(name, passes, "reference"), (name, passes, limit)} <= shown
        assert ("gated_residual", passes, "torch eager") in shown
