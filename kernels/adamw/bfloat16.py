"""bfloat16 parameters that have no float32 master: a 16-bit remainder, or stochastic rounding.

A bfloat16 number is the upper half of a float32. Kept beside it, the lower half as a signed int16
makes the exact float32 (26 instead of 28 bytes of traffic per parameter); the parameter itself is
then the float32 rounded to nearest, halves away from zero. Stochastic rounding keeps nothing: a
number is rounded up with the probability of its distance from below, so the mean is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUIET_NAN = 0x7FC00000
_LOW = 0xFFFF
_WORD = 0xFFFFFFFF


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor of a bfloat16 parameter and its int16 remainder."""
    low = remainder.int()
    high = param.view(torch.int16).int() - (low < 0).int()
    return ((high << 16) | (low & _LOW)).view(torch.float32)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as (bfloat16 parameter, int16 remainder); `join` gives it back exactly.

    NaNs become the one with an empty lower half: rounded up, another could look like a zero.
    """
    bits = torch.where(weight == weight, weight.view(torch.int32), QUIET_NAN)
    low = (bits & _LOW).short()
    high = (bits >> 16) + (low < 0).int()
    return high.short().view(torch.bfloat16), low


def round_stochastically(weight: Tensor, key: Tensor) -> Tensor:
    """Round float32 to bfloat16 with random bits, one draw per element; mean over draws is weight.

    Args:
        weight: float32; numbers that are not finite are rounded to nearest.
        key: int64 [], see `rounding_key`.
    """
    place = torch.arange(weight.numel(), device=weight.device).reshape(weight.shape)
    draw = _hash((place * 0x9E3779B1 & _WORD) ^ key)
    bits = (weight.view(torch.int32).long() & _WORD) + (draw & _LOW)
    rounded = (bits >> 16).short().view(torch.bfloat16)
    return torch.where(weight.isfinite(), rounded, weight.bfloat16())


def rounding_key(seed: int | Tensor, step: Tensor, index: int) -> Tensor:
    """What makes the draws of one tensor in one update its own; int64 [] in [0, 2^32).

    Args:
        seed: of the run.
        step: number of the update, one element.
        index: place of the tensor in the list of parameters.
    """
    mixed = step.long().reshape(()) * 0x85EBCA6B + index * 0xC2B2AE35 + seed
    return _hash(mixed & _WORD)


def _hash(word: Tensor) -> Tensor:
    """A bijective hash of 32 bits in int64 (multiply-xorshift; constants by C. Wellons, 2018)."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _WORD
    return word ^ (word >> 16)
