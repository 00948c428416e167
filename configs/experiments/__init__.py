"""Experiments: one file per family; a new file needs its import and its entry here."""

from . import demo, lvg

FAMILIES = (demo, lvg)


def register() -> None:
    """Store the options of `experiment`."""
    for family in FAMILIES:
        family.register()
