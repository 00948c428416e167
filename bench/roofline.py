"""How long the 7B model's ops take at the least, by published peaks, and what peers published.

Everything here is predicted: a model on paper, not a measurement. The limit of an op is the longer
of its bytes at the peak of memory and its products at the peak of the tensor cores. A prediction
says what share of the limit is to be expected: memory-bound kernels reach 86 % of the bandwidth;
attention on sm_90 reaches 0.745 of the bound that its own schedule sets, which is the share that
the plain Triton tutorial kernel has of its bound (487 of 653 TFLOP/s, fb-triton PR 205).
Attention on other GPUs has no such calibration: there only the limit is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import OPS

from .costs import backward_cost
from .static_cases import MODELS, as_list, model_uses

MEMORY_SHARE = 0.86
SCHEDULE_SHARE = 487 / 653
PARAMETERS = 7_200_000_000


@dataclass(frozen=True)
class Gpu:
    """Published peaks: bytes per second, dense bfloat16 FLOP per second, and where they stand."""

    arch: str
    bandwidth: float
    flops: float
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on the tensor cores are the limit."""
        return self.flops / self.bandwidth


GPUS = {
    "A100": Gpu("sm_80", 2.039e12, 312e12, "NVIDIA A100 80GB SXM datasheet"),
    "H100": Gpu("sm_90", 3.35e12, 989e12, "NVIDIA H100 SXM datasheet, half of the sparse figure"),
    "H200": Gpu("sm_90", 4.8e12, 989e12, "NVIDIA H200 SXM datasheet, half of the sparse figure"),
    "B200": Gpu("sm_100", 8.0e12, 2250e12, "NVIDIA DGX B200 datasheet, an eighth, dense"),
    "MI300X": Gpu("gfx942", 5.3e12, 1307.4e12, "AMD Instinct MI300X datasheet"),
}

# Published by others, as TFLOP/s at long sequences of heads of 128 on H100 (bfloat16, non-causal
# unless said), of the five products that a backward pass with a single kernel has.
PUBLISHED_ATTENTION = {
    "forward": {
        "FlashAttention-3": (638.6, "tritonbench PR 1254"),
        "TLX, pipelined": (611.0, "fb-triton PR 206"),
        "cuDNN": (600.0, "chart of the FlashAttention-3 paper, 595 to 617"),
        "Triton tutorial": (487.0, "fb-triton PR 205, fp16"),
        "FlashAttention-2": (370.0, "chart of the FlashAttention-3 paper"),
    },
    "backward": {
        "FlashAttention-3": (561.4, "tritonbench PR 1256"),
        "TLX": (527.0, "tritonbench PR 1256"),
        "cuDNN": (469.8, "flash-attention PR 1893, causal"),
        "FlashAttention-3, deterministic": (463.0, "flash-attention PR 1893: 0.825 of the fastest"),
        "FlashAttention-2": (166.0, "flash-attention PR 1893, causal"),
    },
}
SPLIT_PRODUCTS = 7 / 2  # of the forward pass's two, that dk/dv and dq in two kernels execute
SHARED_PRODUCTS = 5 / 2


def works(ops: Iterable[str]) -> list[dict[str, Any]]:
    """(op, config, pass) of a whole sample of the 7B model: least bytes, executed FLOPs."""
    found = []
    for name in ops:
        op = OPS[name]
        for use in model_uses(name, "7B", MODELS["7B"].tokens):
            inputs = use.inputs(device="meta")
            size, flops = op.cost(**inputs)
            labels = {"op": name, "config": use.config}
            found.append({**labels, "pass": "forward", "bytes": size, "flops": flops})
            outputs = as_list(op.reference(**inputs))
            size, backward = backward_cost(op, inputs, outputs)
            if name == "attention":
                backward = int(backward * SPLIT_PRODUCTS / SHARED_PRODUCTS)
            found.append({**labels, "pass": "backward", "bytes": size, "flops": backward})
        if name in ("adamw_step", "ema_update", "grad_norm"):
            inputs = op.inputs(shapes=((PARAMETERS,),), device="meta", dtype=torch.bfloat16)
            size, flops = op.cost(**inputs)
            labels = {"op": name, "config": f"{PARAMETERS / 1e9} G parameters"}
            found.append({**labels, "pass": "forward", "bytes": size, "flops": flops})
    return found


