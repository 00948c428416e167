"""Named ranges and traces of a run, and that a run without them has nothing of them."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyTrainer, tiny_config, train

from transfer1.config import ConfigError

BLOCK = "base_model.net.blocks.block0"
SUBLAYERS = ["SelfAttention", "CrossAttention", "MLP"]


class Recorder:
    """Stands in for the package nvtx: keeps the names of ranges with those around them."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def push_range(self, name: str) -> int:
        self.open.append(name)
        self.seen.append(tuple(self.open))
        return len(self.open)

    def pop_range(self) -> int:
        self.open.pop()
        return 0


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "nvtx", recorder)
    return recorder


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_ranges_of_a_run(tmp_path: Path, nvtx: Recorder, mode: str) -> None:
    train(
        tmp_path,
        "trainer.nvtx=true",
        "trainer.max_iter=1",
        f"model.net.activation_checkpoint={mode}",
        f"model.net_ctrl.activation_checkpoint={mode}",
    )
    assert nvtx.open == [], "every range is closed"
    top = [names[0] for names in nvtx.seen if len(names) == 1]
    assert top[:5] == ["data", "forward", "backward", "gradient norm", "optimizer"]
    assert top.count("checkpoint") == 1
    assert ("optimizer", "ema") in nvtx.seen
    assert ("forward", "encode") in nvtx.seen
    for block in (BLOCK, "base_model.net.blocks.block1", "net.blocks.block0"):
        inner = [names[2] for names in nvtx.seen if names[:2] == ("forward", block) and names[2:]]
        assert inner == SUBLAYERS, block
    recomputed = [names for names in nvtx.seen if names[:2] == ("backward", "net.blocks.block0")]
    assert bool(recomputed) == (mode != "none")


def test_ranges_change_no_number(tmp_path: Path, nvtx: Recorder) -> None:
    marked = train(tmp_path / "marked", "trainer.nvtx=true").state.model.state_dict()
    plain = train(tmp_path / "plain").state.model.state_dict()
    assert all(value.equal(plain[name]) for name, value in marked.items())


def test_a_run_without_them_has_no_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)  # importing it would fail
    trainer = train(tmp_path, "trainer.max_iter=1")
    for name, module in trainer.state.model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
    state = trainer.state
    for owner in (trainer, trainer.gradients, state.optimizer, state.ema, trainer.checkpointer):
        names = [name for name, value in vars(owner).items() if callable(value)]
        assert not {"compute_loss", "measure", "step", "update", "save"} & set(names), owner


def test_without_the_package_the_message_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ConfigError, match=r"trainer\.nvtx=true needs the package nvtx.*install"):
        TinyTrainer(tiny_config(tmp_path, "trainer.nvtx=true"))


def test_the_real_package_takes_our_ranges(tmp_path: Path) -> None:
    pytest.importorskip("nvtx")
    train(tmp_path, "trainer.nvtx=true", "trainer.max_iter=1")


def names_in(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_traces_of_chosen_updates(tmp_path: Path) -> None:
    train(tmp_path, "trainer.profile=[2,3]", "trainer.max_iter=3", "trainer.grad_accum_iter=2")
    folder = tmp_path / "profile"
    traces = sorted(folder.iterdir())
    assert [trace.name for trace in traces] == ["iter_000000002.json.gz", "iter_000000003.json.gz"]
    for trace in traces:
        names = names_in(trace)
        assert names.count("forward") == names.count("data") == 2, "both micro-steps"
        assert names.count("optimizer") == 1
        assert names.count(BLOCK) == 2
    assert "trace of update 3" in (tmp_path / "stdout.log").read_text()


@pytest.mark.parametrize("updates", ["[0]", "[1,5]"])
def test_updates_that_no_run_has_are_refused(tmp_path: Path, updates: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.profile=.*from 1 to trainer\.max_iter=2"):
        TinyTrainer(tiny_config(tmp_path, f"trainer.profile={updates}"))
