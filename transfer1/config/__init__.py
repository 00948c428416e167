"""Configuration: lazily described objects, the schema of a run, composition of groups and overrides."""

from .errors import ConfigError
from .lazy import PLACEHOLDER, LazyCall, LazyDict, instantiate, locate

__all__ = ["PLACEHOLDER", "ConfigError", "LazyCall", "LazyDict", "instantiate", "locate"]
