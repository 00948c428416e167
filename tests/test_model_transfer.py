"""The composed model: how it is built, started and loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import CONTROL, TINY, randomize, tiny_inputs
from torch import Tensor

from transfer1.config import ConfigError
from transfer1.config import LazyCall as L
from transfer1.model.transfer import Transfer, build_transfer

LATENT = (3, 4, 6)


def config(base_path: str = "", finetune: bool = False, control: bool = True, **net: Any) -> Any:
    """The parts of a composed configuration that the model is built from."""
    return SimpleNamespace(
        model=SimpleNamespace(
            net=L("transfer1.model.dit.DiT")(**{**TINY, **net}),
            net_ctrl=L("transfer1.model.control.ControlEncoder")(**TINY, **CONTROL)
            if control
            else None,
            conditioner=L("types.SimpleNamespace")(name="conditioner"),
            tokenizer=L("torch.nn.Linear")(in_features=1, out_features=1),
            finetune_base_model=finetune,
            base_load_from=SimpleNamespace(load_path=base_path),
        ),
        trainer=SimpleNamespace(device="auto"),
        kernels=L("kernels.select")(default="reference"),
    )


def build(**arguments: Any) -> Transfer:
    torch.manual_seed(0)
    return build_transfer(config(**arguments))


def hint() -> Tensor:
    return torch.randn(2, 6, *LATENT, generator=torch.Generator().manual_seed(2))


def test_control_starts_as_a_copy_of_the_base() -> None:
    model = build()
    assert model.net is not None
    base, control = model.base.state_dict(), model.net.state_dict()
    shared = base.keys() & control.keys()
    assert {key.split(".")[1] for key in shared if key.startswith("blocks.")} == {
        "block0",
        "block1",
    }
    assert all(torch.equal(base[key], control[key]) for key in shared)
    own = {key.split(".")[0] for key in control.keys() - base.keys()}
    assert own == {"x_embedder2", "input_hint_block", "zero_blocks"}


@pytest.mark.parametrize("finetune", [False, True])
def test_base_and_log_variance_are_frozen_unless_finetuned(finetune: bool) -> None:
    model = build(finetune=finetune)
    assert model.net is not None
    assert all(p.requires_grad for p in model.net.parameters())
    assert all(p.requires_grad == finetune for p in model.base_model.parameters())
    assert all(p.requires_grad == finetune for p in model.logvar.parameters())


def test_the_same_seed_builds_the_same_model() -> None:
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_forward_adds_the_residuals_to_the_base() -> None:
    model = build()
    randomize(model)
    inputs = tiny_inputs()
    assert torch.equal(model(*inputs), model.base(*inputs))
    assert torch.equal(model(*inputs, []), model.base(*inputs))
    assert model.net is not None
    expected = model.base(*inputs, model.net(*inputs, [hint()], 0.5))
    assert torch.equal(model(*inputs, [hint()], 0.5), expected)
    assert not torch.equal(expected, model.base(*inputs))
    dropped = model(*inputs, [hint()], keep_B=torch.tensor([0.0, 1.0]))
    assert torch.equal(dropped[0], model.base(*inputs)[0])


def test_weights_of_several_hints_are_normalized_in_training_too() -> None:
    model = build()
    randomize(model)
    inputs, hints = tiny_inputs(), [hint(), -hint().flip(0)]
    shared = model(*inputs, hints, [0.25, 0.75])
    assert model.training and torch.equal(model(*inputs, hints, [1.0, 3.0]), shared)
    assert not torch.equal(model(*inputs, hints, [0.1, 0.3]), shared)
    model.eval()
    assert torch.equal(model(*inputs, hints, [1.0, 3.0]), shared)


def test_log_variance_is_float32_arithmetic_with_one_value_per_sample() -> None:
    model = build()
    noise_level = torch.tensor([-1.0, 0.3, 0.9])
    frequencies, head = model.logvar
    angles = noise_level[:, None] * frequencies.freqs + frequencies.phases
    expected = (2**0.5 * angles.cos()) @ head.weight.T
    torch.testing.assert_close(model.log_variance(noise_level), expected)


def test_a_base_alone() -> None:
    model = build(control=False)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(key.startswith("net.") for key in model.state_dict())
    with pytest.raises(ValueError, match="set net_ctrl=NAME"):
        model(*tiny_inputs(), [hint()])


def test_no_network_chosen() -> None:
    incomplete = config()
    incomplete.model.net = None
    with pytest.raises(ConfigError, match="set net=NAME"):
        build_transfer(incomplete)


def test_control_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"to_k.0.weight: \(48, 13\) in the file, \(48, 12\)"):
        build(crossattn_emb_channels=13)


def test_base_weights_are_loaded_and_copied_to_the_control_branch(tmp_path: Path) -> None:
    trained = build(finetune=True)
    randomize(trained, seed=3)
    path = tmp_path / "iter_000000001.pt"
    ema = {
        name.replace(".", "-"): parameter.detach() + 1
        for name, parameter in trained.named_parameters()
        if name.startswith("base_model.net.")
    }
    torch.save({"model": {"model": trained.state_dict(), "ema": ema}, "iteration": 1}, path)

    model = build(base_path=str(path))
    expected = {name: value + 1 for name, value in trained.base.named_parameters()}
    for name, parameter in model.base.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for name in ("0.freqs", "0.phases", "1.weight"):
        assert torch.equal(model.logvar.state_dict()[name], trained.logvar.state_dict()[name])
    assert model.net is not None
    copied = model.net.state_dict()["blocks.block0.blocks.2.block.layer1.weight"]
    assert torch.equal(copied, expected["blocks.block0.blocks.2.block.layer1.weight"])
    assert not model.net.zero_blocks["block0"].weight.any()


def test_base_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="base_load_from.load_path"):
        build(base_path=str(tmp_path / "base.pt"))
