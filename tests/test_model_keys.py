"""Names, shapes and fresh values of parameters: the contract with released checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping

import goldens
import original
import pytest
import torch
from torch import Tensor, nn

from transfer1.model.control import ControlEncoder
from transfer1.model.dit import DiT
from transfer1.model.transfer import Transfer

CHECKPOINT_KEYS = goldens.COMMITTED / "checkpoint_keys.txt"
NETWORK = {
    "max_img_h": 16,
    "max_img_w": 16,
    "max_frames": 8,
    "in_channels": 17,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 96,
    "num_blocks": 4,
    "num_heads": 3,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
    "legacy_patch_emb": False,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
    "concat_frame_mask": True,
}


def listed(network: str) -> dict[str, str]:
    """Key -> printed shape of one network of the list."""
    rows = [line.split(" ", 2) for line in CHECKPOINT_KEYS.read_text().splitlines()]
    return {key: shape for name, key, shape in rows if name == network}


def shapes(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: str(tuple(tensor.shape)) for key, tensor in state.items()}


def test_base_keys() -> None:
    assert shapes(DiT(**NETWORK).state_dict()) == listed("base")


def test_control_keys() -> None:
    encoder = ControlEncoder(**NETWORK, num_control_blocks=3, hint_channels=128)
    assert shapes(encoder.state_dict()) == listed("ctrl")


def test_transfer_keys() -> None:
    encoder = ControlEncoder(**NETWORK, num_control_blocks=3, hint_channels=128)
    tokenizer = nn.Linear(1, 1)  # its weights belong to no checkpoint
    model = Transfer(DiT(**NETWORK), encoder, conditioner=None, tokenizer=tokenizer)
    expected = {f"net.{key}" for key in listed("ctrl")}
    expected |= {f"base_model.net.{key}" for key in listed("base")}
    for name in ("0.freqs", "0.phases", "1.weight"):
        expected |= {f"logvar.{name}", f"base_model.logvar.{name}"}
    assert model.state_dict().keys() == expected
    assert model.logvar is model.base_model["logvar"]
    assert not any(parameter is tokenizer.weight for parameter in model.parameters())


def test_fresh_initialisation() -> None:
    """Which parameters start as zeros and ones, and the spread of the others."""
    golden = json.loads((goldens.COMMITTED / "ctrl_enc" / "ctrl_enc.json").read_text())
    recorded = golden["fresh_initialisation_seed0"]
    torch.manual_seed(0)
    arguments = NETWORK | {"max_img_h": 32, "max_img_w": 32, "max_frames": 16, "num_heads": 2}
    arguments |= {"model_channels": 64, "mlp_ratio": 1.0, "adaln_lora_dim": 16}
    arguments |= {"crossattn_emb_channels": 48, "num_control_blocks": 2, "hint_channels": 32}
    encoder = ControlEncoder(**arguments)
    parameters = dict(encoder.named_parameters())
    assert parameters.keys() == recorded.keys()
    for name, expected in recorded.items():
        value = parameters[name].detach()
        assert list(value.shape) == expected["shape"], name
        assert bool((value == 0).all()) == expected["zero"], f"{name} zero"
        assert bool((value == 1).all()) == expected["one"], f"{name} one"
        # The sample standard deviation of n values scatters by at most 1/sqrt(2n) of itself for the
        # normal distribution; five times that, twice because both are samples.
        scatter = 5 * value.numel() ** -0.5
        assert abs(value.std().item() - expected["std"]) <= scatter * expected["std"], name
        assert abs(value.mean().item()) <= scatter * expected["std"] + (expected["mean"] == 1), name


def test_the_original_counts_control_blocks_by_a_mask_of_absent_ones() -> None:
    """Arguments that are gone are translated, so that recorded runs of any spelling build."""
    init = {name: value for name, value in NETWORK.items() if name != "concat_frame_mask"}
    init |= {"layer_mask": [False, False, True, True], "use_memory_save": True}
    init |= {"block_x_format": "THWBD", "window_sizes": [], "use_checkpoint": False}
    encoder = original.build("GeneralDITEncoder", init)
    assert list(encoder.blocks) == list(encoder.zero_blocks) == ["block0", "block1"]
    assert encoder.concat_frame_mask  # 17 input channels for a latent of 16
    assert not original.build("GeneralDITEncoder", init | {"in_channels": 16}).concat_frame_mask


def test_fresh_conv_patch_embedding_and_time_embeddings() -> None:
    torch.manual_seed(0)
    network = DiT(
        **{**NETWORK, "legacy_patch_emb": True},
        add_augment_sigma_embedding=True,
        additional_timestamp_channels={"fps": 32, "h": 32},
    )
    weight = network.x_embedder.proj.weight
    fan_in, fan_out = weight[0].numel(), weight.shape[0]
    bound = (6 / (fan_in + fan_out)) ** 0.5  # Xavier-uniform on the matrix view
    assert 0.98 * bound < weight.abs().max() <= bound
    assert network.t_embedder[1].linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    xavier = (2 / (96 + 96)) ** 0.5
    noise_of_given_frames = network.augment_sigma_embedder[1].linear_1.weight
    assert noise_of_given_frames.std().item() == pytest.approx(xavier, rel=0.05)
    bias = network.additional_timestamp_embedder["fps"][1].linear_1.bias
    assert not bias.any()


def test_trainable_parameters_are_those_of_the_original() -> None:
    """The frozen base leaves exactly the recorded names to the optimizer."""
    path = goldens.COMMITTED / "train_step" / "train_step.json"
    if not path.is_file():
        path = goldens.COMPLETE / "train_step" / "train_step.json"
    recorded = json.loads(path.read_text())["trainable"]
    arguments = {**NETWORK, "num_blocks": 2}
    encoder = ControlEncoder(**arguments, num_control_blocks=1, hint_channels=32)
    model = Transfer(DiT(**arguments), encoder, None, None)
    model.base_model.requires_grad_(False)
    ours = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(ours) == sorted(recorded)


def test_compiling_in_place_keeps_the_names() -> None:
    network = DiT(**{**NETWORK, "num_blocks": 1})
    before = list(network.state_dict())
    network.compile()
    assert list(network.state_dict()) == before
