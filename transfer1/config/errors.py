"""The one exception for mistakes in a configuration, and how it names what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake of the user: one message with the key, the value given and what is allowed."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean ...?", or "" where nothing is close."""
    close = difflib.get_close_matches(name, sorted(set(valid)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def nearest(name: str, valid: Iterable[str], limit: int = 12) -> str:
    """Return what was probably meant or, where nothing is close, the first valid names."""
    names = sorted(set(valid))
    listed = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return did_you_mean(name, names) or (f"; valid: {listed}" if names else "")