def predictions(
    ops: Iterable[str], archs: Iterable[str], rows: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Limit and prediction in milliseconds of every work on every GPU of these architectures.

    Args:
        rows: of compiled launches; the schedule of attention on sm_90 is taken from them.
    """
    bounds = {
        (row["pass"], row["kernel"]): row["tensor_bound"]
        for row in rows
        if row["op"] == "attention" and row["config"] == "7B" and row.get("tensor_bound")
    }
    archs, found = set(archs), []
    for work in works(ops):
        for name, gpu in GPUS.items():
            if gpu.arch not in archs:
                continue
            is_attention = work["op"] == "attention"
            memory = work["bytes"] / gpu.bandwidth
            products = work["flops"] / gpu.flops if is_attention else 0.0
            row = {**work, "gpu": name, "evidence": "predicted", "limit_ms": 1e3 * memory}
            row["bound"] = "memory" if memory >= products else "products"
            row["limit_ms"] = 1e3 * max(memory, products)
            row["predicted_ms"] = row["limit_ms"] / MEMORY_SHARE
            if row["bound"] == "products":
                share = _schedule_share(work["pass"], bounds) if gpu.arch == "sm_90" else None
                row["predicted_ms"] = None if share is None else row["limit_ms"] / share
            row["published"] = _published(work) if name == "H100" else None
            found.append(row)
    return found


def predicted_seconds(device: str, moved: int, flops: int) -> float | None:
    """The larger of the times for the bytes and for the flops; None for a device without peaks."""
    for name, gpu in GPUS.items():
        if name in device:
            return max(moved / gpu.bandwidth, flops / gpu.flops)
    return None


def plot(found: Iterable[Mapping[str, Any]], path: Path) -> None:
    """A roofline picture: arithmetic intensity against the rate that the limit allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = list(found)
    figure, axes = pyplot.subplots(figsize=(10, 5))
    for name in dict.fromkeys(row["gpu"] for row in found):
        gpu = GPUS[name]
        intensities = [0.05, gpu.ridge, 1e5]
        roof = [min(gpu.flops, gpu.bandwidth * i) / 1e12 for i in intensities]
        (line,) = axes.plot(intensities, roof, label=f"{name} ({gpu.arch})")
        points = [row for row in found if row["gpu"] == name and row["predicted_ms"]]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in points],
            [row["flops"] / row["predicted_ms"] / 1e9 for row in points],
            color=line.get_color(),
            s=14,
        )
    labelled: dict[tuple[str, str], float] = {}
    for row in found:
        labelled.setdefault((row["op"], row["pass"]), row["flops"] / row["bytes"])
    ordered = sorted(labelled.items(), key=lambda item: item[1])
    for number, (_, intensity) in enumerate(ordered, start=1):
        height = 0.03 * 2.2 ** (number % 4)  # neighbours stand at different heights
        axes.axvline(intensity, color="0.85", linewidth=0.6, zorder=0)
        axes.annotate(str(number), (intensity, height), fontsize=8, ha="center")
    key = [f"{number}  {op} {stage}" for number, ((op, stage), _) in enumerate(ordered, start=1)]
    axes.text(1.02, 1.0, "\n".join(key), transform=axes.transAxes, fontsize=8, va="top")
    axes.set(xscale="log", yscale="log", ylim=(0.02, 4e3))
    axes.set_xlabel("FLOP per byte of memory traffic")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("Predicted, not measured: 7B model, 56,320 tokens, bfloat16")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _schedule_share(stage: str, bounds: Mapping[tuple[str, str], float]) -> float | None:
    """Share of the tensor cores' peak that the kernels of a pass are expected to reach."""
    if stage == "forward":
        bound = bounds.get((stage, "attention_kernel"))
        return None if bound is None else bound * SCHEDULE_SHARE
    keys, queries = (
        bounds.get((stage, kernel)) for kernel in ("key_gradients_kernel", "query_gradients_kernel")
    )
    if keys is None or queries is None:
        return None
    return SCHEDULE_SHARE * 7 / (4 / keys + 3 / queries)  # four products and three


def _published(work: Mapping[str, Any]) -> str | None:
    if work["op"] != "attention" or work["config"] != "7B":
        return None
    flops = work["flops"]
    if work["pass"] == "backward":
        flops *= SHARED_PRODUCTS / SPLIT_PRODUCTS
    return ", ".join(
        f"{peer} {1e3 * flops / (rate * 1e12):.0f} ms ({source})"
        for peer, (rate, source) in PUBLISHED_ATTENTION[work["pass"]].items()
    )
