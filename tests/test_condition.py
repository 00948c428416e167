"""Conditions: embedders, dropout, and pairs for guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transfer1.diffusion.condition import (
    BooleanFlag,
    Conditioner,
    DataType,
    ReMapkey,
    TextAttr,
)
from transfer1.diffusion.draws import Draws

TEXT_KEYS = ["t5_text_embeddings", "t5_text_mask"]


def text(rate: float = 0.0, keys: list[str] = TEXT_KEYS) -> dict[str, Any]:
    return {"obj": TextAttr(), "dropout_rate": rate, "input_keys": keys}


def remap(key: str, rate: float = 0.0, dtype: str | None = None) -> dict[str, Any]:
    return {"obj": ReMapkey(key, dtype), "dropout_rate": rate, "input_key": key}


def flag(rate: float = 0.0, **frames: Any) -> dict[str, Any]:
    return {"obj": BooleanFlag(), "dropout_rate": rate, "input_key": "fps", **frames}


def batch(size: int = 2) -> dict[str, torch.Tensor]:
    return {
        "t5_text_embeddings": torch.randn(size, 3, 5),
        "t5_text_mask": torch.ones(size, 3, dtype=torch.int64),
        "fps": torch.full((size,), 24.0),
        "num_frames": torch.full((size,), 9),
    }


def test_nothing_is_drawn_or_changed_at_rate_zero() -> None:
    data = batch()
    condition = Conditioner(text=text(), fps=remap("fps"), video_cond_bool=flag())(data, None)
    assert torch.equal(condition.context, data["t5_text_embeddings"])
    assert torch.equal(condition.fps, data["fps"])
    assert condition.video_cond_bool is True
    assert condition.num_frames is None and condition.gt_latent is None
    assert condition.data_type is DataType.VIDEO


def test_dropout_is_per_sample_and_spares_the_mask_and_the_batch() -> None:
    data = batch(64)
    before = {name: tensor.clone() for name, tensor in data.items()}
    conditioner = Conditioner(text=text(0.25), num_frames=remap("num_frames", 0.5))
    condition = conditioner(data, Draws(seed=1))
    dropped = (condition.context == 0).all(2).all(1)
    assert torch.equal(condition.context[~dropped], data["t5_text_embeddings"][~dropped])
    assert 6 <= dropped.sum() <= 26
    assert torch.equal(condition.context_mask, data["t5_text_mask"])
    assert set(condition.num_frames.tolist()) == {0, 9}
    assert condition.num_frames.dtype == torch.int64
    assert all(torch.equal(data[name], before[name]) for name in data)


def test_flag_is_one_draw_for_the_batch() -> None:
    conditioner = Conditioner(text=text(), video_cond_bool=flag(0.5))
    flags = [conditioner(batch(), Draws(0, iteration=i)).video_cond_bool for i in range(32)]
    assert set(flags) == {True, False}


def test_pair_drops_all_that_training_ever_drops() -> None:
    data = batch()
    conditioner = Conditioner(text=text(0.2), fps=remap("fps"), video_cond_bool=flag(0.2))
    condition, uncondition = conditioner.pair(data)
    assert torch.equal(condition.context, data["t5_text_embeddings"])
    assert uncondition.context.abs().max() == 0
    assert torch.equal(uncondition.fps, data["fps"])
    assert (condition.video_cond_bool, uncondition.video_cond_bool) == (True, False)


def test_negative_prompt_replaces_the_text_where_present() -> None:
    data = batch()
    conditioner = Conditioner(text=text(0.2))
    _, same_text = conditioner.pair(data, negative_prompt=True)
    assert torch.equal(same_text.context, data["t5_text_embeddings"])
    negative = {"neg_t5_text_embeddings": torch.randn(2, 3, 5)}
    condition, uncondition = conditioner.pair({**data, **negative}, negative_prompt=True)
    assert torch.equal(condition.context, data["t5_text_embeddings"])
    assert torch.equal(uncondition.context, negative["neg_t5_text_embeddings"])
    assert torch.equal(uncondition.context_mask, data["t5_text_mask"])


def test_texts_join_along_the_tokens() -> None:
    data = {**batch(), "style": torch.randn(2, 4, 5), "style_mask": torch.zeros(2, 4)}
    conditioner = Conditioner(text=text(), style=text(keys=["style", "style_mask"]))
    condition = conditioner(data, None)
    expected = torch.cat([data["t5_text_embeddings"], data["style"]], 1)
    assert torch.equal(condition.context, expected)
    assert condition.context_mask.shape == (2, 7)


def test_values_are_converted() -> None:
    conditioner = Conditioner(text=text(), num_frames=remap("num_frames", dtype="float"))
    assert conditioner(batch(), None).num_frames.dtype == torch.float32


def test_frame_options_come_from_the_flag_node() -> None:
    assert Conditioner(text=text()).frames is None
    frames = Conditioner(text=text(), video_cond_bool=flag(condition_location="random")).frames
    assert frames is not None and frames.condition_location == "random"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"text": {"obj": TextAttr(), "dropout_rate": 0.1}}, "text lacks 'input_keys'"),
        ({"text": text(rate=1.5)}, r"text\.dropout_rate=1\.5"),
        ({"text": {**text(), "rate": 1}}, r"text: unknown \['rate'\]"),
        ({"video_cond_bool": flag(condition_locaton="random")}, r"\['condition_locaton'\]"),
        ({"video_cond_bool": flag(condition_location="last")}, "last: choose one of first_n"),
        ({"video_cond_bool": flag(add_pose_condition=True)}, "poses are not supported"),
        ({"video_cond_bool": flag(first_random_n_num_condition_t_min=5)}, "min <= max"),
    ],
)
def test_wrong_nodes_are_named(nodes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conditioner(**nodes)


def test_missing_inputs_are_named() -> None:
    data = batch()
    del data["fps"]
    with pytest.raises(ValueError, match=r"conditioner\.fps needs fps, the batch holds num_frames"):
        Conditioner(text=text(), fps=remap("fps"))(data, None)
    with pytest.raises(ValueError, match="no text context"):
        Conditioner(num_frames=remap("num_frames"))(data, None)


def test_wrong_outputs_are_named() -> None:
    with pytest.raises(ValueError, match="output_key=frames: choose one of .*fps"):
        ReMapkey("frames")
    with pytest.raises(ValueError, match="dtype=fp8: choose one of float"):
        ReMapkey("fps", "fp8")
