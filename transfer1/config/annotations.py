"""Whether a configuration value fits a Python annotation; scalars convert as in OmegaConf."""

from __future__ import annotations

import collections.abc
import enum
import inspect
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import (
    BooleanNode,
    DictConfig,
    EnumNode,
    FloatNode,
    IntegerNode,
    ListConfig,
    StringNode,
)
from omegaconf.errors import ValidationError

from .errors import ConfigError
from .targets import TARGET

SCALARS: dict[Any, Any] = {bool: BooleanNode, int: IntegerNode, float: FloatNode, str: StringNode}
SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
MAPPINGS = (dict, collections.abc.Mapping)


def is_configurable(annotation: Any) -> bool:
    """Whether a config value (scalar, list or mapping of such) can fit the annotation."""
    if annotation in SCALARS or annotation is Path or _is_enum(annotation):
        return True
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType):
        return any(is_configurable(member) for member in members if member is not types.NoneType)
    if annotation in (list, tuple, dict):
        return True
    if origin in SEQUENCES or origin in MAPPINGS:
        return all(is_configurable(member) for member in members if member is not Ellipsis)
    return False


def convert(value: Any, annotation: Any, key: str, optional: bool = False) -> Any:
    """Return `value` as the annotation wants it, the same object where nothing is to be done.

    Args:
        value: what stands in the config; nodes with `_target_` are taken on trust.
        annotation: type of the argument; unknown annotations accept everything.
        key: full key of the value, for messages.
        optional: None is allowed whatever the annotation says.

    Raises:
        ConfigError: the value does not fit.
    """
    if annotation in (inspect.Parameter.empty, Any) or (value is None and optional):
        return value
    try:
        return _convert(value, annotation)
    except (ValidationError, ValueError, TypeError) as error:
        raise ConfigError(f"{key}={_shown(value)}: {_first_line(error)}") from None


def _convert(value: Any, annotation: Any) -> Any:
    if annotation is Any or (isinstance(value, DictConfig) and TARGET in value):
        if annotation in SCALARS:
            raise TypeError(f"expected {_name(annotation)}, got a node with {TARGET}")
        return value
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(value, members)
    if value is None:
        if annotation in (None, types.NoneType):
            return value
        raise TypeError(f"null is not allowed, expected {_name(annotation)}")
    if annotation in SCALARS:
        return _convert_scalar(value, annotation)
    if _is_enum(annotation):
        return EnumNode(annotation).validate_and_convert(value)
    if origin is Literal:
        if value not in members:
            raise ValueError(f"expected one of {', '.join(map(str, members))}")
        return value
    if annotation in (None, types.NoneType):
        raise TypeError(f"expected null, got {_kind(value)}")
    if (origin or annotation) in SEQUENCES:
        return _convert_sequence(value, annotation, members)
    if (origin or annotation) in MAPPINGS:
        return _convert_mapping(value, annotation, members)
    is_scalar = isinstance(value, bool | int | float | str)
    if is_scalar and _is_concrete(annotation) and not isinstance(value, annotation):
        raise TypeError(f"expected {_name(annotation)}, got {type(value).__name__}")
    return value


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    for member in members:
        if type(value) is member or (value is None and member is types.NoneType):
            return value
    for member in members:
        try:
            return _convert(value, member)
        except (ValidationError, ValueError, TypeError):
            continue
    raise TypeError(f"expected {' or '.join(_name(member) for member in members)}")


def _convert_scalar(value: Any, annotation: Any) -> Any:
    if isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    if isinstance(value, ListConfig | DictConfig):
        raise TypeError(f"expected {_name(annotation)}, got {_kind(value)}")
    try:
        return SCALARS[annotation]().validate_and_convert(value)
    except ValidationError:
        message = f"expected {_name(annotation)}, got {type(value).__name__} {value!r}"
        raise TypeError(message) from None


def _convert_sequence(value: Any, annotation: Any, members: tuple[Any, ...]) -> Any:
    if not isinstance(value, ListConfig):
        raise TypeError(f"expected {_name(annotation)}, got {_kind(value)}")
    of_any_length = len(members) < 2 or members[1] is Ellipsis
    if get_origin(annotation) is tuple and not of_any_length and len(value) != len(members):
        raise TypeError(f"expected {len(members)} values, got {len(value)}")
    for index in range(len(value)):
        member = (members[0] if of_any_length else members[index]) if members else Any
        converted = _convert(value[index], member)
        if converted is not value[index]:
            value[index] = converted
    return value


def _convert_mapping(value: Any, annotation: Any, members: tuple[Any, ...]) -> Any:
    if not isinstance(value, DictConfig):
        raise TypeError(f"expected {_name(annotation)}, got {_kind(value)}")
    for name in list(value):
        converted = _convert(value[name], members[1]) if members else value[name]
        if converted is not value[name]:
            value[name] = converted
    return value


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _is_concrete(annotation: Any) -> bool:
    """Whether `isinstance` against the annotation decides, i.e. it is a class of its own."""
    if not isinstance(annotation, type) or getattr(annotation, "_is_protocol", False):
        return False
    return not inspect.isabstract(annotation) and annotation.__module__ not in (
        "collections.abc",
        "numbers",
        "pathlib",
        "typing",
    )


def _name(annotation: Any) -> str:
    if annotation is types.NoneType:
        return "null"
    is_class = isinstance(annotation, type) and not get_args(annotation)
    return (
        annotation.__name__
        if is_class
        else re.sub(r"\b(typing|collections\.abc)\.", "", str(annotation))
    )


def _kind(value: Any) -> str:
    if isinstance(value, DictConfig):
        return "a mapping"
    return "a list" if isinstance(value, ListConfig) else f"{type(value).__name__} {value!r}"


def _shown(value: Any) -> str:
    return "{...}" if isinstance(value, DictConfig) else str(value)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
