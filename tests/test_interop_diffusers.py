"""The same network in diffusers: weights convert both ways and give the same output."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import compare
from tiny_model import TINY, randomize, tiny_dit

import kernels
from bench.diffusers_peer import all_arguments, run_theirs, their_network
from transfer1.diffusion.condition import Condition
from transfer1.interop.diffusers import diffusers_arguments, from_diffusers, to_diffusers
from transfer1.model.dit import DiT

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)
import diffusers  # noqa: E402  an installed diffusers that does not import is a failure, not a skip

VARIANTS: list[dict[str, Any]] = [
    {},
    {"extra_per_block_abs_pos_emb": False, "concat_padding_mask": False},
    {"rope_t_extrapolation_ratio": 2.0, "rope_h_extrapolation_ratio": 3.0, "num_blocks": 1},
    {"in_channels": 5, "concat_frame_mask": True, "patch_temporal": 2},
]


def inputs(changes: dict[str, Any]) -> dict[str, Any]:
    """One set of inputs under our names; the padding mask is the same for all samples."""
    generator = torch.Generator().manual_seed(11)
    grid = (2 if "patch_temporal" in changes else 3, 2, 3)
    latent = (grid[0] * changes.get("patch_temporal", 1), 4, 6)
    return {
        "x": torch.randn(2, 4, *latent, generator=generator),
        "noise_level": torch.tensor([-0.4, 0.3]),
        "context": torch.randn(2, 5, 12, generator=generator),
        "padding_mask": (torch.rand(1, 1, 32, 48, generator=generator) > 0.5).float(),
        "frame_mask": torch.eye(latent[0])[0].reshape(1, 1, -1, 1, 1).expand(2, 1, *latent),
        "residuals": {
            index: torch.randn(2, grid[0] * 6, 48, generator=generator)
            for index in range(min(2, {**TINY, **changes}["num_blocks"]))
        },
    }


def run_both(ours: DiT, theirs: Any, changes: dict[str, Any], control: bool) -> None:
    """Assert the same output, with control residuals or without."""
    given = inputs(changes)
    condition = Condition(
        context=given["context"],
        fps=torch.full((2,), 30.0),
        padding_mask=given["padding_mask"],
        frame_mask=given["frame_mask"],
    )
    residuals = given["residuals"] if control else None
    listed = None
    if control:
        nothing = torch.zeros_like(given["residuals"][0])
        listed = [given["residuals"].get(i, nothing) for i in range(len(theirs.transformer_blocks))]
    shown = condition if theirs.config.in_channels == 5 else replace(condition, frame_mask=None)
    with torch.no_grad():
        expected = run_theirs(theirs, given["x"], given["noise_level"], shown, listed)
        found = ours(given["x"], given["noise_level"], condition, residuals)
        compare(found, expected, "output", tolerance=1e-5)


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_our_weights_in_diffusers(changes: dict[str, Any], control: bool) -> None:
    ours = tiny_dit(**changes)
    theirs = their_network({**TINY, **changes}, ours.state_dict()).eval()
    run_both(ours, theirs, changes, control)


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_of_diffusers_in_ours(changes: dict[str, Any], control: bool) -> None:
    ours, theirs = DiT(**{**TINY, **changes}), their_network({**TINY, **changes}).eval()
    randomize(theirs, seed=4)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.pos_embedder.limits))
    run_both(ours, theirs, changes, control)


def test_there_and_back() -> None:
    network = tiny_dit()
    state = network.state_dict()
    back = from_diffusers(to_diffusers(state), network.pos_embedder.limits)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"block_config": "CA-FA-MLP"},
        {"affline_emb_norm": False},
        {"use_adaln_lora": False},
        {"legacy_patch_emb": True},
        {"extra_per_block_abs_pos_emb_type": "sincos"},
        {"additional_timestamp_channels": {"h": 2}},
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        diffusers_arguments(all_arguments({**TINY, **changes}))


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="'x_embedder2.proj.1.weight' has no counterpart"):
        to_diffusers({"x_embedder2.proj.1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'img_context_proj.0.bias' has no counterpart"):
        from_diffusers({"img_context_proj.0.bias": torch.zeros(1)}, (1, 1, 1))


def test_diffusers_imports_beside_our_kernels() -> None:
    """Our package `kernels` has the name of one that model libraries look for, by its version."""
    assert Path(kernels.__file__).is_relative_to(Path(__file__).parents[1])
    assert not hasattr(kernels, "__version__")
    assert diffusers.CosmosTransformer3DModel.__module__.startswith("diffusers.")
