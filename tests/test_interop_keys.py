"""Names in released files, and strict loading with a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import TINY, tiny_control, tiny_dit
from torch import Tensor, nn

from transfer1.interop import keys
from transfer1.model.dit import DiT
from transfer1.model.layers import LogVariance
from transfer1.model.transfer import Transfer

X = torch.zeros(1)


def base_module(network: DiT) -> nn.ModuleDict:
    """What a base file loads into: the network and the log-variance head."""
    return nn.ModuleDict({"net": network, "logvar": LogVariance()})


def test_rules_rename_drop_and_report() -> None:
    state = {
        "base_model.net.a.weight": X,
        "net.b.attn_op._extra_state": X,
        "_extra_state": X,
        "net._orig_mod.c": X,
        "logvar.0.freqs": X,
    }
    out, report = keys.apply_rules(state, [*keys.RELEASED, keys.BASE_PREFIX])
    assert set(out) == {"net.a.weight", "net.c", "logvar.0.freqs"}
    assert report.renamed[keys.BASE_PREFIX.name] == ["base_model.net.a.weight"]
    assert report.renamed[keys.COMPILED.name] == ["net._orig_mod.c"]
    assert report.ignored == {keys.EXTRA_STATE.name: ["net.b.attn_op._extra_state", "_extra_state"]}
    text = str(report)
    assert all(name in text for name in (*report.renamed, *report.ignored))


def test_two_keys_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two keys of the file are 'net.a'"):
        keys.apply_rules({"net.a": X, "base_model.net.a": X}, [keys.BASE_PREFIX])


def test_ema_names_go_back_to_those_of_the_model() -> None:
    network = tiny_dit()
    spelled = {name.replace(".", "-"): value for name, value in network.named_parameters()}
    out, _ = keys.apply_rules(spelled, [keys.EMA_SPELLING])
    assert set(out) == {name for name, _ in network.named_parameters()}


def test_base_of_a_control_checkpoint() -> None:
    """`net.` is the base in a base file, and the control branch in a control checkpoint."""
    base, control = tiny_dit(), tiny_control()
    model = Transfer(base, control, None, None)
    state, report = keys.base_state(model.state_dict())
    loaded = base_module(DiT(**TINY))
    keys.load_strictly(loaded, state, report=report)
    assert all(torch.equal(v, loaded["net"].state_dict()[k]) for k, v in base.state_dict().items())
    assert len(report.ignored[keys.CONTROL_BRANCH.name]) == len(control.state_dict())
    assert len(report.ignored[keys.REPEATED.name]) == 3
    of_base_file, _ = keys.base_state(base_module(base).state_dict())
    assert of_base_file.keys() == state.keys()


def test_loading_is_strict() -> None:
    network = tiny_dit()
    good = dict(network.state_dict())
    before = {key: value.clone() for key, value in good.items()}
    wrong = {key: value + 1 for key, value in good.items()}
    del wrong["affline_norm.weight"]
    wrong["blocks.block9.weight"] = X
    wrong["final_layer.linear.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError) as error:
        keys.load_strictly(network, wrong)
    message = str(error.value)
    assert "network does not have: blocks.block9.weight" in message
    assert "file lacks: affline_norm.weight" in message
    assert "final_layer.linear.weight: (2, 2) in the file, (16, 48) in the network" in message
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "was changed"


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no key of the file belongs to this network"):
        keys.load_strictly(tiny_dit(), {"encoder.weight": X})


def test_what_a_file_may_lack_is_reported() -> None:
    network = base_module(tiny_dit())
    state = {key: v for key, v in network.state_dict().items() if key.startswith("net.")}
    del state["net.pos_embedder.seq"]
    optional = (keys.FRESH_LOG_VARIANCE, keys.POSITION_INDEX)
    report = keys.load_strictly(network, state, optional)
    assert report.loaded == len(state)
    assert {name: len(absent) for name, absent in report.absent.items()} == {
        keys.FRESH_LOG_VARIANCE.name: 3,
        keys.POSITION_INDEX.name: 1,
    }


def split(state: dict[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """Shard as the original does: q, k, v, first MLP layer by rows, output layers by columns."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for key, tensor in state.items():
        rows = (".to_q.0.", ".to_k.0.", ".to_v.0.", ".block.layer1.")
        columns = (".to_out.0.", ".block.layer2.")
        parts: tuple[Tensor, ...] | list[Tensor] = [tensor] * ranks
        if any(part in key for part in rows):
            parts = tensor.chunk(ranks, dim=0)
        elif any(part in key for part in columns):
            parts = tensor.chunk(ranks, dim=1)
        for shard, part in zip(shards, parts, strict=True):
            shard[key] = part.clone()
    return shards


@pytest.mark.parametrize("ranks", [1, 2, 12])
def test_tensor_parallel_files_are_merged(tmp_path: Path, ranks: int) -> None:
    """Twelve ranks: rank 10 comes after rank 9, not after rank 1."""
    state = base_module(tiny_dit()).state_dict()
    state["net.blocks.block0.blocks.0.block.attn.attn_op._extra_state"] = X
    for rank, shard in enumerate(split(state, ranks)):
        torch.save({"model": shard, "ema": None}, tmp_path / f"base_model_mp_{rank}.pt")
    torch.save({"grad_scaler": {}, "iteration": 0}, tmp_path / "base.pt")
    merged = keys.read_weights(tmp_path / "base_model_mp_*.pt")
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[key], value) for key, value in state.items())


def test_shards_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="hold different keys, for example b"):
        keys.merge_tensor_parallel([{"a": X}, {"a": X, "b": X}])
    with pytest.raises(ValueError, match="a is replicated over ranks, but"):
        keys.merge_tensor_parallel([{"a": X}, {"a": X + 1}])


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    torch.save({"model": {"a": X}}, tmp_path / "m_1.pt")
    with pytest.raises(FileNotFoundError, match=r"finds ranks \[1\]; expected 0, 1"):
        keys.read_weights(tmp_path / "m_*.pt")
    with pytest.raises(FileNotFoundError, match=r"finds ranks \[\]"):
        keys.read_weights(tmp_path / "other_*.pt")


def test_files_of_every_layout(tmp_path: Path) -> None:
    """A plain state dict; a dict with "model"; averages, which win, beside or inside it."""
    state, averages = {"net.a": X, "net.b": X}, {"net-a": X + 1}
    layouts = {
        "plain": state,
        "model": {"model": state, "ema": None},
        "averaged": {"model": state, "ema": averages},
        "training": {
            "model": {"model": state, "ema": averages, "trained_data_record": {"video": 3}},
            "optimizer": {"state": {}, "param_groups": []},
            "iteration": 3,
        },
    }
    for name, content in layouts.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        report = keys.KeyReport()
        weights = keys.read_weights(path, report)
        is_averaged = name in ("averaged", "training")
        assert weights == {"net.a": X + 1 if is_averaged else X, "net.b": X}, name
        assert bool(report.renamed) == is_averaged
    torch.save({"model": state, "optimizer": nn.Linear(1, 1)}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="no file of tensors and plain values"):
        keys.read_weights(tmp_path / "objects.pt")
    torch.save({"iteration": 3}, tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        keys.read_weights(tmp_path / "nothing.pt")
