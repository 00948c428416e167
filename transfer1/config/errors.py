"""The one exception for mistakes in a configuration, and how it names what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mistake of the user: one message with the key, the value given and what is allowed."""


def nearest(name: str, valid: Iterable[str], limit: int = 12) -> str:
    """Return "; did you mean ...?" or, where nothing is close, "; valid: ..."."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if not names:
        return "; nothing is allowed here"
    listed = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"; valid: {listed}"
