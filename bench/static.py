"""What the compiler makes of every kernel, for GPUs that need not be here, and how fast it may be.

    python -m bench.static [--op NAME ...] [--arch NAME ...] [--triton VERSION] [--every]
                           [--json FILE] [--markdown FILE] [--png FILE]

Compiles every Triton kernel at the sizes of the shipped models and reads registers, spills, shared
memory, occupancy, widths of accesses, tensor-core instructions and exposed exponentials from the
machine code; counts bytes and launches in Triton's interpreter; predicts times by a roofline. The
exit status is 1 if a gate of `bench.gates` breaks. `--triton` takes another version of the compiler
from the folder that `make static` fills.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kernels import OPS

ROOT = Path(__file__).parents[1]
COMPILERS = ROOT / ".triton"  # one folder per version, filled by `make static`
COLUMNS: dict[str, Callable[[Any], str]] = {
    "kernel": str,
    "config": str,
    "arch": str,
    "triton": str,
    "registers": str,
    "spills": str,
    "shared_bytes": str,
    "occupancy": "{:.2f}".format,
    "access_bits": str,
    "tensor_instructions": str,
    "exposed_mufu": str,
    "bytes_ratio": "{:.3f}".format,
    "launches": str,
    "failures": ", ".join,
}
PREDICTIONS: dict[str, Callable[[Any], str]] = {
    "op": str,
    "pass": str,
    "config": str,
    "gpu": str,
    "bound": str,
    "limit_ms": "{:.3f}".format,
    "predicted_ms": "{:.3f}".format,
    "published": str,
}


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and write the files asked for; 1 if a gate breaks."""
    options = _parse(arguments)
    if options.triton != version("triton"):
        return _with_compiler(options.triton, sys.argv[1:] if arguments is None else arguments)
    from .peers_static import COLUMNS as PEER_COLUMNS
    from .peers_static import from_process, side_by_side
    from .roofline import plot, predictions
    from .timing import markdown

    rows = compiled_rows(options.op, options.arch, options.every)
    traffic = from_process("bench.traffic", ["--op", *options.op], interpret=True)
    join_traffic(rows, traffic)
    broken = mark(rows)
    predicted = predictions(options.op, options.arch, rows)
    peers = side_by_side(options.op, traffic)
    text = "\n\n".join(
        [
            f"# Compiled kernels, Triton {options.triton}",
            markdown(rows, COLUMNS),
            f"{len(rows)} rows, {broken} with a broken gate.",
            "## Predicted times of the 7B model, not measured",
            markdown(predicted, PREDICTIONS),
            "## Bytes and launches beside peers, counted and predicted without a GPU",
            markdown(peers, PEER_COLUMNS),
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        content = {"triton": options.triton, "rows": rows, "predicted": predicted, "peers": peers}
        options.json.write_text(json.dumps(content, indent=1))
    if options.png:
        plot(predicted, options.png)
    return 1 if broken else 0


def compiled_rows(ops: Iterable[str], archs: Iterable[str], every: bool) -> list[dict[str, Any]]:
    """One row per compiled variant of every launch; with the error where it does not compile."""
    from .compiled import inspect
    from .gates import row_of
    from .static_cases import launches_of, uses_of

    rows: list[dict[str, Any]] = []
    for use in (use for op in ops for use in uses_of(op, every)):
        for arch in archs:
            found = launches_of(use, arch)
            launches = Counter(stage for stage, _ in found)
            variants = set()
            for stage, launch in found:
                labels = {"op": use.op, "config": use.config, "pass": stage}
                try:
                    code = inspect(launch)
                except Exception as error:  # whatever a compiler throws is a finding of this row
                    rows.append(_not_compiled(labels, launch.kernel.__name__, arch, error))
                    continue
                if id(code) not in variants:
                    variants.add(id(code))
                    rows.append(row_of(launch, code, **labels) | {"launches": launches[stage]})
    return rows


def join_traffic(rows: Iterable[dict[str, Any]], traffic: Sequence[dict[str, Any]]) -> None:
    """Give every row the counted ratios of the pass that it is part of."""
    found = {(row["op"], row["config"], row["pass"]): row for row in traffic}
    for row in rows:
        counts = found.get((row["op"], row["config"], row["pass"]), {})
        for name in ("bytes_ratio", "unique_ratio"):
            row[name] = counts.get(name)


def mark(rows: Iterable[dict[str, Any]]) -> int:
    """Write to every row which gates it breaks; how many rows break one."""
    from .gates import GATED, failures

    broken = 0
    for row in rows:
        if "error" in row:
            row["failures"] = [row["error"]] if row["arch"] in GATED else []
        else:
            row["failures"] = failures(row)
        broken += bool(row["failures"])
    return broken


def _with_compiler(triton: str, arguments: Sequence[str]) -> int:
    """Run the same command in a process that finds another version of Triton first."""
    folder = COMPILERS / triton
    if not folder.is_dir():
        sys.exit(
            f"bench.static: Triton {triton} is not in {folder}, and {version('triton')} is "
            "installed; run `make static`, which fetches 3.9.0, or `pip install --no-deps "
            f"--target {folder} triton=={triton}`"
        )
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench.static", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


def _not_compiled(
    labels: dict[str, Any], kernel: str, arch: str, error: Exception
) -> dict[str, Any]:
    message = str(error).strip() or type(error).__name__
    return {
        **labels,
        "kernel": kernel,
        "arch": arch,
        "triton": version("triton"),
        "error": f"does not compile: {message.splitlines()[0][:200]}",
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    from .compiled import TARGETS

    possible = [name for name, op in OPS.items() if op.triton]
    parser = argparse.ArgumentParser(
        prog="python -m bench.static", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--op", nargs="+", choices=possible, default=possible)
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--triton", default=version("triton"), help="version of the compiler")
    parser.add_argument("--every", action="store_true", help="all cases, head sizes and dtypes")
    parser.add_argument("--json", type=Path, help="write rows, predictions and peers")
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    parser.add_argument("--png", type=Path, help="draw the roofline")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
