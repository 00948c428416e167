"""Training runs on data of every control, of several at once, of a new one, and on real clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import real_clip, write_controls, write_dataset, write_text
from tiny import FRAMES, HEIGHT, OVERRIDES, TEXT_WIDTH, TOKENS, WIDTH, changed, tiny_config
from torch import Tensor

import configs.control
from transfer1.config import compose
from transfer1.data.controls import CONTROLS
from transfer1.data.resize import pad, resize
from transfer1.data.video import Video
from transfer1.training.callback import Callback
from transfer1.training.trainer import Trainer

NEW_CONTROL = Path(__file__).parent / "new_control.py"


class Losses(Callback):
    """Keeps the loss and the batch of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[dict[str, Any]] = []

    def on_training_step_end(
        self, model: Any, data_batch: Any, output_batch: Any, loss: Tensor, iteration: int = 0
    ) -> None:
        self.losses.append(float(loss))
        self.batches.append(data_batch)


def data(folder: Path, hint_key: str, **dataset: Any) -> dict[str, Any]:
    """Nested overrides: train on a dataset folder, a hint of so many controls."""
    conditions = hint_key.count("_") - 1
    return {
        "model.hint_key.hint_key": hint_key,
        "model.net_ctrl.hint_channels": 16 * conditions,
        "model.hint_mask": [True] * conditions,
        "dataloader_val": None,
        "dataloader_train": {
            "batch_size": 2,
            "num_workers": 0,
            "dataset": {
                "dataset_dir": str(folder),
                "hint_key": hint_key,
                "num_frames": FRAMES,
                "resolution": [HEIGHT, WIDTH],
                "num_text_tokens": TOKENS,
                "text_channels": TEXT_WIDTH,
                **dataset,
            },
        },
    }


def train(config: Any) -> Losses:
    """Run a job to its end; its losses and batches."""
    trainer = Trainer(config)
    seen = Losses()
    seen.trainer = trainer
    trainer.callbacks.callbacks.append(seen)
    assert trainer.run() == 0
    assert len(seen.losses) == config.trainer.max_iter and np.isfinite(seen.losses).all()
    return seen


def write_text_embeddings(folder: Path) -> None:
    for file in (folder / "videos").glob("*.mp4"):
        embedding = np.ones((3, TEXT_WIDTH), np.float32)
        write_text(folder / "t5_xxl" / f"{file.stem}.pickle", [embedding])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small clips with the files of every control."""
    folder = write_dataset(tmp_path_factory.mktemp("clips"), {"a": 20, "bb": 24})
    write_text_embeddings(folder)
    return write_controls(folder)


@pytest.mark.parametrize(
    "names", [*(row.name for row in configs.control.CONTROLS), "edge_seg_keypoint"]
)
def test_two_steps_with_every_control(names: str, folder: Path, tmp_path: Path) -> None:
    key = f"control_input_{names}"
    seen = train(changed(tiny_config(tmp_path), data(folder, key)))
    hint = seen.batches[-1][key]
    assert hint.shape == (2, 3 * len(names.split("_")), FRAMES, HEIGHT, WIDTH)
    for control in hint.split(3, dim=1):
        assert control.float().std() > 1 or names == "seg", "seg may draw no mask"


def test_two_steps_with_weights_and_grayscale(folder: Path, tmp_path: Path) -> None:
    """A weight for each control comes with every sample."""
    settings = data(folder, "control_input_edge_depth", control_weight=[0.5, 1.5])
    settings["model.hint_key.grayscale"] = True
    seen = train(changed(tiny_config(tmp_path), settings))
    assert seen.batches[0]["control_weight"].tolist() == [[0.5, 1.5]] * 2


@pytest.fixture
def forget_new_control() -> Iterator[None]:
    rows = list(configs.control.CONTROLS)
    yield
    configs.control.CONTROLS[:] = rows
    CONTROLS.pop("negative", None)


def test_a_new_control_in_one_file_trains(
    folder: Path, tmp_path: Path, forget_new_control: None
) -> None:
    """Class and row stand in `new_control.py`; hint key and data groups follow from the row."""
    key = "control_input_negative"
    settings = data(folder, key)["dataloader_train"]
    dataset = [f"dataloader_train.dataset.{k}={v}" for k, v in settings.pop("dataset").items()]
    chosen = [
        *OVERRIDES,
        f"job.path_local={tmp_path}",
        f"hint_key={key}",
        f"data_train=example_transfer_train_data_{key}",
        f"data_val=example_transfer_val_data_{key}",
        *(f"dataloader_train.{name}={value}" for name, value in settings.items()),
        *dataset,
    ]
    config = compose(NEW_CONTROL, chosen)
    assert config.model.hint_key == {"hint_key": key, "grayscale": False}
    assert config.dataloader_val.dataset.dataset_dir == "datasets/negative"
    batch = train(changed(config, {"dataloader_val": None})).batches[0]
    expected = 255 - batch["video"].float()
    strength = batch[key].float().sum() / expected.sum()
    assert 0.45 < strength < 1.0
    correlation = torch.corrcoef(torch.stack([batch[key].float(), expected]).flatten(1))[0, 1]
    assert correlation > 0.8


# Real clips ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The robot clip with the controls that the original's tools made for it."""
    folder = tmp_path_factory.mktemp("real")
    for name in ("videos", "depth", "seg"):
        source = "input_video" if name == "videos" else name
        (folder / name).mkdir()
        (folder / name / "example1.mp4").symlink_to(real_clip(f"example1_{source}.mp4"))
    write_text_embeddings(folder)
    return folder


@pytest.mark.slow  # decodes HEVC; its quick sibling is test_two_steps_with_every_control
@pytest.mark.parametrize("names", ["edge", "vis", "upscale", "depth", "seg"])
def test_real_clips_train_with_every_control_that_has_data(
    names: str, real_folder: Path, tmp_path: Path
) -> None:
    key = f"control_input_{names}"
    settings = data(real_folder, key)
    settings["trainer.max_iter"] = 3
    settings["dataloader_train"]["batch_size"] = 1
    seen = train(changed(tiny_config(tmp_path), settings))
    assert all(batch[key].float().std() > 5 for batch in seen.batches)


def test_real_clips_train_with_controls_weighted_over_space_and_time(
    real_folder: Path, tmp_path: Path
) -> None:
    """Edge where the shipped map is white (robot and cup), depth elsewhere."""
    white = Video(real_clip("example1_spatiotemporal_weights_mask.mp4")).read(range(FRAMES))
    clip = torch.from_numpy(white).permute(3, 0, 1, 2)
    robot = pad(resize(clip, (24, 32)), (HEIGHT, WIDTH))[0][None, :1].float() / 255
    assert robot.shape == (1, 1, FRAMES, HEIGHT, WIDTH) and 0.05 < robot.mean() < 0.6

    class Maps(Callback):
        def on_training_step_start(self, model: Any, data: Any, iteration: int = 0) -> None:
            data["control_weight"] = [robot, 1 - robot]

    settings = data(real_folder, "control_input_edge_depth")
    trainer = Trainer(changed(tiny_config(tmp_path), settings))
    seen = Losses()
    trainer.callbacks.callbacks.extend([Maps(), seen])
    assert trainer.run() == 0
    assert len(seen.losses) == 2 and np.isfinite(seen.losses).all()
