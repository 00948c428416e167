"""Checks composed nodes against what their targets take, and fills in default arguments.

Only targets of nodes in the composed configuration are imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import attrs
from omegaconf import DictConfig, ListConfig, OmegaConf

from .annotations import convert, is_configurable
from .errors import ConfigError
from .removed import REMOVED_TARGETS
from .schema import NODE
from .targets import ARGS, PARTIAL, TARGET, full_key, locate, parameters, unknown_argument

RESERVED = (TARGET, ARGS, PARTIAL)


def validate(node: Any) -> None:
    """Check every `_target_` below `node` and fill in its default arguments, in place.

    Raises:
        ConfigError: a target that cannot be imported, an argument that it does not take or that it
            needs, or a value that does not fit the argument's annotation.
    """
    if isinstance(node, ListConfig) and not node._is_none():
        for index in range(len(node)):
            if not OmegaConf.is_missing(node, index):
                validate(node[index])
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if TARGET in node:
        _validate_call(node)
    _validate_fields(node)
    for name in list(node):
        if not OmegaConf.is_missing(node, name):
            validate(node[name])


def _validate_fields(node: DictConfig) -> None:
    """Refuse a scalar where a class of the schema wants a node."""
    schema = OmegaConf.get_type(node)
    if schema is None or not attrs.has(schema):
        return
    for field in attrs.fields(schema):
        value = node.get(field.name) if NODE in field.metadata else None
        if value is not None and not isinstance(value, DictConfig):
            raise ConfigError(
                f"{node._get_full_key(field.name)}={value}: expected a mapping with {TARGET}, "
                "such as the options of its group"
            )


def _validate_call(node: DictConfig) -> None:
    key = full_key(node)
    path = node[TARGET]
    if path in REMOVED_TARGETS:
        raise ConfigError(f"{key}: {REMOVED_TARGETS[path]}")
    known = parameters(locate(path, key))
    if known is None:
        return
    extra = next((p for p in known.values() if p.kind is p.VAR_KEYWORD), None)
    named = {n: p for n, p in known.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = [
        str(name) for name in node if name not in RESERVED
    ]  # `in node` is False for PLACEHOLDER
    for name in given:
        parameter = named.get(name, extra)
        if parameter is None:
            raise unknown_argument(f"{key}.{name}={node[name]}", path, name, named)
        if not OmegaConf.is_missing(node, name):
            optional = parameter.default is None
            value = convert(node[name], parameter.annotation, f"{key}.{name}", optional)
            if value is not node[name]:
                node[name] = value
    if ARGS in node or node.get(PARTIAL):
        return
    for name, parameter in named.items():
        if name not in given:
            _fill_in(node, key, parameter)


def _fill_in(node: DictConfig, key: str, parameter: inspect.Parameter) -> None:
    """Write a default that is a config value; objects that only run time has are left out."""
    annotated = parameter.annotation is not parameter.empty
    if annotated and not is_configurable(parameter.annotation):
        return
    if parameter.default is parameter.empty:
        if annotated:
            raise ConfigError(f"{key}.{parameter.name}: {node[TARGET]} needs this argument")
        return
    if parameter.default is None and not annotated:
        return
    if _is_plain(parameter.default):
        node[parameter.name] = parameter.default


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    return value is None or isinstance(value, bool | int | float | str)
