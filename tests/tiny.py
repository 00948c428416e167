"""A run small enough for a test: the released experiment, shrunk, on synthetic clips."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transfer1.config import Config, compose
from transfer1.data.sampler import SampleKey, StreamSampler
from transfer1.training.callback import Callback
from transfer1.training.trainer import Trainer

ROOT = Path(__file__).parents[1] / "configs" / "config_train.py"
FRAMES, HEIGHT, WIDTH, TOKENS, TEXT_WIDTH = 17, 32, 32, 3, 16

NETWORK = {
    "model_channels": 48,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": TEXT_WIDTH,
    "adaln_lora_dim": 8,
    "mlp_ratio": 1.0,
    "max_img_h": 8,
    "max_img_w": 8,
    "max_frames": 8,
}
OVERRIDES = (
    "experiment=CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3_pretrain",
    "tokenizer=debug_tokenizer",
    "model.precision=float32",
    "model.base_load_from=null",
    "checkpoint.strict_resume=true",
    "model.latent_shape=[16,3,2,2]",
    "model_parallel.tensor_model_parallel_size=1",
    "model_parallel.sequence_parallel=false",
    *(
        f"model.{net}.{key}={value}"
        for net in ("net", "net_ctrl")
        for key, value in NETWORK.items()
    ),
    "model.net_ctrl.hint_channels=32",
    "model.net_ctrl.num_control_blocks=1",
    "optimizer.lr=0.01",
    "scheduler.warm_up_steps=[2]",
    "kernels=reference",
    "trainer.device=cpu",
    "trainer.max_iter=2",
    "trainer.run_validation=false",
    "trainer.timestamp_seed=false",
    "trainer.logging_iter=1",
    "~trainer.callbacks.iter_speed",
)


def tiny_config(folder: Path, *overrides: str) -> Config:
    """The configuration of a tiny run whose job folder is `folder`."""
    return changed(composed(OVERRIDES), [f"job.path_local={folder}", *overrides])


@cache
def composed(overrides: tuple[str, ...]) -> Config:
    """`compose`, which takes most of a second, once per test session."""
    return compose(ROOT, overrides)


def changed(config: Config, change: list[str] | dict[str, Any]) -> Config:
    """A copy with other values, given as key=value or as nested dicts."""
    node = nested(change) if isinstance(change, dict) else OmegaConf.from_dotlist(change)
    merged = OmegaConf.merge(config, node)  # a copy
    OmegaConf.set_readonly(merged, False)
    OmegaConf.resolve(merged)
    OmegaConf.set_readonly(merged, True)
    return cast(Config, merged)


def nested(values: dict[str, Any]) -> DictConfig:
    """A config node of nested dicts whose keys may hold dots."""
    node = OmegaConf.create({})
    for name, value in values.items():
        OmegaConf.update(node, name, nested(value) if isinstance(value, dict) else value)
    return node


def tiny_batch(batch: int = 2, conditions: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random clips with `conditions` control videos stacked in the hint."""
    items = [tiny_clip(seed, position, conditions) for position in range(batch)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def tiny_clip(seed: int, position: int, conditions: int = 1) -> dict[str, Tensor]:
    """One clip, determined by its key."""
    generator = torch.Generator().manual_seed(1000 * seed + position)

    def pixels(channels: int) -> Tensor:
        shape = (channels, FRAMES, HEIGHT, WIDTH)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return {
        "video": pixels(3),
        "control_input_edge": pixels(3 * conditions),
        "t5_text_embeddings": torch.randn(TOKENS, TEXT_WIDTH, generator=generator),
        "t5_text_mask": torch.ones(TOKENS, dtype=torch.int64),
        "fps": torch.tensor(24.0),
        "num_frames": torch.tensor(FRAMES),
        "image_size": torch.tensor([HEIGHT, WIDTH, HEIGHT, WIDTH], dtype=torch.float32),
        "padding_mask": torch.zeros(1, HEIGHT, WIDTH),
    }


class TinyClips(Dataset[dict[str, Tensor]]):
    """Five clips; each time one is drawn it looks different, as after augmentation."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key: int | SampleKey) -> dict[str, Tensor]:
        if isinstance(key, SampleKey):
            return tiny_clip(key.seed + key.index, key.position)
        return tiny_clip(0, key)


class TinyTrainer(Trainer):
    """A trainer on `TinyClips`, with callbacks of a test beside the configured ones."""

    def __init__(self, config: Config, *callbacks: Callback):
        super().__init__(config)
        for callback in callbacks:
            callback.trainer = self
        self.callbacks.callbacks.extend(callbacks)

    def build_dataloaders(self) -> tuple[Any, Any]:
        clips = TinyClips()
        stream = StreamSampler(clips)
        return DataLoader(clips, batch_size=2, sampler=stream), DataLoader(clips, batch_size=2)


class At(Callback):
    """Calls `action(trainer)` in one hook at one iteration."""

    def __init__(self, hook: str, iteration: int, action: Callable[[Trainer], None]):
        def call(*args: Any, **kwargs: Any) -> None:
            if args[-1] == iteration:
                action(self.trainer)

        setattr(self, hook, call)


def train(folder: Path, *overrides: str, callbacks: tuple[Callback, ...] = ()) -> TinyTrainer:
    """Run a tiny job to its end and return its trainer; the exit code must be 0."""
    trainer = TinyTrainer(tiny_config(folder, *overrides), *callbacks)
    assert trainer.run() == 0
    return trainer
