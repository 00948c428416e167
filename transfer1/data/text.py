"""Text embeddings of the dataset layout, padded to the length the network takes.

Shapes: n tokens in the file, M tokens after padding, C channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfer1.data.pickles import load_pickle

T5_TOKENS = 512
T5_CHANNELS = 1024
NESTED = ("pickle", "ground_truth", "embeddings", "t5_xxl")  # keys in the files of driving data


def read_text_embedding(path: str | Path, channels: int = T5_CHANNELS) -> torch.Tensor:
    """Return the embedding stored in a T5 pickle, float32 [n, C].

    The pickle holds a list with one array [n, C]; in driving data, that list or the array itself
    may lie inside the dicts of `NESTED`.

    Raises:
        ValueError: the file is missing, broken, or holds anything else. Names the file.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"{path}: the text embedding is missing; write a list with one array "
            f"[n, {channels}] there"
        )
    content = load_pickle(path)
    expected = f"expected a list with one float array of shape [n, {channels}], n >= 1"
    nested = isinstance(content, dict)
    if nested:
        content = _nested(content, path, expected)
    if not (nested and isinstance(content, np.ndarray)):
        if not isinstance(content, list) or len(content) != 1:
            size = f" of {len(content)}" if isinstance(content, list) else ""
            raise ValueError(
                f"{path}: holds a {type(content).__name__}{size}; {expected}: embed the text again"
            )
        content = content[0]
    array = content
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{path}: the list holds {kind}; {expected}: embed the text again")
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != channels:
        raise ValueError(f"{path}: has shape {list(array.shape)}; {expected}: embed the text again")
    return torch.from_numpy(array.astype(np.float32))


def _nested(content: Any, path: str | Path, expected: str) -> Any:
    for depth, key in enumerate(NESTED):
        if not isinstance(content, dict) or key not in content:
            keys = f"the keys {sorted(map(str, content))}" if isinstance(content, dict) else "none"
            raise ValueError(
                f"{path}: holds a dict without {'/'.join(NESTED[: depth + 1])} (there: {keys}); "
                f"{expected}, or that at {'/'.join(NESTED)}: embed the text again"
            )
        content = content[key]
    return content


def pad_text(
    embedding_nC: torch.Tensor, num_tokens: int = T5_TOKENS, mask_all_ones: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad with zeros or cut to `num_tokens`.

    Returns:
        The embedding [M, C] and its mask int64 [M]: all ones, or 1 for tokens of the text alone.
    """
    n = min(embedding_nC.shape[0], num_tokens)
    padded = embedding_nC.new_zeros(num_tokens, embedding_nC.shape[1])
    padded[:n] = embedding_nC[:n]
    mask = torch.ones(num_tokens, dtype=torch.int64)
    if not mask_all_ones:
        mask[n:] = 0
    return padded, mask
