"""Pictures of a run: the loss curve and a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .metrics import read_metrics

matplotlib.use("Agg")


@dataclass(frozen=True)
class Row:
    """One row of a contact sheet: a label and its images, uint8 [height, width, 3]."""

    label: str
    images: Sequence[np.ndarray]


def contact_sheet(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Write rows of images of one size under column titles, as a PNG."""
    height, width, _ = rows[0].images[0].shape
    cell = 3.6  # inches
    figure = Figure(
        figsize=(cell * len(columns) + 0.4, (cell * height / width + 0.05) * len(rows) + 0.5),
        dpi=110,
        layout="constrained",
    )
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, line in zip(rows, axes, strict=True):
        for column, (axis, image) in enumerate(zip(line, row.images, strict=True)):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row is rows[0]:
                axis.set_title(columns[column], fontsize=10)
        line[0].set_ylabel(row.label, fontsize=8)
    figure.savefig(path)


def loss_curve(metrics: Path, held_out: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Plot the training loss of every update and the held-out scores, as a PNG.

    Args:
        metrics: the run's `metrics.jsonl`.
        held_out: iteration -> mean held-out scores "zero", "right", "wrong".
        path: the PNG to write.
    """
    records = [r for r in read_metrics(metrics) if r.get("edm_loss") is not None]
    iterations = np.array([r["iteration"] for r in records])
    losses = np.array([r["edm_loss"] for r in records])
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.plot(iterations, losses, color="0.8", linewidth=0.8, label="training, every update")
    window = max(1, len(losses) // 20)
    if len(losses) >= window:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axis.plot(iterations[window - 1 :], smooth, label=f"training, mean of {window} updates")
    steps = sorted(held_out)
    labels = {
        "right": "held out, own control",
        "wrong": "held out, another clip's control",
        "zero": "held out, network that outputs zero",
    }
    for name, label in labels.items():
        style = "--" if name == "zero" else "o-"
        axis.plot(steps, [held_out[step][name] for step in steps], style, label=label)
    axis.set_xlabel("optimizer updates")
    axis.set_ylabel("EDM loss")
    axis.set_ylim(0, max(1.5, float(np.percentile(losses, 98))) if len(losses) else 1.5)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path)
