"""Scores a run on held-out clips before, during and after training, and shows what it learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils.data import default_collate

from .callback import EveryN
from .device import to_device
from .held_out import Clip, Scores, encode, measure, predict, prepare, verdict
from .job import write_atomically
from .pictures import Row, contact_sheet, loss_curve

if TYPE_CHECKING:
    from .step import Loss
    from .trainer import Trainer


class HeldOutReport(EveryN):
    """Scores held-out clips with EMA weights, draws the pictures and judges the outcome.

    Writes `held_out/scores.json`, `held_out/loss_curve.png` and `held_out/contact_sheet.png` into
    the job folder, and adds a table to the summary of the run. The clips are those of
    `dataloader_val`; a run whose model did not learn to use its control exits with code 1.

    Args:
        sigmas: noise levels of the scores: from where details are left to find to where only the
            control tells what is in the picture.
        seeds: one noise per seed, averaged; with two or three the scores of a clip still vary by
            several per cent.
        every_n: updates between two scores on the way; 0 scores only before and after.
        picture_sigma: noise level from which the pictures of the contact sheet are denoised.
    """

    def __init__(
        self,
        sigmas: Sequence[float] = (0.2, 0.8, 3.0, 12.0),
        seeds: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7),
        every_n: int = 0,
        picture_sigma: float = 1.5,
    ):
        super().__init__(every_n)
        if not sigmas or not seeds:
            raise ValueError(
                f"held_out: sigmas={list(sigmas)}, seeds={list(seeds)}: give at least one of each"
            )
        self.sigmas = list(sigmas)
        self.seeds = list(seeds)
        self.picture_sigma = picture_sigma
        self.clips: list[Clip] = []
        self.history: dict[int, dict[str, Any]] = {}  # updates so far -> scores

    def on_train_start(self, model: nn.Module, iteration: int = 0) -> None:
        super().on_train_start(model, iteration)
        loader = self.trainer.dataloader_val
        if loader is None:
            raise ValueError(
                "trainer.callbacks.held_out needs held-out clips: set data_val or dataloader_val"
            )
        self.folder = self.trainer.job.path / "held_out"
        self.writes = self.trainer.processes.is_main
        if self.writes:
            self.folder.mkdir(exist_ok=True)
        batches = (to_device(batch, self.trainer.device) for batch in loader)
        self.clips = prepare(self.trainer.state.model, batches, self.trainer.options)
        saved = self.folder / "scores.json"
        if iteration and saved.exists():
            history = json.loads(saved.read_text())["history"]
            self.history = {int(n): scores for n, scores in history.items() if int(n) <= iteration}
        else:
            self._score(iteration)

    def every_n_impl(
        self,
        trainer: Trainer,
        model: nn.Module,
        data_batch: dict[str, Any],
        output_batch: Loss,
        loss: Tensor,
        iteration: int,
    ) -> None:
        if iteration < trainer.max_iter:
            self._score(iteration)

    def on_train_end(self, model: nn.Module, iteration: int = 0) -> None:
        self.trainer.metrics.flush()
        scores = self._score(iteration)
        checks = verdict(scores)
        self._save(checks)
        if self.writes:
            curve = self.folder / "loss_curve.png"
            loss_curve(self.trainer.job.metrics, self._means(), path=curve)
        self._draw_contact_sheet()
        self.trainer.summary += self._table(iteration) + [
            f"{'ok  ' if passed else 'FAIL'}  {check}" for check, passed in checks.items()
        ]
        self.trainer.summary += [
            f"pictures    {self.folder / 'loss_curve.png'}",
            f"            {self.folder / 'contact_sheet.png'}",
        ]
        if not all(checks.values()):
            self.trainer.exit_code = 1

    def _score(self, iteration: int) -> Scores:
        """Measure with EMA weights and keep the numbers."""
        trainer = self.trainer
        ema = trainer.state.ema
        with ema.ema_scope() if ema and iteration else nullcontext():
            scores = measure(
                trainer.state.model, self.clips, trainer.options, self.sigmas, self.seeds
            )
        self.history[iteration] = {name: value.tolist() for name, value in vars(scores).items()}
        means = {name: value.mean().item() for name, value in vars(scores).items()}
        logger.info(
            f"held-out EDM loss after {iteration} updates: {means['right']:.4f}, with another "
            f"clip's control {means['wrong']:.4f}, zero network {means['zero']:.4f}"
        )
        trainer.metrics.write(iteration, {f"held_out_{n}": value for n, value in means.items()})
        self._save()
        return scores

    def _save(self, checks: Mapping[str, bool] | None = None) -> None:
        if not self.writes:
            return
        content = {
            "clips": [clip.name for clip in self.clips],
            "sigmas": self.sigmas,
            "seeds": self.seeds,
            "history": self.history,
            "verdict": checks,
        }
        write_atomically(self.folder / "scores.json", json.dumps(content, indent=1) + "\n")

    def _means(self) -> dict[int, dict[str, float]]:
        return {
            iteration: {name: float(np.mean(value)) for name, value in scores.items()}
            for iteration, scores in self.history.items()
        }

    def _table(self, iteration: int) -> list[str]:
        """Mean over the clips per noise level, before and after."""
        first = min(self.history)
        rows = {
            "zero network": self.history[first]["zero"],
            f"after {first} updates": self.history[first]["right"],
            f"after {iteration} updates": self.history[iteration]["right"],
            "  another clip's control": self.history[iteration]["wrong"],
        }
        header = "".join(f"{f'sigma {sigma:g}':>11}" for sigma in self.sigmas)
        lines = [
            f"held-out EDM loss, {len(self.clips)} clips, EMA weights",
            f"{'':24}{header}{'mean':>9}",
        ]
        for label, values in rows.items():
            means = np.mean(values, axis=0)
            cells = "".join(f"{value:11.3f}" for value in means)
            lines.append(f"{label:24}{cells}{means.mean():9.3f}")
        for n, clip in enumerate(self.clips):
            right = np.mean(self.history[iteration]["right"][n])
            wrong = np.mean(self.history[iteration]["wrong"][n])
            lines.append(f"  {clip.name:22}own control {right:.3f}, another clip's {wrong:.3f}")
        return lines

    def _draw_contact_sheet(self) -> None:
        """Middle frames of a training clip and of every held-out clip."""
        trainer = self.trainer
        batch = default_collate([trainer.dataloader_train.dataset[0]])
        training = encode(trainer.state.model, to_device(batch, trainer.device), trainer.options)
        shown = [training, *self.clips]
        labels = ["training clip", *("held-out clip" for _ in self.clips)]
        rows = []
        ema = trainer.state.ema
        with ema.ema_scope() if ema else nullcontext():
            for label, clip in zip(labels, shown, strict=True):
                rows.append(Row(f"{label}\n{clip.name}", self._images(clip)))
        columns = (
            "control",
            "ground truth",
            f"noisy input, sigma {self.picture_sigma:g}",
            "model's x0",
        )
        if self.writes:
            contact_sheet(rows, columns, self.folder / "contact_sheet.png")

    def _images(self, clip: Clip) -> list[np.ndarray]:
        trainer = self.trainer
        model, options = trainer.state.model, trainer.options
        hints = [None, clip.hints]
        noisy, x0 = predict(model, clip, hints, self.picture_sigma, self.seeds[0], options)
        frame = clip.pixels.shape[2] // 2
        videos = [
            clip.control.float() / 127.5 - 1.0,
            clip.pixels,
            *(self._decode(latent) for latent in (noisy, x0)),
        ]
        return [_to_image(video[0, :3, frame]) for video in videos]

    def _decode(self, latent: Tensor) -> Tensor:
        with torch.no_grad():
            tokenizer = self.trainer.state.model.tokenizer
            return tokenizer.decode(latent / self.trainer.options.sigma_data)


def _to_image(pixels: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] to uint8 [H, W, 3]."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return scaled.permute(1, 2, 0).cpu().numpy()
