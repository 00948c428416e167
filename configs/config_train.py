"""Root of a training run: its fields, the defaults list, and the groups it chooses from."""

from __future__ import annotations

from configs import (
    callbacks,
    checkpoint,
    conditioner,
    control,
    corruption,
    data,
    ema,
    experiments,
    fsdp,
    kernel_choice,
    lora,
    net,
    optimizer,
    scheduler,
    tokenizer,
)
from transfer1.config import PLACEHOLDER, Config, ModelConfig
from transfer1.config import LazyCall as L

DEFAULTS = [
    "_self_",
    {"data_train": None},
    {"data_val": None},
    {"optimizer": "fusedadamw"},
    {"scheduler": "lambdalinear"},
    {"callbacks": None},
    {"net": None},
    {"net_ctrl": None},
    {"hint_key": "control_input_edge"},
    {"conditioner": "ctrlnet_add_fps_image_size_padding_mask"},
    {"pixel_corruptor": None},
    {"fsdp": None},
    {"ema": "power"},
    {"checkpoint": "local"},
    {"ckpt_klass": "multi_rank"},
    {"tokenizer": "vae1"},
    {"kernels": "auto"},
    {"lora": None},
    {"experiment": None},
]


def register_configs() -> None:
    """Store the options of all groups."""
    for family in (
        data,
        optimizer,
        scheduler,
        callbacks,
        net,
        control,
        conditioner,
        corruption,
        ema,
        fsdp,
        checkpoint,
        tokenizer,
        kernel_choice,
        lora,
        experiments,
    ):
        family.register()


def make_config() -> Config:
    """The root, with all groups registered."""
    register_configs()
    return Config(
        model=ModelConfig(
            sde=L("transfer1.diffusion.edm.NoiseDistribution")(
                p_mean=0.0, p_std=1.0, sigma_max=80.0, sigma_min=0.0002
            )
        ),
        model_obj=L("transfer1.model.transfer.build_transfer")(config=PLACEHOLDER),
        defaults=list(DEFAULTS),
    )
