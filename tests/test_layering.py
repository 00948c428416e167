"""Who may import whom: the house stays a house only while imports go one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("kernels", "transfer1", "configs", "bench", "tests", "train", "sample")

LEAVES = tuple(  # pure diffusion mathematics, below the model
    f"transfer1.diffusion.{name}"
    for name in ("edm", "loss", "condition", "frame_condition", "denoise", "draws", "solvers")
)
# Longest matching prefix decides; a module may always import from its own prefix.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "transfer1.config": (),
    **dict.fromkeys(LEAVES, (*LEAVES, "transfer1.config")),
    "transfer1.diffusion": ("transfer1.config",),
    "transfer1.diffusion.sampler": (*LEAVES, "transfer1.model", "transfer1.config"),
    "transfer1.data": ("transfer1.config", "transfer1.diffusion.draws"),
    "transfer1.interop": ("transfer1.config", "transfer1.model"),
    # The spelling rules know no model: `build_transfer` reads released base weights with them.
    "transfer1.interop.keys": ("transfer1.config",),
    "transfer1.model": ("kernels", *LEAVES, "transfer1.config", "transfer1.interop.keys"),
    "transfer1.training": ("kernels", "transfer1"),
    "transfer1.sampling": ("transfer1",),
    "transfer1": (),
    "transfer1.plan": ("transfer1",),
    "configs": ("configs", "kernels", "transfer1"),
    "train": ("transfer1", "configs"),
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.glob("*/**/*.py")) + sorted(ROOT.glob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ("kernels", "transfer1", "configs") or parts == ("train",):
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(module: str, path: Path) -> Iterator[str]:
    """Dotted names of ours that a module imports, at its top or inside a function."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in OURS)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports(module: str, path: Path) -> None:
    owner = max((prefix for prefix in ALLOWED if within(module, prefix)), key=len)
    allowed = (owner, *ALLOWED[owner])
    wrong = [n for n in imports(module, path) if not any(within(n, prefix) for prefix in allowed)]
    assert not wrong, f"{module} may import {allowed} of ours, but imports {wrong}"


def test_the_walk_sees_imports() -> None:
    """The rule above is only worth something if relative and nested imports are found."""
    names = {name for name, _ in modules()}
    assert {"kernels.registry", "transfer1.model.dit", "configs.config_train", "train"} <= names
    path = ROOT / "transfer1" / "model" / "dit.py"
    assert any(
        within(n, "transfer1.diffusion.condition") for n in imports("transfer1.model.dit", path)
    )
