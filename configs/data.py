"""Groups `data_train` and `data_val`, one option per control."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L
from transfer1.config import LazyDict

from .control import CONTROLS


def dataloader(hint_key: str, dataset_dir: str, is_train: bool) -> LazyDict:
    """Loader of 121-frame clips: an endless shuffled stream, or one ordered pass to validate."""
    return L("transfer1.data.loader.build_dataloader")(
        dataset=L("transfer1.data.dataset.TransferDataset")(
            dataset_dir=dataset_dir,
            num_frames=121,
            resolution="720",
            hint_key=hint_key,
            is_train=is_train,
        ),
        stream=is_train,
        batch_size=1,
        num_workers=8,
        prefetch_factor=2,
        pin_memory=True,
        drop_last=True,
    )


def register() -> None:
    """Store the options of `data_train` and `data_val`."""
    store = ConfigStore.instance().store
    for control in CONTROLS:
        for part in ("train", "val"):
            store(
                group=f"data_{part}",
                package=f"dataloader_{part}",
                name=f"example_transfer_{part}_data_{control.hint_key}",
                node=dataloader(control.hint_key, control.dataset_dir, is_train=part == "train"),
            )
