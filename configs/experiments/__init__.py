"""Experiments: one file per family; a new file needs its import and its entry here."""

from . import av, cpu, demo, lvg
from .released import store


def register() -> None:
    """Store the options of `experiment`."""
    released = {**lvg.experiments(), **av.experiments()}
    twins = [cpu.shrunk(node) for node in released.values()]
    store(released)
    store({node["job"]["name"]: node for node in twins})
    store(av.multi_view())
    store({"demo_edge": demo.DEMO_EDGE})
