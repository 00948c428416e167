"""What a saved optimizer state must be like before anything is taken from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def refuse(**options: Any) -> None:
    """Raise ValueError for the first option that is on: `FusedAdamW` lacks it."""
    for name, value in options.items():
        if value:
            raise ValueError(f"optimizer.{name}={value}: FusedAdamW only knows {name}=False")


def check_saved_group(saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raise ValueError where a saved group is of other parameters or of options unknown here."""
    refuse(**{name: saved.get(name) for name in ("amsgrad", "maximize", "differentiable")})
    count, expected = len(saved["params"]), len(group["params"])
    if count != expected:
        raise ValueError(
            f"the optimizer state holds {count} parameters, the model trains {expected}; "
            "was it saved with another net or another finetune_base_model?"
        )
    names, own = saved.get("param_names"), group.get("param_names")
    if names and own and list(names) != list(own):
        index = next(i for i, pair in enumerate(zip(names, own, strict=True)) if len({*pair}) == 2)
        raise ValueError(
            f"the optimizer state is of other parameters: number {index} is {names[index]!r} "
            f"there and {own[index]!r} here"
        )


def saved_step(saved: Mapping[str, Any], states: Mapping[int, Any]) -> Tensor:
    """Number of applied updates of a saved group: its own, or what its parameters agree on."""
    if "step" in saved:
        return torch.as_tensor(saved["step"]).reshape(1)
    steps = {int(states[index]["step"]) for index in saved["params"] if index in states}
    if len(steps) > 1:
        raise ValueError(
            f"the optimizer state counts {sorted(steps)} steps for parameters of one group, but "
            "FusedAdamW counts them per group; give such parameters groups of their own"
        )
    return torch.tensor([steps.pop() if steps else 0])


def check_saved_state(index: int, tensors: Mapping[str, Tensor], shape: torch.Size) -> None:
    """Raise ValueError where the saved tensors of parameter `index` are not those of AdamW."""
    unknown = sorted(set(tensors) - {*MOMENTS, "master", "step"})
    if unknown:
        raise ValueError(f"the optimizer state of parameter {index} holds unknown {unknown}")
    for name in (*MOMENTS, "master"):
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(
                f"the optimizer state {name} of parameter {index} has shape "
                f"{tuple(tensors[name].shape)}, the parameter {tuple(shape)}"
            )
