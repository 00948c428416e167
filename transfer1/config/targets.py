"""What a dotted path names and which arguments it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from omegaconf import DictConfig, ListConfig

from .errors import ConfigError, nearest
from .removed import REMOVED_ARGUMENTS

TARGET = "_target_"
ARGS = "_args_"
PARTIAL = "_partial_"


def full_key(node: DictConfig | ListConfig) -> str:
    """Where a node stands, "model.net" or "parts[0]"; "config" for a root."""
    parent = node._get_parent()
    return str(parent._get_full_key(node._key())) if parent is not None else "config"


def locate(path: str, key: str = "") -> Any:
    """Import what a dotted path names; `key` says in messages where the path was written.

    Raises:
        ConfigError: no such module or attribute. An error inside an imported module is passed on.
    """
    where = f"{key}: " if key else ""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f'{where}{TARGET}={path!r} is not a path like "package.module.Name"')
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            continue
        for index, attribute in enumerate(parts[length:], start=length):
            if not hasattr(found, attribute):
                owner = ".".join(parts[:index])
                raise ConfigError(
                    f"{where}{TARGET}={path}: {owner} has no {attribute!r}"
                    + nearest(attribute, [name for name in dir(found) if not name.startswith("_")])
                )
            found = getattr(found, attribute)
        return found
    raise ConfigError(f"{where}{TARGET}={path}: there is no module {parts[0]!r}")


def parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Parameters of a target with their annotations evaluated; None if it tells no signature."""
    try:
        found = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    function = inspect.unwrap(cast(Any, target).__init__ if isinstance(target, type) else target)
    namespace = getattr(function, "__globals__", {})
    return {
        name: parameter.replace(annotation=_evaluate(parameter.annotation, namespace))
        for name, parameter in found.items()
    }


def _evaluate(annotation: Any, namespace: Mapping[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(namespace))
    except (
        NameError,
        AttributeError,
        TypeError,
        SyntaxError,
    ):  # e.g. imported for type checkers only
        return inspect.Parameter.empty


def unknown_argument(key: str, path: str, name: str, valid: Collection[str]) -> ConfigError:
    """The error for an argument that a target does not take, with its replacement if it had one."""
    if name in REMOVED_ARGUMENTS:
        return ConfigError(f"{key}: {path} takes no {name!r}; {REMOVED_ARGUMENTS[name]}")
    return ConfigError(f"{key}: {path} takes no argument {name!r}" + nearest(name, valid))


def check_arguments(
    target: Callable[..., Any], path: str, names: Collection[str], key: str, complete: bool
) -> None:
    """Refuse names that the target does not take and, if `names` is complete, those that lack.

    Raises:
        ConfigError: see above.
    """
    known = parameters(target)
    if known is None:
        return
    named = [n for n, p in known.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if all(p.kind is not p.VAR_KEYWORD for p in known.values()):
        for name in names:
            if name not in named:
                raise unknown_argument(f"{key}.{name}", path, name, named)
    lacking = [n for n in named if known[n].default is inspect.Parameter.empty and n not in names]
    if complete and lacking:
        raise ConfigError(f"{key}: {path} needs {', '.join(lacking)}")
