"""The same network in diffusers: weights convert both ways and give the same output."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from goldens import compare
from tiny_model import TINY, randomize, tiny_dit
from torch import Tensor

import kernels
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


@pytest.fixture(autouse=True)
def nearest_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one function of torchvision that the network of diffusers calls."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(image: Tensor, size: list[int], interpolation: object) -> Tensor:
        return F.interpolate(image, size=size, mode="nearest")

    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST=None)
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", transforms, raising=False)


def all_arguments(changes: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a DiT with its defaults filled in."""
    parameters = inspect.signature(DiT).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **TINY, **changes}


def their_network(changes: dict[str, Any]) -> Any:
    network = diffusers.CosmosTransformer3DModel(**diffusers_arguments(all_arguments(changes)))
    return network.eval()


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


def run_ours(network: DiT, given: dict[str, Any], control: bool) -> Tensor:
    condition = Condition(
        context=given["context"],
        fps=torch.full((2,), 30.0),
        padding_mask=given["padding_mask"],
        frame_mask=given["frame_mask"],
    )
    residuals = given["residuals"] if control else None
    return network(given["x"], given["noise_level"], condition, residuals)


def run_theirs(network: Any, given: dict[str, Any], control: bool) -> Tensor:
    residuals = None
    if control:
        nothing = torch.zeros_like(given["residuals"][0])
        blocks = range(len(network.transformer_blocks))
        residuals = [given["residuals"].get(index, nothing) for index in blocks]
    (out,) = network(
        hidden_states=given["x"],
        timestep=given["noise_level"],
        encoder_hidden_states=given["context"],
        block_controlnet_hidden_states=residuals,
        fps=30.0,
        condition_mask=given["frame_mask"] if network.config.in_channels == 5 else None,
        padding_mask=given["padding_mask"],
        return_dict=False,
    )
    return out


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_our_weights_in_diffusers(changes: dict[str, Any], control: bool) -> None:
    ours, theirs = tiny_dit(**changes), their_network(changes)
    theirs.load_state_dict(to_diffusers(ours.state_dict()))
    given = inputs(changes)
    with torch.no_grad():
        expected = run_theirs(theirs, given, control)
        compare(run_ours(ours, given, control), expected, "output", tolerance=1e-5)


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_weights_of_diffusers_in_ours(changes: dict[str, Any], control: bool) -> None:
    arguments = {**TINY, **changes}
    ours, theirs = DiT(**arguments), their_network(changes)
    randomize(theirs, seed=4)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours.pos_embedder.limits))
    given = inputs(changes)
    with torch.no_grad():
        expected = run_theirs(theirs, given, control)
        compare(run_ours(ours, given, control), expected, "output", tolerance=1e-5)


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
        diffusers_arguments(all_arguments(changes))


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
