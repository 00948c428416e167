"""`python -m transfer1.plan`: predicted memory against what a real run takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import OVERRIDES, ROOT, composed

from transfer1.plan import Layout, Planner, main, rows
from transfer1.training.memory import Tracker, measure

BLOCK = ("model.net.activation_checkpoint=block", "model.net_ctrl.activation_checkpoint=block")


def run(folder: Path, pixels: int, width: int, *overrides: str) -> dict[str, int]:
    """Planned and measured peak of a training run in a process of its own."""
    script = Path(__file__).with_name("measure_memory.py")
    # Freed tensors go back to the system at once, so that the process's memory is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT.parents[1]), str(script.parent)])
    found = subprocess.run(
        [sys.executable, script, folder, str(pixels), str(width), *overrides],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("pixels", "width", "overrides"),
    [
        (128, 384, ("model.finetune_base_model=true",)),
        *(
            pytest.param(256, 512, overrides, marks=pytest.mark.slow)
            for overrides in ((), BLOCK, ("lora=linear",), ("model.finetune_base_model=true",))
        ),
    ],
)
def test_prediction_against_a_run(
    pixels: int, width: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    facts = run(tmp_path, pixels, width, *overrides)
    ratio = facts["planned"] / facts["measured"]
    print(f"planned {facts['planned'] / 2**20:.0f} MiB, {ratio:.3f} of what was measured")
    assert 0.9 < ratio < 1.1, facts


def test_what_is_trained_decides() -> None:
    whole = measure(composed((*OVERRIDES, "model.finetune_base_model=true")))
    frozen = measure(composed(OVERRIDES))
    adapters = measure(composed((*OVERRIDES, "lora=attention", "model.lora.rank=1")))
    assert whole.trained > frozen.trained > adapters.trained > 0
    assert whole.gradients > frozen.gradients > adapters.gradients
    assert frozen.moments == 2 * frozen.gradients  # float32, like the parameters here
    assert measure(composed((*OVERRIDES, *BLOCK))).activations < frozen.activations


def test_tracker_counts_what_is_alive() -> None:
    import torch

    with Tracker() as tracker:
        a = torch.empty(100, device="meta")
        b = a + 1
        view = b[:10]
        assert tracker.live == 800
        del a
        assert tracker.live == 400
        del b
        assert tracker.live == 400
        del view
    assert (tracker.live, tracker.peak) == (0, 800)


def test_layouts_divide() -> None:
    memory = measure(composed(OVERRIDES))
    whole, sharded = rows(memory, Layout()), rows(memory, Layout(shards=4))
    assert sharded["moments of the optimizer"] == whole["moments of the optimizer"] / 4
    assert sum(whole.values()) == memory.peak
    clips = replace(memory, step=0)  # without the update, activations decide
    working = "working memory of a step at its peak"
    assert rows(clips, Layout(context=2))[working] < rows(clips, Layout())[working]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--config={ROOT}", "--gpus", "1", "--memory", "24", "--", *OVERRIDES]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "whole model on each GPU" in text and "1 x 24 GB" in text and "peak" in text
    assert main([f"--config={ROOT}", "--gpus", "0", "--", *OVERRIDES]) == 2


def test_too_small_a_machine() -> None:
    planner = Planner(str(ROOT), [*OVERRIDES])
    memory = measure(planner.config)
    planner.measure = lambda changes: memory  # type: ignore[method-assign]
    assert planner.propose(1, 1e-6) is None
    assert planner.propose(1, 1) is not None
