"""Values that are right by themselves and impossible together: one line each, before any building.

Lines give the key, the value that stands there and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import changed, composed

import train
from transfer1.config import ConfigError, check_consistency, check_values, instantiate
from transfer1.config.messages import group_options

LVG = "experiment=CTRL_7Bv1pt3_lvg_tp_121frames_control_input_edge_block3_pretrain"
AV = "experiment=CTRL_7Bv1pt3_t2w_57frames_control_input_hdmap_block3_pretrain"
TWIN = (f"{LVG}_cpu",)
BASIC = ("net=tiny_fa", "net_ctrl=tiny_fa", "conditioner=basic")
CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'config_train.py'}"

# (composed overrides, changes, lines that are found)
IMPOSSIBLE: list[tuple[tuple[str, ...], list[str], list[str]]] = [
    (TWIN, ["model.precision=float16"], ["model.precision=float16: choose float32 or bfloat16"]),
    (TWIN, ["model.loss_reduce=median"], ["model.loss_reduce=median: choose mean or sum"]),
    (TWIN, ["trainer.device=tpu"], ["trainer.device=tpu: choose auto, cuda or cpu"]),
    (TWIN, ["trainer.non_finite=ignore"], ["trainer.non_finite=ignore: choose skip or zero"]),
    (TWIN, ["trainer.max_iter=0"], ["trainer.max_iter=0: give 1 or more"]),
    (TWIN, ["dataloader_train.batch_size=0"], ["dataloader_train.batch_size=0: give 1 or more"]),
    (TWIN, ["model.hint_dropout_rate=1.5"], ["model.hint_dropout_rate=1.5: give 0 to 1"]),
    (
        TWIN,
        ["model.net_ctrl.dropout_ctrl_branch=-0.1"],
        ["model.net_ctrl.dropout_ctrl_branch=-0.1: give 0 to 1"],
    ),
    (TWIN, ["optimizer.lr=-1.0"], ["optimizer.lr=-1.0: give 0 or more"]),
    (TWIN, ["optimizer.betas=[0.9,1.0]"], ["optimizer.betas holds 1.0: .* less than 1"]),
    (
        TWIN,
        ["checkpoint.keys_not_to_resume=[optimizer]"],
        ["checkpoint.keys_not_to_resume: unknown optimizer; choose of model, optim, scheduler"],
    ),
    (TWIN, ["model.sde.sigma_min=100"], ["model.sde.sigma_min=100: give less than .*=80.0"]),
    (
        TWIN,
        ["model_parallel.pipeline_model_parallel_size=2"],
        ["model_parallel.pipeline_model_parallel_size=2: give 1"],
    ),
    (
        TWIN,
        ["model.net.num_heads=3", "model.net_ctrl.num_heads=3"],
        [
            "model.net.model_channels=64: give a multiple of model.net.num_heads=3",
            "model.net_ctrl.model_channels=64: give a multiple of model.net_ctrl.num_heads=3",
        ],
    ),
    (
        TWIN,
        ["model.net.model_channels=128"],
        ["model.net_ctrl.model_channels=64: .*copy of the base.* model.net.model_channels=128"],
    ),
    (
        TWIN,
        ["model.net.out_channels=8", "model.net_ctrl.out_channels=8"],
        [
            "model.net.out_channels=8: the latents of model.tokenizer have 16 channels",
            "model.net_ctrl.out_channels=8: the latents of model.tokenizer have 16 channels",
        ],
    ),
    (
        TWIN,
        ["model.net.in_channels=16", "model.net_ctrl.in_channels=16"],
        [
            "model.net.in_channels=16: give 17, the channels of the latent and the frame mask",
            "model.net_ctrl.in_channels=16: give 17",
        ],
    ),
    (
        TWIN,
        ["model.net.concat_frame_mask=false", "model.net_ctrl.concat_frame_mask=false"],
        [
            "model.net.in_channels=17: give 16, .*concat_frame_mask=true",
            "model.net_ctrl.in_channels=17: give 16",
        ],
    ),
    (
        TWIN,
        ["model.net_ctrl.num_control_blocks=0"],
        [r"num_control_blocks=0: give 1 to 4 \(model.net_ctrl.num_blocks\)"],
    ),
    (TWIN, ["model.net.num_blocks=2"], ["num_control_blocks=3: .* has model.net.num_blocks=2"]),
    (
        TWIN,
        ["model.net_ctrl.hint_channels=8"],
        ["model.net_ctrl.hint_channels=8: give at least 16, .* each of the 1 conditions"],
    ),
    (
        TWIN,
        [
            "model.hint_key.hint_key=control_input_a_b",
            "dataloader_train=null",
            "dataloader_val=null",
            "model.net_ctrl.hint_channels=24",
        ],
        [
            "model.net_ctrl.hint_channels=24: give at least 32, .* for each of the 2 conditions",
            r"model.hint_mask=\[True\]: give 2 entries, one for each condition of .*_a_b",
        ],
    ),
    (TWIN, ["model.n_views=5"], ["model.n_views=5: give 1"]),
    (
        TWIN,
        ["model.hint_key.hint_key=control_input_depth"],
        [
            "hint_key=control_input_depth: dataloader_train.dataset makes control_input_edge",
            "hint_key=control_input_depth: dataloader_val.dataset makes control_input_edge",
        ],
    ),
    (TWIN, ["model.hint_key=null"], ["model.hint_key=null: .*choose hint_key=NAME"]),
    (
        ("net=tiny_fa", "pixel_corruptor=blur"),
        [],
        ["model.pixel_corruptor: .* there is no net_ctrl; choose one"],
    ),
    (
        BASIC,
        [],
        [
            "model.net.concat_padding_mask=True: the conditioner makes no padding_mask",
            "model.net.pos_emb_cls=rope3d: .*the conditioner makes no fps",
            "model.net_ctrl.concat_padding_mask=True: the conditioner makes no padding_mask",
            "model.net_ctrl.pos_emb_cls=rope3d: .*the conditioner makes no fps",
        ],
    ),
    (
        ("net=tiny_fa", "conditioner=basic"),
        [
            "model.net.concat_padding_mask=false",
            "model.net.pos_emb_cls=sincos",
            "model.net.additional_timestamp_channels.org_h=32",
        ],
        ["additional_timestamp_channels.org_h: the conditioner makes no image_size"],
    ),
    (
        ("net=tiny_fa", "conditioner=add_fps_image_size_padding_mask"),
        ["model.net.concat_frame_mask=true", "model.net.in_channels=17"],
        ["model.net.concat_frame_mask=True: the conditioner has no video_cond_bool"],
    ),
    (
        TWIN,
        ["model.net.add_augment_sigma_embedding=true"],
        ["model.net.add_augment_sigma_embedding=True: set .*condition_on_augment_sigma=true"],
    ),
    (
        TWIN,
        ["model.conditioner.text.dropout_rate=2"],
        ["model.conditioner.text.dropout_rate=2.0: give 0 to 1"],
    ),
    (TWIN, ["model.loss_mask_enabled=true"], ["loss_masking is empty; add masks with"]),
    (
        TWIN,
        ["dataloader_train.dataset.num_frames=18"],
        [r"dataloader_train.dataset.num_frames=18: .*give 1 \+ a multiple of 8"],
    ),
    (
        (AV,),
        ["dataloader_train.dataset.num_frames=121"],
        ["dataloader_train.dataset.num_frames=121: .*give a multiple of 57"],
    ),
    (
        (*TWIN, "tokenizer=debug_tokenizer"),
        ["dataloader_val.dataset.num_frames=20"],
        ["dataloader_val.dataset.num_frames=20: .*give 1 or a multiple of 17"],
    ),
    (
        TWIN,
        ["dataloader_val.dataset.num_frames=137"],
        [
            "num_frames=137: 18 latent frames are more than model.net.max_frames=16",
            "num_frames=137: 18 latent frames are more than model.net_ctrl.max_frames=16",
        ],
    ),
    (
        TWIN,
        ["model.net.patch_temporal=2", "model.net_ctrl.patch_temporal=2"],
        ["num_frames=17: 3 latent frames are no multiple of .*patch_temporal=2"] * 4,
    ),
    (
        TWIN,
        ["dataloader_train.dataset.resolution=[60,96]"],
        [r"resolution=\[60, 96\]: give multiples of 16, the 8 of model.tokenizer"] * 2,
    ),
    (
        TWIN,
        ["dataloader_train.dataset.resolution=[64,1024]"],
        [r"resolution=\[64, 1024\]: model.net takes at most 256", "model.net_ctrl takes at most"],
    ),
    (
        TWIN,
        ["dataloader_train.dataset.text_channels=512"],
        [
            "dataloader_train.dataset.text_channels=512: model.net .*crossattn_emb_channels=1024",
            "dataloader_train.dataset.text_channels=512: model.net_ctrl",
        ],
    ),
    (TWIN, ["model.latent_shape=[16,3]"], [r"model.latent_shape=\[16, 3\]: give 4 positive"]),
    (
        TWIN,
        ["trainer.run_validation=true", "dataloader_val=null"],
        ["trainer.run_validation=True: there is no validation data; choose data_val=NAME"],
    ),
    (
        TWIN,
        ["model_parallel.sequence_parallel=true"],
        ["sequence_parallel=True: .*tensor_model_parallel_size above 1, or it to false"],
    ),
    (
        TWIN,
        ["model_parallel.tensor_model_parallel_size=3"],
        [
            "tensor_model_parallel_size=3: give a divisor of model.net.num_heads=2",
            "tensor_model_parallel_size=3: give a divisor of model.net_ctrl.num_heads=2",
        ],
    ),
]

# (composed overrides, node that is built, change, message)
REFUSED_BY_PART = [
    ("model.net", "block_config=FA-XX", "model.net: .*XX"),
    ("model.net", "pos_emb_cls=rope4d", "model.net: pos_emb_cls='rope4d'"),
    ("model.net", "pos_emb_interpolation=resize", "model.net: pos_emb_interpolation='resize'"),
    ("model.net", "activation_checkpoint=full", "model.net: activation_checkpoint='full'"),
    (
        "model.net",
        "extra_per_block_abs_pos_emb_type=random",
        "model.net: extra_per_block_abs_pos_emb_type='random'",
    ),
    ("scheduler", "warm_up_steps=[1,2]", r"got \[2, 1, 1, 1, 1\] entries"),
    ("scheduler", "cycle_lengths=[5]", r"scheduler.warm_up_steps\[0\]=10: .* cycle_lengths\[0\]=5"),
    ("model.tokenizer", "latent_ch=12", "model.tokenizer: .*no table for 8x8x8-12"),
    ("model.conditioner", "video_cond_bool.condition_location=last", "choose one of first_n"),
    (
        "model.conditioner",
        "video_cond_bool.first_random_n_num_condition_t_min=9",
        "need 0 <= min <= max",
    ),
    ("model.conditioner", "fps.obj.output_key=speed", "output_key=speed: choose one of"),
    ("trainer.callbacks.grad_clip", "clip_norm=0.0", "clip_norm=0.0: must be positive"),
    ("dataloader_train.dataset", "dataset_dir=nowhere", "dataset_dir=nowhere: no such folder"),
    ("dataloader_train.dataset", "control_strength=extreme", "control_strength=extreme: choose"),
]


@pytest.mark.parametrize(
    ("overrides", "change", "lines"),
    IMPOSSIBLE,
    ids=[(case[1] or list(case[0]))[-1] for case in IMPOSSIBLE],
)
def test_impossible_combinations(
    overrides: tuple[str, ...], change: list[str], lines: Sequence[str]
) -> None:
    """Exactly these contradictions are found, in this order."""
    config = changed(composed(overrides), change)
    with pytest.raises(ConfigError) as error:
        check_consistency(config)
    found = str(error.value).split("\n  ")
    assert len(found) == len(lines), found
    for actual, expected in zip(found, lines, strict=True):
        assert re.search(expected, actual), actual


@pytest.mark.parametrize(("key", "change", "message"), REFUSED_BY_PART)
def test_values_that_a_part_refuses(key: str, change: str, message: str) -> None:
    """What only the part itself can judge names the node when it is built."""
    config = changed(composed(TWIN), [f"{key}.{change}"])
    with pytest.raises(ConfigError, match=message):
        instantiate(OmegaConf.select(config, key))  # type: ignore[arg-type]


def test_processes_that_do_not_share_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(composed(TWIN), ["model_parallel.tensor_model_parallel_size=2"])
    check_consistency(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_consistency(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="2 processes share one model .* but 3 were started"):
        check_consistency(config)


def test_every_option_and_experiment_is_consistent() -> None:
    """No false alarm: every combination that is shipped passes."""
    for override in (LVG, f"{LVG}_cpu", AV, f"{AV}_cpu", "experiment=demo_edge"):
        check_consistency(composed((override,)))
    for name in group_options("net"):
        check_consistency(composed((f"net={name}", f"net_ctrl={name}")))
    check_consistency(composed(()))


def test_a_part_of_somebody_else_is_not_judged() -> None:
    node: Any = {"_target_": "fractions.Fraction", "numerator": 1}
    config = changed(composed(()), {"model.net": node, "model.tokenizer": None})
    check_consistency(config)
    config = changed(composed(TWIN), {"dataloader_train.dataset._target_": "fractions.Fraction"})
    check_consistency(config)


def test_values_are_checked_without_the_rest() -> None:
    contradiction = changed(composed(TWIN), ["model.net_ctrl.hint_channels=8"])
    check_values(contradiction)
    with pytest.raises(ConfigError, match="trainer.grad_accum_iter=0: give 1 or more"):
        check_values(changed(composed(TWIN), ["trainer.grad_accum_iter=0"]))


def test_the_command_line_reports_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run fails as well: one message, all contradictions, no traceback."""
    arguments = [CONFIG, "--dryrun", "--", *TWIN, "model.net_ctrl.hint_channels=8"]
    assert train.main([*arguments, "dataloader_train.dataset.num_frames=18"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: model.net_ctrl.hint_channels=8")
    assert "num_frames=18" in message and "Traceback" not in message
