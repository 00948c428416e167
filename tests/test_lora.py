"""Low-rank adapters: training them, and what other software reads of them."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import OVERRIDES, ROOT, TinyTrainer, tiny_config, train
from tiny_model import TINY, tiny_dit, tiny_inputs

from transfer1.config import ConfigError, compose
from transfer1.interop.__main__ import main
from transfer1.interop.diffusers import to_diffusers
from transfer1.interop.files import Scratch
from transfer1.interop.layouts import read
from transfer1.interop.lora import merge, split_adapters, write_diffusers, write_peft
from transfer1.training.lora import apply_lora, remove_lora

ATTENTION = [r"\.attn\.to_(q|k|v|out)\.0$"]
LORA = ("model.lora.rank=4", "model.lora.alpha=8")
LAYERS = [
    f"{part}blocks.block{i}.blocks.{j}.block.attn.to_{x}.0"
    for part, blocks in (("net.", 1), ("base_model.net.", 2))
    for i in range(blocks)
    for j in (0, 1)
    for x in ("q", "k", "v", "out")
]


def lora_config(folder: Path, *overrides: str):  # noqa: ANN201
    return compose(
        ROOT, [*OVERRIDES, "lora=attention", *LORA, f"job.path_local={folder}", *overrides]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyTrainer:
    trainer = TinyTrainer(lora_config(tmp_path_factory.mktemp("lora")))
    assert trainer.run() == 0
    return trainer


def checkpoint(trainer: TinyTrainer) -> Path:
    path = trainer.checkpointer.latest()
    assert path is not None
    return path


def test_only_adapters_train(run: TinyTrainer) -> None:
    """The frozen rest has no gradient, no optimizer state and no average, and stays as it was."""
    torch.manual_seed(run.state.seed)
    fresh = TinyTrainer(run.config)
    fresh.ops = run.ops
    before = fresh.build_model().state_dict()
    moved = {n for n, t in run.state.model.state_dict().items() if not torch.equal(t, before[n])}
    adapters = {f"{layer}.lora_{m}.weight" for layer in LAYERS for m in "AB"}
    # A fresh control branch ends in zeros, which are frozen: it has no effect and learns nothing.
    assert {name for name in adapters if name.startswith("base_model.")} <= moved <= adapters
    assert {n.replace("-", ".") for n in run.state.ema.shadows} == adapters
    named = dict(run.state.model.named_parameters())
    assert set(run.state.optimizer.state) == {named[name] for name in adapters}
    assert {name for name, p in named.items() if p.requires_grad} == adapters


def test_a_lora_run_resumes(run: TinyTrainer) -> None:
    longer = lora_config(run.job.path, "trainer.max_iter=3")
    trainer = TinyTrainer(longer)
    assert trainer.run() == 0 and trainer.state.iteration == 3


def test_nothing_changes_at_the_start_and_copies_keep_their_own() -> None:
    network, inputs = tiny_dit(), tiny_inputs()
    names = set(network.state_dict())
    expected = network(*inputs)
    apply_lora(network, 2, 4.0, [r"\.blocks\.\d\."])
    assert names < set(network.state_dict())
    torch.testing.assert_close(network(*inputs), expected, rtol=0, atol=0)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    torch.testing.assert_close(network(*inputs), expected, rtol=0, atol=0)
    adapted = other(*inputs)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    remove_lora(other)
    assert set(other.state_dict()) == names
    assert all(parameter.requires_grad for parameter in other.parameters())
    torch.testing.assert_close(other(*inputs), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [(0, ATTENTION, "rank=0"), (2, ["to_z"], "'to_z' is in no name"), (2, [], "targets is empty")],
)
def test_bad_options(rank: int, targets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_lora(tiny_dit(), rank, 1.0, targets)


def test_merged_checkpoint_trains_on_in_full(run: TinyTrainer, tmp_path: Path) -> None:
    merged = tmp_path / "merged.pt"
    assert main(["merge-lora", str(checkpoint(run)), str(merged)]) == 0
    plain = train(tmp_path / "full", f"checkpoint.load_path={merged}", "trainer.max_iter=1")
    assert not any("lora" in name for name in plain.state.model.state_dict())
    key = f"{LAYERS[0]}.weight"
    state = read(checkpoint(run), Scratch(tmp_path)).model
    A, B = state[f"{LAYERS[0]}.lora_A.weight"], state[f"{LAYERS[0]}.lora_B.weight"]
    found = read(merged, Scratch(tmp_path)).model[key]
    torch.testing.assert_close(found, state[key] + 8 / 4 * B @ A)


def test_a_plain_checkpoint_starts_adapters(run: TinyTrainer, tmp_path: Path) -> None:
    train(tmp_path / "plain", "trainer.max_iter=1")
    source = tmp_path / "plain" / "checkpoints" / "iter_000000001.pt"
    trainer = TinyTrainer(lora_config(tmp_path / "adapted", f"checkpoint.load_path={source}"))
    assert trainer.run() == 0


def test_a_lora_checkpoint_does_not_load_without_lora(run: TinyTrainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown to the model: .*lora_A"):
        TinyTrainer(tiny_config(tmp_path, f"checkpoint.load_path={checkpoint(run)}")).run()


def test_names_and_shapes_of_peft(run: TinyTrainer, tmp_path: Path) -> None:
    assert main(["adapter", str(checkpoint(run)), str(tmp_path / "peft")]) == 0
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{n}.lora_{m}.weight" for n in LAYERS for m in "AB"}
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["peft_type"]) == (4, 8.0, "LORA")
    for name, tensor in tensors.items():
        width = 16 if ".blocks.1." in name and ("to_k" in name or "to_v" in name) else 48
        assert tensor.shape == ((4, width) if "lora_A" in name else (48, 4)), name
    # A base without adapters and the folder make the same as merging the run itself.
    state = read(checkpoint(run), Scratch(tmp_path)).model
    plain, adapters = split_adapters(state)
    torch.save({"model": plain}, tmp_path / "plain.pt")
    command = ["merge-lora", str(tmp_path / "plain.pt"), str(tmp_path / "m.pt")]
    assert main([*command, "--adapter", str(tmp_path / "peft")]) == 0
    expected = merge(plain, adapters, Scratch(tmp_path))
    found = read(tmp_path / "m.pt", Scratch(tmp_path)).model
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def adapted_dit():  # noqa: ANN201
    """A network with adapters that count, its plain copy, and its output."""
    network = tiny_dit()
    plain = copy.deepcopy(network)
    apply_lora(network, 2, 4.0, ATTENTION)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network, plain


@pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed: names, shapes and scale are checked above",
)
def test_peft_reads_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    network, plain = adapted_dit()
    write_peft(split_adapters(network.state_dict())[1], tmp_path, Scratch(tmp_path))
    inputs = tiny_inputs()
    theirs = PeftModel.from_pretrained(plain, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(*inputs), network(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("peft") is None or importlib.util.find_spec("diffusers") is None,
    reason="diffusers reads adapters through peft, and one of them is not installed",
)
def test_diffusers_reads_the_adapter(tmp_path: Path) -> None:
    from bench.diffusers_peer import their_network

    network, plain = adapted_dit()
    state = {f"base_model.net.{name}": tensor for name, tensor in network.state_dict().items()}
    write_diffusers(split_adapters(state)[1], tmp_path, Scratch(tmp_path))
    theirs = their_network(TINY, plain.state_dict())
    theirs.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    theirs.fuse_lora()
    expected = to_diffusers(merge(*split_adapters(network.state_dict()), Scratch(tmp_path)))
    theirs.unload_lora()
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
