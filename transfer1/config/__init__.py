"""Configuration: lazily described objects, the schema of a run, and its composition."""

from .compose import check_trainable, compose, compose_config, to_yaml
from .consistency import check_consistency, check_values
from .errors import ConfigError
from .lazy import PLACEHOLDER, LazyCall, LazyDict, instantiate
from .schema import (
    CheckpointConfig,
    Config,
    CuDNNConfig,
    DDPConfig,
    JobConfig,
    ModelConfig,
    ModelParallelConfig,
    TrainerConfig,
)
from .targets import locate

__all__ = [
    "PLACEHOLDER",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CuDNNConfig",
    "DDPConfig",
    "JobConfig",
    "LazyCall",
    "LazyDict",
    "ModelConfig",
    "ModelParallelConfig",
    "TrainerConfig",
    "check_consistency",
    "check_trainable",
    "check_values",
    "compose",
    "compose_config",
    "instantiate",
    "locate",
    "to_yaml",
]
