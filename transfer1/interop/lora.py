"""Low-rank adapters as files: inside our checkpoints, for peft, for diffusers, or merged.

An adapted linear layer computes W x + (alpha / r) B A x (Hu et al. 2021, arXiv:2106.09685). In a
state dict A [r, in] is `<layer>.lora_A.weight`, B [out, r] `<layer>.lora_B.weight`, and alpha the
scalar `<layer>.lora_alpha`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .diffusers import to_diffusers
from .files import Scratch, map_safetensors, replacing, save_safetensors

A, B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".lora_alpha"
BASE = "base_model.net."
PEFT_PREFIX = "base_model.model."
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear layer.

    Attributes:
        A: [r, in].
        B: [out, r].
        alpha: scale times r.
    """

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, float32 [out, in]."""
        return (self.alpha / self.rank) * (self.B.float() @ self.A.float())


def split_adapters(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """Part a state dict into the weights without adapters and the adapters by layer name.

    Raises:
        ValueError: an adapter is not whole.
    """
    layers = [key.removesuffix(A) for key in state if key.endswith(A)]
    parts = {layer + end for layer in layers for end in (A, B, ALPHA)}
    stray = sorted(parts ^ {key for key in state if key.endswith((A, B, ALPHA))})
    if stray:
        raise ValueError(f"{len(stray)} parts of adapters are missing or alone: {stray[:3]}")
    plain = {key: tensor for key, tensor in state.items() if key not in parts}
    adapters = {
        layer: Adapter(state[layer + A], state[layer + B], float(state[layer + ALPHA]))
        for layer in layers
    }
    return plain, adapters


def merge(
    state: Mapping[str, Tensor], adapters: Mapping[str, Adapter], scratch: Scratch
) -> dict[str, Tensor]:
    """Add adapters to the weights of their layers, in float32, rounded once to the weight's dtype.

    Raises:
        ValueError: a layer is missing or has another shape.
    """
    merged = dict(state)
    for layer, adapter in adapters.items():
        key = f"{layer}.weight"
        shape = (adapter.B.shape[0], adapter.A.shape[1])
        found = tuple(state[key].shape) if key in state else "no such weight"
        if found != shape:
            raise ValueError(f"the adapter of {layer} is for {shape}, the checkpoint has {found}")
        merged[key] = scratch.copy((state[key].float() + adapter.delta()).to(state[key].dtype))
    return merged


def write_peft(adapters: Mapping[str, Adapter], folder: Path, scratch: Scratch) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, for our own modules."""
    rank, alpha = _common(adapters)
    tensors = {
        f"{PEFT_PREFIX}{layer}{end}": tensor
        for layer, adapter in adapters.items()
        for end, tensor in ((A, adapter.A), (B, adapter.B))
    }
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapters),
        "inference_mode": True,
    }
    save_safetensors(tensors, folder / PEFT_FILES[0], {}, scratch)
    with replacing(folder / PEFT_FILES[1]) as path:
        path.write_text(json.dumps(described, indent=2) + "\n")


def read_peft(folder: Path) -> dict[str, Adapter]:
    """Read what `write_peft` or peft itself wrote for our modules.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no plain LoRA, or an adapter is not whole.
    """
    tensors, _ = map_safetensors(folder / PEFT_FILES[0])
    described = json.loads((folder / PEFT_FILES[1]).read_text())
    extra = [
        k for k in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if described.get(k)
    ]
    if described.get("peft_type") != "LORA" or extra:
        raise ValueError(f"{folder} is no plain LoRA adapter: {described.get('peft_type')} {extra}")
    state = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    alpha = torch.tensor(float(described["lora_alpha"]))
    layers = [key.removesuffix(A) for key in state if key.endswith(A)]
    return split_adapters({**state, **{layer + ALPHA: alpha for layer in layers}})[1]


def write_diffusers(adapters: Mapping[str, Adapter], folder: Path, scratch: Scratch) -> None:
    """Write the adapters of the base for `CosmosTransformer3DModel.load_lora_adapter`.

    The scale goes into B, so that readers that know no alpha are right too.

    Raises:
        ValueError: adapters of the control branch, which diffusers does not have.
    """
    foreign = sorted(layer for layer in adapters if not layer.startswith(BASE))
    if foreign:
        raise ValueError(
            f"diffusers has only the base; {len(foreign)} adapters are not of it: {foreign[:3]}"
        )
    tensors = {}
    for layer, adapter in adapters.items():
        ours = f"{layer.removeprefix(BASE)}.weight"
        (theirs,) = to_diffusers({ours: adapter.A})
        name = f"transformer.{theirs.removesuffix('.weight')}"
        tensors[name + A] = adapter.A
        tensors[name + B] = adapter.B * (adapter.alpha / adapter.rank)
    save_safetensors(tensors, folder / DIFFUSERS_FILE, {}, scratch)


def _common(adapters: Mapping[str, Adapter]) -> tuple[int, float]:
    kinds = {(adapter.rank, adapter.alpha) for adapter in adapters.values()}
    if len(kinds) != 1:
        raise ValueError(f"adapters of one rank and alpha are written; here are {sorted(kinds)}")
    return kinds.pop()
