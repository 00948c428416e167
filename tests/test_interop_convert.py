"""`python -m transfer1.interop`: every layout of the original and back, bit by bit."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import OVERRIDES, ROOT, composed, train
from torch import Tensor

from transfer1.interop import keys
from transfer1.interop.__main__ import main
from transfer1.interop.files import Scratch, equal_bits
from transfer1.interop.layouts import read
from transfer1.model.transfer import build_transfer

CONFIG = f"--config={ROOT}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny run, weights, averages and optimizer in it."""
    folder = tmp_path_factory.mktemp("job")
    train(folder, "trainer.max_iter=2")
    return folder / "checkpoints" / "iter_000000002.pt"


def parts(path: Path) -> tuple[dict[str, Tensor], Any, int]:
    found = read(path, Scratch(path.parent))
    return found.tensors(), found.record, found.iteration


def assert_same(first: Path, second: Path) -> None:
    a, b = parts(first), parts(second)
    assert a[0].keys() == b[0].keys() and a[1:] == b[1:]
    assert any("-" in name for name in a[0]) and a[2] == 2
    assert all(equal_bits(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("tp2", "iter_000000002.pt"),
        ("fsdp", "iter_000000002.pt"),
        ("portable", "x.safetensors"),
        ("portable", "x.pt"),
        ("original", "x.pt"),
    ],
)
def test_there_and_back(layout: str, name: str, trained: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there" / name, tmp_path / "back" / "back.pt"
    assert main(["convert", str(trained), str(there), "--to", layout]) == 0
    assert main(["convert", str(there), str(back), "--to", "original"]) == 0
    assert_same(trained, back)
    assert not list(tmp_path.rglob(".*")), "scratch or temporary files stayed"
    kept = torch.load(back, weights_only=True, map_location="cpu").keys()
    assert ("optimizer" in kept) == (layout in ("fsdp", "original"))


def test_files_of_tensor_parallel_ranks(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "iter_000000002.pt"
    assert main(["convert", str(trained), str(target), "--to", "tp2"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {target.name, *(f"iter_000000002_model_mp_{rank}.pt" for rank in (0, 1))}
    assert torch.load(target, weights_only=True) == {"grad_scaler": {}, "iteration": 2}
    shard = torch.load(tmp_path / "iter_000000002_model_mp_1.pt", weights_only=True)
    whole = torch.load(trained, weights_only=True)["model"]
    key = "net.blocks.block0.blocks.0.block.attn.to_out.0.weight"
    assert torch.equal(shard["model"][key], whole["model"][key][:, 24:])
    assert torch.equal(
        shard["ema"][key.replace(".", "-")], whole["ema"][key.replace(".", "-")][:, 24:]
    )


def test_ranks_must_divide_the_weights(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(trained), str(tmp_path / "x.pt"), "--to", "tp7"]) == 2
    assert "does not divide by 7 ranks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = trained.read_bytes()
    assert main(["convert", str(trained), str(trained), "--to", "portable"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert trained.read_bytes() == before


def test_diffusers_and_back(trained: Path, tmp_path: Path) -> None:
    folder, back = tmp_path / "diffusers", tmp_path / "base.pt"
    names = [f"--config={ROOT}", "--", *OVERRIDES]
    assert main(["convert", str(trained), str(folder), "--to", "diffusers", *names]) == 0
    assert main(["convert", str(folder), str(back), "--to", "original"]) == 0
    base, _ = keys.base_state(read(trained, Scratch(tmp_path)).model)
    state = {name: tensor for name, tensor in base.items() if name.startswith("net.")}
    found = read(back, Scratch(tmp_path)).model
    assert found.keys() == state.keys()
    assert all(equal_bits(found[name], state[name]) for name in state)
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed: its own reader was not asked")
    from diffusers import CosmosTransformer3DModel

    described = json.loads((folder / "config.json").read_text())
    network = CosmosTransformer3DModel.from_config(described)
    from safetensors.torch import load_file

    network.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))


def test_diffusers_asks_for_the_sizes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(trained), str(tmp_path / "d"), "--to", "diffusers"]) == 2
    assert "experiment=NAME" in capsys.readouterr().err


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a control file with the names of released ones."""
    folder = tmp_path_factory.mktemp("released")
    model = build_transfer(composed(OVERRIDES))
    state = model.state_dict()
    base = {k.removeprefix("base_model."): v for k, v in state.items() if k.startswith("base_")}
    extra = {"net.blocks.block0.blocks.0.block.attn.attn_op._extra_state": None}
    torch.save({"model": {**base, **extra}, "ema": None}, folder / "base_model.pt")
    control = {k: v for k, v in state.items() if k.startswith("net.")}
    torch.save({"model": {**control, **extra}}, folder / "edge_control.pt")
    return folder


@pytest.mark.parametrize("name", ["base_model.pt", "edge_control.pt"])
def test_every_key_of_a_released_file_is_accounted_for(
    name: str, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(released / name), CONFIG, "--", *OVERRIDES]) == 0
    lines = capsys.readouterr().out.splitlines()
    content = torch.load(released / name, weights_only=True)["model"]
    spoken_of = {line.split()[1] for line in lines[:-1]}
    assert spoken_of == set(content)
    assert sum(line.startswith("ignored") for line in lines) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: {f"model.{k}": v for k, v in s.items()},
            r"begin with 'net\.'; .* \d+ model\.\*, for example model\.",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "to_v" not in k},
            r"\d keys of the network that the file lacks: net\..*to_v",
        ),
        (
            lambda s: {k: v[:, :1] if k.endswith("to_q.0.weight") else v for k, v in s.items()},
            r"\d tensors of another shape: net\..*to_q.0.weight: \(48, 1\) in the file, \(48, 48\)",
        ),
    ],
    ids=["prefix", "missing", "shape"],
)
@pytest.mark.parametrize("name", ["base_model.pt", "edge_control.pt"])
def test_a_wrong_file_is_an_error_with_counts_and_examples(
    name: str,
    damage: Any,
    message: str,
    released: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(released / name, weights_only=True)["model"]
    torch.save({"model": damage(content)}, tmp_path / name)
    assert main(["check", str(tmp_path / name), CONFIG, "--", *OVERRIDES]) == 2
    assert re.search(message, capsys.readouterr().err)


MEASURE = """
import sys, threading, pathlib
from transfer1.interop.convert import convert
from transfer1.config import compose
import torch, torch.nn
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) * 1024
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3])
done.set(); thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_conversion_streams(tmp_path: Path) -> None:
    """Memory of the process grows by less than 1.3 of the largest tensor and a constant."""
    largest, constant = 32 << 20, 16 << 20
    name = "net.blocks.block{}.blocks.0.block.attn.to_q.0.weight"
    model = {name.format(i): torch.randn(2048, 4096) for i in range(8)}  # 256 MiB
    assert next(iter(model.values())).nbytes == largest
    averages = {name.replace(".", "-"): tensor for name, tensor in model.items()}
    torch.save({"model": {"model": model, "ema": averages}, "iteration": 1}, tmp_path / "x.pt")
    del model, averages
    for source, target, layout in (
        ("x.pt", "a.pt", "tp4"),
        ("a.pt", "b.safetensors", "portable"),
        ("b.safetensors", "c.pt", "original"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / source, tmp_path / target, layout],
            capture_output=True,
            text=True,
            cwd=ROOT.parents[1],
        )
        assert run.returncode == 0, run.stderr
        grown = int(run.stdout)
        print(f"{layout}: {grown / 2**20:.1f} MiB anonymous, largest tensor 32 MiB, file 256 MiB")
        assert grown < 1.3 * largest + constant
