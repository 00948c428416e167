"""Turns what Hydra and OmegaConf raise into one message: key, value given, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from .errors import ConfigError, did_you_mean, nearest
from .removed import REMOVED_KEYS
from .targets import TARGET

SYNTAX = "overrides are key=value, +key=value, ~key or group=option"


def group_options(group: str) -> list[str]:
    """Names registered in a group of the ConfigStore, [] if there is no such group."""
    store = ConfigStore.instance()
    if store.get_type(group) != ObjectType.GROUP:
        return []
    return sorted(
        name.removesuffix(".yaml") for name in store.list(group) if name.endswith(".yaml")
    )


def groups() -> list[str]:
    """Top-level groups of the ConfigStore, without those of Hydra itself."""
    names = [str(name) for name in ConfigStore.instance().repo if name != "hydra"]
    return sorted(name for name in names if group_options(name))


def explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Return the user's mistake behind an error that composition raised."""
    if isinstance(error, MissingConfigException):
        return _no_such_option(error)
    if isinstance(error, OverrideParseException):
        detail = str(error.message).split("\n")[0]
        return ConfigError(f"cannot read the override {error.override!r} ({detail}); {SYNTAX}")
    message = str(error)
    source = re.match(r"In '(?P<source>[^']+)': ", message)
    prefix = f"in {source['source']}: " if source else ""
    cause = _cause(error)
    if cause is not None and cause.full_key:
        return ConfigError(prefix + _wrong_key_or_value(cause, overrides))
    if isinstance(error, AssertionError | AttributeError):  # how OmegaConf fails below a null
        return ConfigError(
            f"one of {' '.join(overrides)} sets a key inside null; choose an option of its group"
        )
    group = re.search(r"Could not override '(?P<group>[^']+)'", message)
    if group:
        return ConfigError(
            f"{prefix}override /{group['group']}: the defaults list has no such group"
            + nearest(group["group"], groups())
        )
    detail = re.sub(r"^In '[^']+': ", "", message).split("\n")[0].rstrip(".")
    quoted = re.search(r"'([^']+)'", detail)
    given = next((o for o in overrides if quoted and quoted[1] in o), None)
    return ConfigError(f"{prefix}{f'{given}: ' if given else ''}{detail}; {SYNTAX}")


def lazy_argument(error: Exception) -> str | None:
    """Key of the argument that an override sets in a LazyCall node which does not mention it."""
    cause = _cause(error)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        parent = cause.parent_node
        schema = OmegaConf.get_type(parent) if isinstance(parent, DictConfig) else None
        if isinstance(parent, DictConfig) and TARGET in parent and schema is dict:
            return str(cause.full_key)
    return None


def key_of(override: str) -> str:
    """The key that an override sets or deletes."""
    return override.partition("=")[0].lstrip("+~")


def _cause(error: BaseException | None) -> OmegaConfBaseException | None:
    """The error of OmegaConf that Hydra wrapped."""
    while error is not None and not isinstance(error, OmegaConfBaseException):
        error = error.__cause__ or error.__context__
    return error


def _no_such_option(error: MissingConfigException) -> ConfigError:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = group_options(group)
    if not options:
        valid = nearest(group, groups())
        return ConfigError(f"{group}={option}: there is no group {group!r}{valid}")
    close = did_you_mean(option, options)
    return ConfigError(
        f"{group}={option}: the group {group!r} has no option {option!r}{close}\n"
        f"  options: {', '.join(options)}"
    )


def _wrong_key_or_value(cause: OmegaConfBaseException, overrides: Sequence[str]) -> str:
    key = str(cause.full_key)
    detail = str(cause.msg or cause).split("\n")[0]
    related = [o for o in overrides if _within(key, key_of(o)) or _within(key_of(o), key)]
    shown = related[-1] if related else key
    if "not in" not in detail:
        return f"{shown}: {detail}"
    if key in REMOVED_KEYS:
        return f"{shown}: {key} is gone; {REMOVED_KEYS[key]}"
    parent = cause.parent_node
    names = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
    if "." not in key:
        return f"{shown}: there is no key or group {key!r}" + nearest(key, [*names, *groups()])
    owner, _, name = key.rpartition(".")
    if not names:
        return f"{shown}: {owner} is empty; choose an option of its group, or add with +{key}="
    return f"{shown}: {owner} has no key {name!r}" + nearest(name, names)


def _within(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith((f"{prefix}.", f"{prefix}["))
