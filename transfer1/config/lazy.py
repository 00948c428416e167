"""Describe an object now, build it later.

`LazyCall(target)(**arguments)` records a dotted path and its arguments in a plain config node: the
same node can come from Python, from YAML or from the command line, and be built by this module or
by `hydra.utils.instantiate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from .errors import ConfigError
from .targets import ARGS, PARTIAL, TARGET, check_arguments, full_key, locate

LazyDict = DictConfig

# Marks a value that only run time knows; `instantiate(node, name=value)` fills it.
PLACEHOLDER: Any = MISSING

HYDRA_ONLY = ("_recursive_", "_convert_")


def dotted_path(target: Callable[..., Any]) -> str:
    """Return "package.module.Name" of an importable callable.

    Raises:
        ConfigError: a lambda, a local function, a partial or an instance, which no path can name.
    """
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not module or not name or "<" in name:
        raise ConfigError(
            f"LazyCall({target!r}): only functions and classes at the top level of a module can be "
            'named in a config; define one there, or pass its path "package.module.name"'
        )
    return f"{module}.{name}"


class LazyCall:
    """`LazyCall(target)(**arguments)` is a node that `instantiate` turns into the object.

    Args:
        target: a callable, or its dotted path (then nothing is imported until the node is built).
    """

    def __init__(self, target: Callable[..., Any] | str):
        if not isinstance(target, str) and not callable(target):
            raise ConfigError(f"LazyCall({target!r}): expected a callable or a dotted path")
        self.path = target if isinstance(target, str) else dotted_path(target)

    def __call__(self, **arguments: Any) -> LazyDict:
        content: dict[Any, Any] = {TARGET: self.path, **arguments}
        return DictConfig(content, flags={"allow_objects": True})


def instantiate(node: Any, **runtime: Any) -> Any:
    """Build the object that a node describes, and everything nested in it.

    The node, a config or a plain dict or list, stays untouched. Without `_target_` it becomes a
    plain dict or list of what it holds. `_args_` and `_partial_` mean what they mean in Hydra.

    Args:
        node: the description.
        runtime: values for arguments of the outermost target that the config leaves out or marks
            as PLACEHOLDER.

    Raises:
        ConfigError: a runtime value for an argument that the config sets, an argument that only run
            time knows and that nobody passed, arguments that the target does not take, or a
            ValueError with which it refuses a value.
    """
    if not OmegaConf.is_config(node):
        node = OmegaConf.create(node, flags={"allow_objects": True})
    if runtime and (not isinstance(node, DictConfig) or TARGET not in node):
        raise ConfigError(
            f"{full_key(node)}: nothing to pass {', '.join(runtime)} to, the node has no {TARGET}"
        )
    return _build(node, runtime)


def _build(node: Any, runtime: Mapping[str, Any]) -> Any:
    if isinstance(node, ListConfig):
        return None if node._is_none() else [_build(child, {}) for child in _children(node)]
    if not isinstance(node, DictConfig):
        return node
    if node._is_none():
        return None
    if TARGET not in node:
        return {key: _build(node[key], {}) for key in node if not OmegaConf.is_missing(node, key)}
    return _call(node, runtime)


def _children(node: ListConfig) -> Sequence[Any]:
    return [node[index] for index in range(len(node))]


def _call(node: DictConfig, runtime: Mapping[str, Any]) -> Any:
    where = full_key(node)
    target = locate(node[TARGET], where)
    for name in HYDRA_ONLY:
        if name in node:
            raise ConfigError(f"{where}.{name}: not supported; nested nodes are always built")
    given = [str(key) for key in node if key not in (TARGET, ARGS, PARTIAL)]
    missing = {name for name in given if OmegaConf.is_missing(node, name)}
    for name in runtime:
        if name in given and name not in missing:
            raise ConfigError(
                f"{where}.{name} is set to {node[name]!r} in the config and was passed again at "
                "run time; write PLACEHOLDER there or leave it out"
            )
    partial = bool(node.get(PARTIAL, False))
    unfilled = sorted(missing - runtime.keys())
    if unfilled and not partial:
        raise ConfigError(
            f"{where}: {', '.join(unfilled)} of {node[TARGET]} is known only at run time; "
            "pass it to instantiate()"
        )
    arguments = {name: _build(node[name], {}) for name in given if name not in missing}
    arguments.update(runtime)
    positional = _build(node[ARGS], {}) if ARGS in node else []
    if partial:
        return functools.partial(target, *positional, **arguments)
    check_arguments(target, node[TARGET], arguments, where, complete=ARGS not in node)
    try:
        return target(*positional, **arguments)
    except ConfigError:
        raise
    except ValueError as error:  # the target refuses a value
        raise ConfigError(f"{where}: {error}") from error
