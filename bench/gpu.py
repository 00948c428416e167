"""Everything that needs a GPU, in one go: `make gpu`, or python -m bench.gpu [--out FOLDER].

For a machine with one GPU and no network. Within eight minutes: parity on the device, `bench.ops`,
`bench.train_step`, and what was predicted against what was measured. Writes `gpu.json` and
`gpu.md`. Each step is a process of its own with a share of the time: one that fails or takes too
long is reported as such, and the others still run. `--plan` prints the steps and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from . import ops, train_step
from .roofline import predicted_seconds
from .timing import describe, machine, markdown

ROOT = Path(__file__).parents[1]
SECONDS = 480  # in all
PREDICTED: dict[str, Callable[[Any], str]] = {
    "work": str,
    "rival": str,
    "predicted ms": "{:.3f}".format,
    "measured ms": "{:.3f}".format,
    "predicted / measured": "{:.2f}".format,
}


@dataclass(frozen=True)
class Step:
    """A process: its arguments after `python -m`, the file it writes, its share of the time."""

    name: str
    arguments: tuple[str, ...]
    file: str
    seconds: int


STEPS = (
    Step(
        "parity",
        ("pytest", "tests", "-q", "-m", "gpu", "--junitxml=parity.xml"),
        "parity.xml",
        150,
    ),
    Step("ops", ("bench.ops", "--rounds", "9", "--json", "ops.json"), "ops.json", 180),
    Step(
        "train_step",
        (
            *("bench.train_step", "--part", "sizes", "--kernels", "triton", "reference"),
            *("--rounds", "5", "--json", "train_step.json"),
        ),
        "train_step.json",
        120,
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run all steps and write the report; 1 if one of them failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="folder")
    parser.add_argument("--plan", action="store_true", help="print the steps, run nothing")
    options = parser.parse_args(arguments)
    if options.plan:
        print("\n".join(plan(STEPS, options.out)))
        return 0
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "finds no GPU" if built else "is built for CPUs alone"
        print(
            f"error: make gpu measures on a GPU, but PyTorch {torch.__version__} {reason} here. On "
            "a machine with one, install its CUDA or ROCm build; `make test` and "
            "`python -m bench.ops` need none, `python -m bench.gpu --plan` shows what would run",
            file=sys.stderr,
        )
        return 2
    outcome = run(STEPS, options.out)
    report(outcome, machine("cuda"), options.out)
    print(f"\nwrote {options.out / 'gpu.json'} and {options.out / 'gpu.md'}")
    return 0 if all(step["outcome"] == "done" for step in outcome.values()) else 1


def plan(steps: Sequence[Step], out: Path) -> list[str]:
    """What would run, line by line."""
    lines = [
        f"{step.name}, at most {step.seconds} s: python -m {' '.join(step.arguments)}"
        for step in steps
    ]
    total = sum(step.seconds for step in steps)
    return [*lines, f"at most {total} s in all, into {out / 'gpu.json'} and {out / 'gpu.md'}"]


def run(steps: Sequence[Step], out: Path) -> dict[str, dict[str, Any]]:
    """Run the steps one after the other.

    Returns:
        name -> outcome ("done", "failed with exit code N", "took longer than N s"), seconds, and
        what the step wrote; a step that ran out of time may have written a part.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcome = {}
    for step in steps:
        file = out / step.file
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", *(a.replace(step.file, str(file)) for a in step.arguments)]
        print(f"\n== {step.name}: {' '.join(command[1:])}", flush=True)
        started = time.perf_counter()
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=step.seconds, check=False).returncode
            said = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            said = f"took longer than {step.seconds} s"
        outcome[step.name] = {
            "outcome": said,
            "seconds": time.perf_counter() - started,
            "result": _read(file),
        }
    return outcome


def report(
    outcome: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Write `gpu.json` and `gpu.md` from what the steps left; returns the content of the former."""
    results = {name: step["result"] or {} for name, step in outcome.items()}
    parity = results.get("parity", {})
    op_rows = results.get("ops", {}).get("rows", [])
    steps = results.get("train_step", {}).get("rows", [])
    predictions = predicted_rows(op_rows, facts["device"])
    content = {
        "machine": dict(facts),
        "steps": {n: {k: s[k] for k in ("outcome", "seconds")} for n, s in outcome.items()},
        "parity": parity,
        "ops": op_rows,
        "train_step": steps,
        "predicted": predictions,
    }
    (out / "gpu.json").write_text(json.dumps(content, indent=1))
    sections = [
        "# Measured on a GPU",
        f"{describe(facts)}.",
        markdown(
            [{"step": name, **step} for name, step in outcome.items()],
            {"step": str, "outcome": str, "seconds": "{:.0f}".format},
        ),
        "## Parity on the device",
        _parity_text(parity),
        "## Ops",
        markdown(op_rows, ops.COLUMNS),
        "## Training steps",
        markdown(steps, train_step.COLUMNS),
        "## Predicted against measured",
        "Predicted is a roofline of the least bytes and flops at the published peaks of the "
        "device: what a perfect kernel would take, no measurement."
        + ("" if predictions else " There are no peaks of this device in `bench/roofline.py`."),
        markdown(predictions, PREDICTED),
    ]
    (out / "gpu.md").write_text("\n\n".join(sections) + "\n")
    return content


def predicted_rows(rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """What the roofline of a device says of each of our rows of `bench.ops`."""
    compared = []
    for row in rows:
        seconds = predicted_seconds(device, row["bytes"], row["flops"])
        if seconds is None or row["kind"] != "ours":
            continue
        compared.append(
            {
                "work": f"{row['op']} {row['size']} {row['dtype']} {row['pass']}".strip(),
                "rival": row["rival"],
                "predicted ms": 1e3 * seconds,
                "measured ms": row["ms"],
                "predicted / measured": 1e3 * seconds / row["ms"],
            }
        )
    return compared


def _read(file: Path) -> Any:
    """Content of a result file; None if there is none, or only a part of one."""
    if not file.exists():
        return None
    try:
        return _junit(file) if file.suffix == ".xml" else json.loads(file.read_text())
    except (ElementTree.ParseError, json.JSONDecodeError):
        return None


def _junit(file: Path) -> dict[str, Any]:
    """Counts of a test run, and the names and messages of what failed or was skipped."""
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    messages = {
        kind: [
            f"{case.get('name')}: {(found.get('message') or '').partition(chr(10))[0]}"
            for case in suite.iter("testcase")
            for found in case.iter(kind)
        ]
        for kind in ("failure", "error", "skipped")
    }
    return {**counts, "messages": messages}


def _parity_text(parity: Mapping[str, Any]) -> str:
    if not parity:
        return "No result."
    passed = parity["tests"] - parity["failures"] - parity["errors"] - parity["skipped"]
    lines = [f"{passed} of {parity['tests']} tests passed."]
    for kind, messages in parity["messages"].items():
        lines += [f"- {kind}: {message}" for message in messages]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
