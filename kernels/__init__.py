"""Pure functions on tensors: a table of ops, each with a reference and faster implementations."""

from . import adaln_attention, adamw, ema
from .registry import BACKENDS, OPS, Case, Op, Ops, register, select

__all__ = [
    "BACKENDS",
    "OPS",
    "Case",
    "Op",
    "Ops",
    "adaln_attention",
    "adamw",
    "ema",
    "register",
    "select",
]
