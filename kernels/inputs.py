"""What the factories of inputs of the multi-tensor ops share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, repeat

import torch
from torch import Tensor

from .registry import Case

Shapes = Sequence[tuple[int, ...]]

# Matrices, vectors and scalars of odd sizes, as a transformer has them; one is more than a chunk.
RAGGED: Shapes = ((192, 96), (96, 384), (513, 131), (96,), (7, 5, 3), (0, 4), (1,))


def _transformer(width: int, blocks: int) -> Shapes:
    """Parameters of a transformer: four attention matrices, an MLP, modulation, norms per block."""
    block: list[tuple[int, ...]] = [*repeat((width, width), 4)]
    block += [(4 * width, width), (width, 4 * width), (256, width), (3 * width, 256), (64,), (64,)]
    return tuple(chain.from_iterable(repeat(block, blocks)))


LARGE: Mapping[str, Case] = {
    "flat_48M": Case({"shapes": ((48_000_000,),)}),
    "transformer_200": Case({"shapes": _transformer(512, 20)}),  # 200 tensors, 73 M parameters
    "ragged": Case({"shapes": RAGGED}),
}


def flat_tensors(
    shapes: Shapes,
    dtype: torch.dtype,
    device: torch.device | str,
    scale: float = 1.0,
    offset: int = 0,
) -> list[Tensor]:
    """Normal numbers times `scale`; each tensor starts `offset` elements into its own storage."""
    tensors = []
    for shape in shapes:
        storage = scale * torch.randn(offset + math.prod(shape), device=device)
        tensors.append(storage.to(dtype)[offset:].view(shape))
    return tensors


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.nbytes for tensor in tensors)


def element_count(tensors: Sequence[Tensor]) -> int:
    """Number of all elements."""
    return sum(tensor.numel() for tensor in tensors)
