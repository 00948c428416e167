"""Group `conditioner`: what the network is told besides the noisy latent."""

from __future__ import annotations

from typing import Any

import attrs
from hydra.core.config_store import ConfigStore

from transfer1.config import LazyCall as L
from transfer1.config import LazyDict
from transfer1.config.removed import MULTI_VIEW

MODULE = "transfer1.diffusion.condition"


@attrs.define(slots=False)
class TextEmbedder:
    """Text: whole samples are dropped."""

    obj: Any = attrs.field(factory=lambda: L(f"{MODULE}.TextAttr")())
    dropout_rate: float = 0.2
    input_keys: list[str] = attrs.field(factory=lambda: ["t5_text_embeddings", "t5_text_mask"])


@attrs.define(slots=False)
class Embedder:
    """One entry of the batch handed on."""

    obj: Any = None
    dropout_rate: float = 0.0
    input_key: str = ""


@attrs.define(slots=False)
class FrameEmbedder(Embedder):
    """Whether, and how, first frames are given to the network."""

    obj: Any = attrs.field(factory=lambda: L(f"{MODULE}.BooleanFlag")(output_key="video_cond_bool"))
    dropout_rate: float = 0.2
    input_key: str = "fps"  # only tells the batch size
    compute_loss_for_condition_region: bool = False
    condition_location: str = "first_random_n"  # or first_n, random
    random_conditon_rate: float = 0.5  # of each frame, where condition_location is random
    first_random_n_num_condition_t_max: int = 4
    first_random_n_num_condition_t_min: int = 0
    cfg_unconditional_type: str = "zero_condition_region_condition_mask"
    apply_corruption_to_condition_region: str = "noise_with_sigma"
    apply_corruption_to_condition_region_sigma_value: list[float] = attrs.field(
        factory=lambda: [0.001, 0.2] + [0.5] * 10
    )
    condition_on_augment_sigma: bool = False
    augment_sigma_sample_p_mean: float = 0.0
    augment_sigma_sample_p_std: float = 1.0
    augment_sigma_sample_multiplier: float = 4.0
    add_pose_condition: bool = False
    sample_tokens_start_from_p_or_i: bool = False
    normalize_condition_latent: bool = False
    augment_sigma_in_inference: float = 0.001
    augment_seed: int = 1


def conditioner(keys: tuple[str, ...] = (), frames: bool = False) -> LazyDict:
    """Text, entries of the batch by name, and first frames if they are given."""
    embedders: dict[str, Any] = {"text": TextEmbedder()}
    for key in keys:
        remap = L(f"{MODULE}.ReMapkey")(output_key=key)
        embedders[key] = Embedder(obj=remap, input_key=key)
    if frames:
        embedders["video_cond_bool"] = FrameEmbedder()
    return L(f"{MODULE}.Conditioner")(**embedders)


def register() -> None:
    """Store the options of `conditioner`; with and without control they are the same.

    The one of multi-view models is known by name only.
    """
    store = ConfigStore.instance().store
    sizes = ("fps", "num_frames", "image_size", "padding_mask")
    for name, node in (
        ("basic", conditioner()),
        ("add_fps_image_size_padding_mask", conditioner(sizes)),
        ("video_cond", conditioner(sizes, frames=True)),
        ("ctrlnet", conditioner()),
        ("ctrlnet_add_fps_image_size_padding_mask", conditioner(sizes, frames=True)),
        ("view_cond_ctrlnet_add_fps_image_size_padding_mask", L(MULTI_VIEW)()),
    ):
        store(group="conditioner", package="model.conditioner", name=name, node=node)
