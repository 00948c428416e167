"""Experiments: one for every row of the controls, networks of known shapes, twins that run.

The twin `<name>_cpu` of an experiment trains on the demo data; stored controls that the demo data
lack are made here from its videos.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clips
import goldens
import pytest
import torch
from hydra.core.config_store import ConfigStore
from tiny import composed
from torch import Tensor

import train
from configs import control
from configs.experiments import av, cpu, lvg
from configs.experiments.released import merged
from transfer1.config import compose, instantiate
from transfer1.config.messages import group_options
from transfer1.data import demo
from transfer1.data.controls import CONTROLS, StoredControl

CONFIG = Path(__file__).parents[1] / "configs" / "config_train.py"
EDGE = "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3_pretrain"
HDMAP = "CTRL_7Bv1pt3_t2w_57frames_control_input_hdmap_block3_pretrain"
RELEASED = {**lvg.experiments(), **av.experiments()}
HINTS = (16, 16, 32, 32, 96, 96, 256)  # widths between the layers of the hint


def hint_key(name: str) -> str:
    """The control of an experiment."""
    return next(
        entry["override /hint_key"]
        for entry in RELEASED[name]["defaults"]
        if "override /hint_key" in entry
    )


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """The recorded configuration of the original."""
    folders = (goldens.COMPLETE, goldens.COMMITTED)
    files = [folder / "config" / "config.json" for folder in folders]
    return json.loads(next(file for file in files if file.exists()).read_text())


def test_names_are_those_of_the_original(golden: dict[str, Any]) -> None:
    """All of them and no others, but for what is new here and its twins."""
    composed(())
    recorded = set(golden["groups"]["experiment"])
    assert recorded == {*RELEASED, *av.multi_view()}
    twins = {f"{name}_cpu" for name in RELEASED}
    assert set(group_options("experiment")) == recorded | twins | {"demo_edge"}
    assert len(RELEASED) == 20


@pytest.mark.parametrize("phase", ["pretrain", "posttrain"])
def test_experiments_of_a_family_differ_by_their_control_alone(phase: str) -> None:
    """So what is compared with the original for one control holds for all of its family."""
    for family in (lvg.experiments(), av.experiments()):
        plain: dict[str, set[str]] = {}
        for name, node in family.items():
            if not name.endswith(phase):
                continue
            key = hint_key(name)
            text = json.dumps(node).replace(key, "KEY")
            text = text.replace(f"/{key.removeprefix('control_input_')}_control.pt", "/FILE")
            plain.setdefault(name.replace(key, "KEY"), set()).add(text)
        assert all(len(texts) == 1 for texts in plain.values())


def test_a_new_row_gives_new_experiments() -> None:
    """A control and its data options, hint keys, experiments and twins come from one row."""
    row = control.Control("flow", dataset_dir="datasets/flow")
    name = "CTRL_7Bv1pt3_lvg_tp_121frames_control_input_flow_block3_pretrain"
    control.CONTROLS.append(row)
    try:
        new = lvg.experiments().keys() - RELEASED.keys()
        assert new == {name, name.replace("pretrain", "posttrain")}
        config = compose(CONFIG, [f"experiment={name}_cpu"])
    finally:
        control.CONTROLS.remove(row)
        for group in ("experiment", "hint_key", "data_train", "data_val"):
            options = ConfigStore.instance().repo[group]
            for option in [option for option in options if "flow" in option]:
                options.pop(option)
    assert config.model.hint_key.hint_key == "control_input_flow"
    assert config.dataloader_train.dataset.hint_key == "control_input_flow"


def test_twins_change_sizes_only() -> None:
    """Same classes, same kinds of layers, same diffusion; other widths, data and lengths."""
    for name in (EDGE, HDMAP):
        large, small = (composed((f"experiment={name}{end}",)) for end in ("", "_cpu"))
        for key in ("net", "net_ctrl"):
            differing = {k for k in large.model[key] if large.model[key][k] != small.model[key][k]}
            assert differing <= cpu.NETWORK.keys()
        for key in ("sde", "conditioner", "hint_key", "ema", "hint_dropout_rate", "loss_reduce"):
            assert large.model[key] == small.model[key], key
        assert small.model.net_ctrl.num_control_blocks == large.model.net_ctrl.num_control_blocks


def test_merging_leaves_its_inputs_alone() -> None:
    node = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    before = json.dumps(node)
    assert merged(node, {"a": {"c": {"d": 3}, "f": 4}, "e": [2]}) == {
        "a": {"b": 1, "c": {"d": 3}, "f": 4},
        "e": [2],
    }
    assert json.dumps(node) == before


def original_shapes(arguments: Mapping[str, Any], hint_channels: int = 0) -> dict[str, str]:
    """Names and shapes of the tensors of a network of the original.

    For learned extra positions, low-rank modulation and the patches of released networks.

    Args:
        arguments: of the original's class.
        hint_channels: of a control branch; 0 for a base network.
    """
    size = SimpleNamespace(**arguments)
    width, rank = size.model_channels, size.adaln_lora_dim
    hidden, head = int(size.mlp_ratio * width), width // size.num_heads
    patch = size.patch_temporal * size.patch_spatial**2
    rows, columns = size.max_img_h // size.patch_spatial, size.max_img_w // size.patch_spatial
    frames = size.max_frames // size.patch_temporal
    padding = int(size.concat_padding_mask)
    mask = arguments.get("layer_mask")
    blocks = mask.index(True) if mask else size.num_blocks

    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1.weight": (width, (size.in_channels + padding) * patch),
        "pos_embedder.seq": (max(rows, columns, frames),),
        "extra_pos_embedder.pos_emb_h": (rows, width),
        "extra_pos_embedder.pos_emb_w": (columns, width),
        "extra_pos_embedder.pos_emb_t": (frames, width),
        "t_embedder.1.linear_1.weight": (width, width),
        "t_embedder.1.linear_2.weight": (3 * width, width),
        "final_layer.linear.weight": (patch * size.out_channels, width),
        "final_layer.adaLN_modulation.1.weight": (rank, width),
        "final_layer.adaLN_modulation.2.weight": (2 * width, rank),
        "affline_norm.weight": (width,),
    }
    for block in range(blocks):
        for index, context in ((0, width), (1, size.crossattn_emb_channels)):
            name = f"blocks.block{block}.blocks.{index}.block.attn"
            shapes[f"{name}.to_q.0.weight"] = (width, width)
            shapes[f"{name}.to_k.0.weight"] = shapes[f"{name}.to_v.0.weight"] = (width, context)
            shapes[f"{name}.to_q.1.weight"] = shapes[f"{name}.to_k.1.weight"] = (head,)
            shapes[f"{name}.to_out.0.weight"] = (width, width)
        shapes[f"blocks.block{block}.blocks.2.block.layer1.weight"] = (hidden, width)
        shapes[f"blocks.block{block}.blocks.2.block.layer2.weight"] = (width, hidden)
        for index in range(3):
            name = f"blocks.block{block}.blocks.{index}.adaLN_modulation"
            shapes[f"{name}.1.weight"] = (rank, width)
            shapes[f"{name}.2.weight"] = (3 * width, rank)
    if hint_channels:
        shapes["x_embedder2.proj.1.weight"] = (width, (hint_channels + padding) * patch)
        for index, (inputs, outputs) in enumerate(
            zip((width, *HINTS), (*HINTS, width), strict=True)
        ):
            shapes[f"input_hint_block.{2 * index}.weight"] = (outputs, inputs)
            shapes[f"input_hint_block.{2 * index}.bias"] = (outputs,)
        for block in range(blocks):
            shapes[f"zero_blocks.block{block}.weight"] = (width, width)
            shapes[f"zero_blocks.block{block}.bias"] = (width,)
    return {name: str(shape) for name, shape in shapes.items()}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: str(tuple(tensor.shape)) for name, tensor in state.items()}


def test_golden_shapes_are_those_of_the_list() -> None:
    """The table of shapes above reproduces the recorded list of a small network."""
    arguments = {
        **{"max_img_h": 16, "max_img_w": 16, "max_frames": 8, "patch_spatial": 2},
        **{"patch_temporal": 1, "in_channels": 17, "out_channels": 16, "model_channels": 96},
        **{"num_blocks": 4, "num_heads": 3, "mlp_ratio": 4.0, "crossattn_emb_channels": 32},
        **{"adaln_lora_dim": 8, "concat_padding_mask": True},
    }
    rows = [
        line.split(" ", 2)
        for line in (goldens.COMMITTED / "checkpoint_keys.txt").read_text().splitlines()
    ]
    listed = {
        network: {key: shape for name, key, shape in rows if name == network}
        for network in ("base", "ctrl")
    }
    assert original_shapes(arguments) == listed["base"]
    masked = {**arguments, "layer_mask": [False, False, False, True]}
    assert original_shapes(masked, hint_channels=128) == listed["ctrl"]


def test_golden_experiments_build_with_the_shapes_of_the_original(golden: dict[str, Any]) -> None:
    """At full size, without memory for it: 7.2 billion parameters of the base, name by name."""
    checked = set()
    for name, recorded in golden["resolved"].items():
        if name not in RELEASED:  # multi-view
            continue
        config = composed((f"experiment={name}",))
        with torch.device("meta"):
            base, branch = (instantiate(config.model[key]) for key in ("net", "net_ctrl"))
        assert all(tensor.is_meta for tensor in (*base.parameters(), *branch.parameters()))
        original = recorded["model"]
        assert shapes_of(base.state_dict()) == original_shapes(original["net"])
        channels = original["net_ctrl"]["hint_channels"]
        assert shapes_of(branch.state_dict()) == original_shapes(original["net_ctrl"], channels)
        checked.add(config.model.net.in_channels)
    assert checked == {16, 17}  # both families


@pytest.mark.parametrize(
    ("name", "base", "branch"), [("faditv2_400m", 404e6, 236e6), ("faditv2_2b", 1956e6, 1120e6)]
)
def test_sizes_in_between(name: str, base: float, branch: float) -> None:
    """Parameters of base and control branch, which `configs/net.py` chooses for one GPU."""
    config = composed((f"net={name}", f"net_ctrl={name}"))
    for key, expected in (("net", base), ("net_ctrl", branch)):
        with torch.device("meta"):
            network = instantiate(config.model[key])
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `datasets/demo`, to which stand-ins for stored controls are added."""
    clips.wheel_clip("bikes.mp4")
    folder = tmp_path_factory.mktemp("run")
    demo.prepare(folder / "datasets" / "demo", max_width=160)
    for part in ("train", "held_out"):
        videos = folder / "datasets" / "demo" / part / "videos"
        for kind in CONTROLS.values():
            if issubclass(kind, StoredControl):
                shutil.copytree(videos, videos.parent / kind.folder)
    return folder


