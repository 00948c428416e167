"""Guidance with shared control residuals, and whole latents from noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import compare
from tiny import tiny_batch, tiny_config
from tiny_model import randomize, tiny_control, tiny_dit, tiny_inputs
from torch import Tensor

from transfer1.config import instantiate
from transfer1.diffusion.condition import Condition
from transfer1.model.transfer import Transfer
from transfer1.sampling.clip import SampleOptions, sample_clip
from transfer1.sampling.guidance import GuidedNetwork
from transfer1.training.step import StepOptions

GUIDANCE = 2.0
SHAPE = (2, 16, 3, 2, 2)


class Counted(Transfer):
    """A tiny model that notes the batch size of every call of its networks."""

    def __init__(self, control_blocks: str = "FA-CA-MLP") -> None:
        control = tiny_control(block_config=control_blocks)
        super().__init__(tiny_dit(), control, None, None)
        self.calls: dict[str, list[int]] = {"control": [], "base": []}
        for name, network in (("control", control), ("base", self.base)):
            network.register_forward_pre_hook(
                lambda _, args, name=name: self.calls[name].append(len(args[0]))
            )
        self.eval()


def two_conditions() -> tuple[Tensor, Tensor, Condition, Condition]:
    x, level, condition = tiny_inputs()
    return x, level, condition, dataclasses.replace(condition, context=-condition.context)


def hints() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 6, 3, 4, 6, generator=generator) for _ in range(2)]


WEIGHTS = {
    "numbers": [0.9, 0.4],
    "numbers per sample": [torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.3])],
    "maps": [torch.rand(1, 1, 3, 4, 6), torch.rand(1, 1, 3, 4, 6)],
    "maps per sample": [torch.rand(2, 1, 3, 4, 6), torch.rand(2, 1, 3, 4, 6)],
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("use_none_hint", [True, False])
@pytest.mark.parametrize("control_blocks", ["FA-CA-MLP", "FA-MLP"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_guidance_equals_two_plain_calls(
    batched: bool, use_none_hint: bool, control_blocks: str, weights: list[Any]
) -> None:
    """And the control branch runs for the unconditional prediction only where it must."""
    model = Counted(control_blocks)
    x, level, condition, uncondition = two_conditions()
    with torch.no_grad():
        first = model(x, level, condition, hints(), weights)
        second = model(x, level, uncondition, None if use_none_hint else hints(), weights)
        for calls in model.calls.values():
            calls.clear()
        network = GuidedNetwork(
            model, uncondition, hints(), weights, GUIDANCE, use_none_hint, batched
        )
        output = network(x, level, condition)
    assert not torch.allclose(first, second), "a test of guidance needs two predictions"
    compare(output, first + GUIDANCE * (first - second), "output")
    once = use_none_hint or control_blocks == "FA-MLP"
    whole = [4] if batched else [2, 2]
    assert model.calls == {"control": [2] if once else whole, "base": whole}


def test_without_guidance_one_call() -> None:
    model = Counted()
    x, level, condition, uncondition = two_conditions()
    with torch.no_grad():
        output = GuidedNetwork(model, uncondition, hints(), None, 0.0)(x, level, condition)
    assert model.calls == {"control": [2], "base": [2]}
    torch.testing.assert_close(output, model(x, level, condition, hints()))


def test_texts_of_different_length_take_two_calls() -> None:
    model = Counted()
    x, level, condition, uncondition = two_conditions()
    uncondition = dataclasses.replace(uncondition, context=uncondition.context[:, :3])
    with torch.no_grad():
        GuidedNetwork(model, uncondition, hints(), None, GUIDANCE)(x, level, condition)
    assert model.calls["base"] == [2, 2]


def test_out_of_memory_falls_back_to_two_calls() -> None:
    model = Counted()
    x, level, condition, uncondition = two_conditions()

    def refuse(_: Any, args: tuple[Any, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("no room for four")

    with torch.no_grad():
        expected = GuidedNetwork(model, uncondition, hints(), None, GUIDANCE)(x, level, condition)
        model.base.register_forward_pre_hook(refuse)
        network = GuidedNetwork(model, uncondition, hints(), None, GUIDANCE)
        compare(network(x, level, condition), expected, "output")
    assert not network.batched


@pytest.fixture
def released(tmp_path: Path) -> tuple[Transfer, StepOptions, dict[str, Tensor]]:
    """The released model, shrunk, with weights that matter, and a batch for it."""
    config = tiny_config(tmp_path)
    model = instantiate(config.model_obj, config=config)
    randomize(model)
    return model, StepOptions.from_config(config.model, torch.float32), tiny_batch()


FEW = SampleOptions(num_steps=2, guidance=1.0)


def test_same_seed_same_clip_and_training_is_undisturbed(released: Any) -> None:
    model, options, batch = released
    model.train()
    before = torch.get_rng_state()
    first, again = (sample_clip(model, batch, options, FEW, SHAPE) for _ in range(2))
    assert torch.equal(first, again) and first.shape == SHAPE
    assert model.training and torch.equal(before, torch.get_rng_state())
    other = sample_clip(model, batch, options, dataclasses.replace(FEW, seed=2), SHAPE)
    assert not torch.allclose(first, other)


def test_control_and_negative_text_and_start_matter(released: Any) -> None:
    model, options, batch = released
    plain = sample_clip(model, batch, options, FEW, SHAPE)
    hintless = {name: v for name, v in batch.items() if name != "control_input_edge"}
    negative = {
        **batch,
        "neg_t5_text_embeddings": -batch["t5_text_embeddings"],
        "neg_t5_text_mask": batch["t5_text_mask"],
    }
    half_hint = {**batch, "control_weight": 0.5}
    for changed in (hintless, negative, half_hint, {**batch, "use_none_hint": True}):
        assert not torch.allclose(sample_clip(model, changed, options, FEW, SHAPE), plain)
    started = sample_clip(model, batch, options, FEW, SHAPE, start_latent=torch.ones(SHAPE))
    assert not torch.allclose(started, plain)


def test_given_frames_stay(released: Any) -> None:
    """Unless sampling ends below their own noise: there they are denoised with the rest."""
    model, options, batch = released
    given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    for augment_sigma, stays in ((0.001, True), (0.01, False)):
        sampling = dataclasses.replace(FEW, augment_sigma=augment_sigma)
        result = sample_clip(
            model, batch, options, sampling, SHAPE, given_latent=given, num_given=1
        )
        assert torch.equal(result[:, :, :1], given[:, :, :1]) == stays
        assert not torch.allclose(result[:, :, 1:], given[:, :, 1:])


def test_misfits_are_named(released: Any) -> None:
    model, options, batch = released
    with pytest.raises(ValueError, match="num_given=1: given frames need given_latent"):
        sample_clip(model, batch, options, FEW, SHAPE, num_given=1)
    with pytest.raises(ValueError, match=r"start_latent has shape \(1,\), expected \(2, 16"):
        sample_clip(model, batch, options, FEW, SHAPE, start_latent=torch.ones(1))
