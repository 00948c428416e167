"""Tensors on disk: read by mapping, written whole or not at all, never gathered in memory.

What is read or made here is backed by a file, so the system may drop its pages at any time: working
on a checkpoint takes no more anonymous memory than one tensor.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from omegaconf import DictConfig, ListConfig
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# What files of the original hold besides tensors and plain values: a list of its configuration
# (the betas in the optimizer's group) drags these containers along. Building them runs no code.
REFERENCE_TYPES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    ListConfig,
    DictConfig,
    ContainerMetadata,
    Metadata,
    AnyNode,
    Any,
    defaultdict,
    *(list, dict, int, float, str, bool),
]


def map_pt(path: Path) -> dict[str, Any]:
    """Read a `torch.save` file of a dict; its tensors are mapped, nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, holds other Python objects or no dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals(REFERENCE_TYPES):
            content = torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read, it is damaged or holds more than tensors and plain values, "
            f"which are all that is read: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content


def map_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: (mapped tensors, metadata).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; what is there in the end is flushed and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(content: Any, path: Path) -> None:
    """`torch.save` under a temporary name, flushed to the disk, then renamed."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


class Scratch:
    """Makes tensors in files without a name beside the output; their space goes with them.

    Args:
        folder: where there is room for one output file more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined values, backed by a file."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        number, name = tempfile.mkstemp(prefix=".scratch", dir=self.folder)
        os.close(number)
        try:
            storage = torch.UntypedStorage.from_file(name, True, size)
        finally:
            os.unlink(name)
        return torch.empty(0, dtype=dtype).set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload]

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy that shares no storage."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def cat(self, tensors: Sequence[Tensor], dim: int) -> Tensor:
        """`torch.cat`."""
        shape = list(tensors[0].shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        joined = self.empty(shape, tensors[0].dtype)
        for target, tensor in zip(
            joined.split([tensor.shape[dim] for tensor in tensors], dim), tensors, strict=True
        ):
            target.copy_(tensor)
        return joined


def save_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], scratch: Scratch
) -> None:
    """Write tensors of which several may share a storage; the file holds each of them whole."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        separate[name] = tensor if whole and address not in seen else scratch.copy(tensor)
        seen.add(address)
    with replacing(path) as temporary:
        save_file(separate, temporary, metadata={"format": "pt", **metadata})


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit, NaNs included."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.ndim == 0:
        first, second = first.reshape(1), second.reshape(1)
    rows = zip(first.contiguous().split(_ROWS), second.contiguous().split(_ROWS), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in rows)


_ROWS = 4096  # at a time: comparing maps pages, and makes no copy
