"""Text embeddings of the dataset layout, padded to the length the network takes.

Shapes: n tokens in the file, M tokens after padding, C channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from transfer1.data.pickles import load_pickle

T5_TOKENS = 512
T5_CHANNELS = 1024


def read_text_embedding(path: str | Path, channels: int = T5_CHANNELS) -> torch.Tensor:
    """Return the embedding stored in a T5 pickle (a list with one array [n, C]), float32 [n, C].

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
    if not isinstance(content, list) or len(content) != 1:
        size = f" of {len(content)}" if isinstance(content, list) else ""
        raise ValueError(
            f"{path}: holds a {type(content).__name__}{size}; {expected}: embed the text again"
        )
    array = content[0]
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{path}: the list holds {kind}; {expected}: embed the text again")
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != channels:
        raise ValueError(f"{path}: has shape {list(array.shape)}; {expected}: embed the text again")
    return torch.from_numpy(array.astype(np.float32))


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
