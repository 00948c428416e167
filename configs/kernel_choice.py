"""Group `kernels`: one backend for all ops, and one key per op of the table to choose another."""

from __future__ import annotations

import enum
from typing import Any

import attrs
from hydra.core.config_store import ConfigStore

from kernels import BACKENDS, OPS
from transfer1.config import PLACEHOLDER

Backend: Any = enum.StrEnum("Backend", {name: name for name in BACKENDS})  # type: ignore[misc]
OptionalBackend: Any = Backend | None

# A typed node, so that `kernels.attention=cuda` is refused with the list of backends.
KernelChoice = attrs.make_class(
    "KernelChoice",
    {
        "_target_": attrs.field(default="kernels.select", type=str),
        "default": attrs.field(default=Backend["auto"], type=Backend),
        "device": attrs.field(default=PLACEHOLDER, type=str),
        **{name: attrs.field(default=None, type=OptionalBackend) for name in OPS},
    },
)


def register() -> None:
    """Store the options of `kernels`."""
    for backend in Backend:
        ConfigStore.instance().store(
            group="kernels",
            package="kernels",
            name=backend.value,
            node=KernelChoice(default=backend),
        )