def train_twin(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates; the loss is finite, and the control branch has moved from its start."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OUTPUT_ROOT", str(folder / "checkpoints"))
    job = folder / "checkpoints" / "twin" / name
    overrides = [f"experiment={name}_cpu", f"job.path_local={job}", "kernels=reference"]
    overrides += ["trainer.max_iter=2", "trainer.logging_iter=1"]
    assert train.main([f"--config={CONFIG}", "--", *overrides]) == 0
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    saved = torch.load(job / "checkpoints" / "iter_000000002.pt", weights_only=False)
    zero_blocks = [v for k, v in saved["model"]["model"].items() if ".zero_blocks." in k]
    assert len(zero_blocks) == 6 and all(weight.abs().max() > 0 for weight in zero_blocks)


@pytest.mark.parametrize("name", [EDGE, HDMAP])
def test_a_twin_trains(name: str, demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each family; the others are in the slow test."""
    train_twin(name, demo_data, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_every_twin_trains(name: str, demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_twin(name, demo_data, monkeypatch)


@pytest.mark.slow
def test_every_experiment_composes() -> None:
    """The released ones and their twins, each with its own name and control."""
    for name in RELEASED:
        for end in ("", "_cpu"):
            config = compose(CONFIG, [f"experiment={name}{end}"])
            assert config.job.name == f"{name}{end}"
            assert config.model.hint_key.hint_key == hint_key(name)
            assert config.dataloader_train.dataset.hint_key == hint_key(name)
