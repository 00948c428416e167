"""Golden runs: recorded inputs, weights, outputs and gradients of the original system.

`<case>/<case>.safetensors` holds tensors named `<run>/<group>/<name>`, `<case>/<case>.json` says
per run what was built and how it was called. Checkers are registered by class name or by (case,
kind) and driven by that data alone: no run is named in a test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

COMMITTED = Path(__file__).parent / "golden"
COMPLETE = Path(__file__).parents[2] / "shared" / "golden"  # all runs, where a checkout has them

STORAGE_KINDS = (
    "weights_only",
    "values",
    "ema_traj",
)  # runs that only hold what other runs refer to

Checker = Callable[["Run"], None]
CHECKERS: dict[str | tuple[str, str], Checker] = {}


def handles(*keys: str | tuple[str, str]) -> Callable[[Checker], Checker]:
    """Register a checker for class names of the original or for (case, kind) pairs."""

    def register(checker: Checker) -> Checker:
        for key in keys:
            assert key not in CHECKERS, f"two checkers for {key}"
            CHECKERS[key] = checker
        return checker

    return register


@dataclass(frozen=True)
class Run:
    """One recorded run of the original."""

    case: str
    name: str
    folder: Path  # the folder that holds all cases

    def __str__(self) -> str:
        return f"{self.case}-{self.name}"

    @property
    def file(self) -> dict[str, Any]:
        """The whole json of the case."""
        return _read_json(self.folder / self.case / f"{self.case}.json")

    @property
    def spec(self) -> dict[str, Any]:
        return self.file["runs"][self.name]

    @property
    def kind(self) -> str:
        return self.spec["kind"]

    def group(self, group: str) -> dict[str, Tensor]:
        """Tensors of `input`, `weight`, `output`, `grad` or `value`, by name."""
        path = self.folder / self.case / f"{self.case}.safetensors"
        prefix = f"{self.name}/{group}/"
        with safe_open(path, "pt") as tensors:
            names = [key for key in _keys(path) if key.startswith(prefix)]
            return {key.removeprefix(prefix): tensors.get_tensor(key) for key in names}

    def other(self, name: str, case: str | None = None) -> Run:
        """Another run, of the same case unless one is named."""
        return Run(case or self.case, name, self.folder)

    def weights(self) -> dict[str, Tensor]:
        """The state dict of this run, followed through `weights_from` and `weights_case`."""
        spec = self.spec
        if "weights_from" in spec:
            return self.other(spec["weights_from"], spec.get("weights_case")).weights()
        return self.group("weight")

    def resolve(self, value: Any) -> Any:
        """Replace "@name" by the input tensor of that name, inside lists and dicts too."""
        if isinstance(value, str) and value.startswith("@"):
            return self.group("input")[value[1:]]
        if isinstance(value, Mapping):
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.resolve(item) for item in value]
        return value

    def checker(self) -> Checker:
        """The checker of this run; a run that nothing knows is an error."""
        spec = self.spec
        checker = CHECKERS.get((self.case, self.kind)) or CHECKERS.get(spec.get("cls", ""))
        assert checker, (
            f"no checker for case {self.case}, kind {self.kind}, class {spec.get('cls')}"
        )
        return checker

    def out_of_scope(self) -> str | None:
        """Why this run is not checked, by class or by (case, kind); None where it is."""
        spec, kind = self.spec, self.kind
        if spec.get("cls", "").startswith("MultiCamera"):
            return "multi-view networks are not part of the package"
        if (self.case, kind) in {("pos_embed", "pos_bf16"), ("edm", "scaling_bf16")}:
            return "coefficients and angles are computed in float32 here, whatever the precision"
        return None


def find_runs(folder: Path | None) -> list[Run]:
    """All runs to check: of `folder`, or the committed ones and those found beside the checkout."""
    folders = [folder] if folder else [COMMITTED, COMPLETE]
    runs: dict[str, Run] = {}
    for candidate in folders:
        for path in sorted(candidate.glob("*/*.json")):
            case = path.parent.name
            for name, spec in _read_json(path).get("runs", {}).items():
                run = Run(case, name, candidate)
                if spec["kind"] not in STORAGE_KINDS:
                    runs.setdefault(str(run), run)
    return list(runs.values())


def compare(actual: Tensor, expected: Tensor, name: str, tolerance: float = 2e-5) -> None:
    """Assert equal shapes, and errors within `tolerance` of the reference's largest magnitude."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, expected {expected.shape}"
    )
    actual, expected = actual.detach().double(), expected.double()
    assert actual.isfinite().all(), f"{name}: not finite"
    if expected.numel() == 0:
        return
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(scale, 1e-12), (
        f"{name}: error {error:.3g} at magnitude {scale:.3g}"
    )


class RecordedDraws:
    """Stands in for `Draws` and hands out recorded draws, by purpose; a draw not recorded fails."""

    def __init__(self, recorded: Mapping[str, Tensor]) -> None:
        self.recorded = dict(recorded)

    def _take(self, purpose: str) -> Tensor:
        assert purpose in self.recorded, f"draw {purpose!r} was not recorded: {list(self.recorded)}"
        return self.recorded[purpose]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        return self._take(purpose).reshape(tuple(shape))

    def uniform(self, purpose: str, batch: int) -> Tensor:
        return self._take(purpose).double().reshape(batch)

    def bernoulli(self, purpose: str, probability: float, batch: int) -> Tensor:
        return self._take(purpose).float().reshape(batch)

    def coin(self, purpose: str, probability: float) -> bool:
        return bool(self._take(purpose).reshape(()))

    def integer(self, purpose: str, low: int, high: int) -> int:
        value = int(self._take(purpose).reshape(()))
        assert low <= value < high, f"{purpose}: recorded {value} outside [{low}, {high})"
        return value

    def uniform_once(self, purpose: str, count: int) -> Tensor:
        return self._take(purpose).float().reshape(count)


@lru_cache
def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@lru_cache
def _keys(path: Path) -> tuple[str, ...]:
    with safe_open(path, "pt") as tensors:
        return tuple(tensors.keys())
