"""diffusers' `CosmosTransformer3DModel` with the weights and the inputs of one of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from transfer1.diffusion.condition import Condition
from transfer1.interop.diffusers import all_arguments, diffusers_arguments, to_diffusers


def their_network(arguments: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Any:
    """The network of diffusers for these arguments of ours; with our weights if they are given.

    It calls one function of torchvision, a nearest resize of the padding mask. torchvision is large
    and not needed otherwise: PyTorch's own resize stands in.
    """
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    def resize(image: Tensor, size: list[int], interpolation: object) -> Tensor:
        return F.interpolate(image, size=size, mode="nearest")

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST=None)
    )
    if not hasattr(transformer_cosmos, "transforms"):
        vars(transformer_cosmos)["transforms"] = stand_in
    network: Any = CosmosTransformer3DModel(**diffusers_arguments(all_arguments(arguments)))
    if weights is not None:
        network.load_state_dict(to_diffusers(dict(weights)))
    return network


def run_theirs(
    network: Any,
    x_BCTHW: Tensor,
    noise_level_B: Tensor,
    condition: Condition,
    residuals: list[Tensor] | None = None,
) -> Tensor:
    """Their forward on our inputs; all samples share frame rate and padding mask there."""
    assert condition.padding_mask is not None
    (out,) = network(
        hidden_states=x_BCTHW,
        timestep=noise_level_B,
        encoder_hidden_states=condition.context,
        block_controlnet_hidden_states=residuals,
        fps=None if condition.fps is None else float(condition.fps[0]),
        condition_mask=condition.frame_mask,
        padding_mask=condition.padding_mask[:1],
        return_dict=False,
    )
    return out
