"""From a config file and overrides to one read-only configuration of a run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from loguru import logger
from omegaconf import DictConfig, OmegaConf

from .errors import ConfigError
from .messages import explain, group_options, key_of, lazy_argument
from .schema import Config
from .validate import validate

ROOT = Path("configs/config_train.py")
ORIGINAL_ROOT = "cosmos_transfer1/diffusion/config/config_train.py"  # where the original keeps it
ROOT_NAME = "transfer1_run"  # of the root node in the ConfigStore


def compose(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Compose the configuration of one run.

    Args:
        path: a Python file with `make_config() -> Config` that registers the groups. The path of
            the original's file stands for ours, which has the same groups and experiments.
        overrides: Hydra overrides, as on the command line.

    Returns:
        A read-only OmegaConf node with the fields of `Config`, interpolations resolved, default
        arguments of all targets filled in.

    Raises:
        ConfigError: a mistake in the file name, the overrides or an experiment.
    """
    module = _load(Path(path))
    if not hasattr(module, "make_config"):
        raise ConfigError(f"--config={path}: the file defines no make_config()")
    return compose_config(module.make_config(), overrides)


def compose_config(root: Config, overrides: Sequence[str] = ()) -> Config:
    """`compose` for a root that is already made; its groups must be in Hydra's ConfigStore."""
    overrides = [override for override in overrides if override != "--"]
    ConfigStore.instance().store(name=ROOT_NAME, node=root)
    try:
        config = _compose(overrides)
        OmegaConf.resolve(config)
    except Exception as error:  # of many types; composing reads nothing but what the user wrote
        raise explain(error, overrides) from None
    OmegaConf.set_struct(config, False)
    validate(config)
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)
    return cast(Config, config)


def _compose(overrides: list[str]) -> DictConfig:
    """Compose with Hydra; an override may set an argument that a LazyCall leaves at its default.

    Such a key is not in the node yet, so Hydra refuses it; it is forced (`++key=value`), and
    `validate` then says whether the target takes it.
    """
    while True:
        try:
            with hydra.initialize(config_path=None, version_base="1.3"):
                return hydra.compose(ROOT_NAME, overrides=overrides)
        except HydraException as error:
            argument = lazy_argument(error)
            forced = [f"++{o}" if argument and key_of(o) == argument else o for o in overrides]
            if forced == overrides:
                raise
            overrides = forced


def check_trainable(config: Config) -> None:
    """Refuse to train without a network or data, listing what there is to choose.

    Raises:
        ConfigError: `model.net` or `dataloader_train` is empty.
    """
    missing = [
        choice
        for choice, node in (("net", config.model.net), ("data_train", config.dataloader_train))
        if node is None
    ]
    if missing:
        lines = [f"nothing to train: no {' and no '.join(missing)} is chosen; choose an experiment"]
        for group in ("experiment", "net", "data_train"):
            lines.append(f"  {group}= {', '.join(group_options(group))}")
        raise ConfigError("\n".join(lines))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; PLACEHOLDER is written as ???."""
    return OmegaConf.to_yaml(cast(DictConfig, config), resolve=True)


def _load(path: Path) -> ModuleType:
    if not path.exists() and path.as_posix().endswith(ORIGINAL_ROOT):
        logger.info(f"--config={path} is the original's file; reading {ROOT} in its place")
        path = ROOT
    if path.suffix != ".py" or not path.is_file():
        there = sorted(str(file) for file in Path("configs").glob("config_*.py"))
        hint = f"; there is {', '.join(there)}" if there else ""
        raise ConfigError(f"--config={path}: no such Python file{hint}")
    spec = importlib.util.spec_from_file_location(f"{__package__}.loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
