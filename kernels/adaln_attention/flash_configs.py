"""Tile sizes of the attention kernels per architecture and head size, found by compiling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..launch import is_amd

HEAD_SIZES = (32, 64, 96, 128, 256)


@dataclass(frozen=True)
class Config:
    """Tile of one kernel: query rows, key rows, warps, stages of the software pipeline.

    With `max_registers` ptxas takes as many as it needs; without, it may spill to need fewer.
    """

    block_l: int
    block_m: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Configs:
    """The three kernels of one architecture and head size.

    Attributes:
        forward: queries stay, keys and values pass by.
        keys: gradients of keys and values; queries pass by.
        queries: gradient of the queries; keys and values pass by.
        descriptors: whether tiles are loaded through tensor descriptors.
        ahead: whether the scores of the next keys are computed before the values of these are used.
    """

    forward: Config
    keys: Config
    queries: Config
    descriptors: bool = False
    ahead: bool = False


# All within 99 KB of shared memory, which is what sm_86, sm_89 and sm_120 have.
_POINTERS = {
    32: Configs(Config(128, 64, 4, 3), Config(64, 64, 4, 2), Config(128, 32, 4, 2)),
    64: Configs(Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(128, 32, 8, 2)),
    128: Configs(Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(128, 32, 8, 2)),
    256: Configs(Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(64, 32, 8, 1)),
}
_HOPPER = {
    32: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 2), Config(128, 64, 8, 2), True, True),
    64: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 2), Config(128, 64, 8, 2), True, True),
    128: Configs(Config(128, 64, 8, 3), Config(64, 128, 8, 2), Config(128, 64, 8, 2), True, True),
    256: Configs(Config(128, 32, 8, 3), Config(16, 64, 8, 2), Config(128, 32, 8, 2), True, True),
}
# The accumulators of larger tiles do not fit the 512 columns of tensor memory.
_BLACKWELL = {
    32: Configs(Config(128, 128, 8, 2), Config(64, 128, 8, 3), Config(128, 64, 8, 2), True),
    64: Configs(Config(128, 128, 8, 2), Config(64, 128, 8, 3), Config(128, 64, 8, 2), True),
    128: Configs(Config(128, 128, 8, 2), Config(64, 128, 8, 3), Config(128, 64, 8, 2), True),
    256: Configs(Config(128, 64, 8, 2), Config(64, 64, 8, 1), Config(128, 64, 8, 1), True),
}
_CDNA = {
    32: Configs(Config(128, 64, 4, 1), Config(32, 128, 4, 1), Config(128, 32, 8, 1)),
    64: Configs(Config(128, 64, 4, 1), Config(32, 128, 4, 1), Config(128, 32, 8, 1)),
    128: Configs(Config(128, 64, 4, 1), Config(32, 128, 4, 1), Config(128, 32, 8, 1)),
    256: Configs(Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(64, 32, 4, 1)),
}
_TABLES = {
    "sm_8": _POINTERS,
    "sm_9": _HOPPER,
    "sm_10": _BLACKWELL,
    "sm_12": _POINTERS,
    "gfx9": _CDNA,
}


def configs_for(target: str, dtype: torch.dtype, head_size: int) -> Configs:
    """Configurations for an architecture such as "sm_90"; a head of 96 runs in tiles of 128.

    Raises:
        ValueError: an architecture without configurations.
    """
    width = 1 << (head_size - 1).bit_length()
    for prefix, table in _TABLES.items():
        if target.startswith(prefix):
            return _float32(width, is_amd(target)) if dtype == torch.float32 else table[width]
    raise ValueError(
        f"attention: no configuration for {target}, but for {', '.join(_TABLES)}...; "
        "set kernels.attention=reference"
    )


def _float32(width: int, amd: bool) -> Configs:
    """Products of float32 take operands from registers: small tiles, and smaller for wide heads."""
    block = 16 if width > 128 else 32
    warps = 4 if amd else 8
    config = Config(block, block, warps, num_stages=1, max_registers=255)
    # Heads of 96 in tiles of 128 leave no registers for more keys.
    forward = replace(config, block_m=16) if width == 128 and not amd else config
    return Configs(forward, config, config)
