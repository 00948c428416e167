"""Run as a process of its own: a real training run, and the memory that it took at its peak.

    python tests/measure_memory.py FOLDER PIXELS WIDTH OVERRIDE...

prints {"planned": bytes, "measured": bytes, ...}.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import tiny

from transfer1.training.memory import measure


def bigger(pixels: int, width: int) -> list[str]:
    """Overrides for clips of pixels x pixels and networks of a width."""
    network = {"model_channels": width, "num_heads": 4, "max_img_h": 64, "max_img_w": 64}
    return [
        f"model.latent_shape=[16,3,{pixels // 8},{pixels // 8}]",
        *(f"model.{net}.{k}={v}" for net in ("net", "net_ctrl") for k, v in network.items()),
        "~trainer.callbacks.grad_clip",
        "tokenizer=vae1",
        "checkpoint.save_iter=100",
        "dataloader_train.dataset.num_text_tokens=3",
        "dataloader_train.batch_size=2",
    ]


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def main(folder: str, pixels: int, width: int, *overrides: str) -> None:
    """Plan, then train two updates, and print both peaks in bytes."""
    tiny.HEIGHT = tiny.WIDTH = pixels
    config = tiny.compose(
        tiny.ROOT, [*tiny.OVERRIDES, *bigger(pixels, width), *overrides, f"job.path_local={folder}"]
    )
    planned = measure(config)
    gc.collect()
    trainer = tiny.TinyTrainer(config)
    clips: list[Any] = []
    trainer.build_dataloaders = lambda: (clips, None)  # type: ignore[method-assign]
    trainer.checkpointer.save = lambda state: None  # a copy of the state, not part of a step
    tiny.HEIGHT = tiny.WIDTH = 32
    tiny.train(Path(folder) / "warm")  # what a process takes whatever it trains
    tiny.HEIGHT = tiny.WIDTH = pixels
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    clips.extend(tiny.tiny_batch(2, seed=seed) for seed in range(2))
    trainer.run()
    done.set()
    watcher.join()
    facts = {"planned": planned.peak, "measured": peak - before, **dataclasses.asdict(planned)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
