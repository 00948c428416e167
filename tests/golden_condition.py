"""Golden checkers of the conditioner, of given frames and of denoising with them."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import original
import torch
import yaml
from golden_diffusion import shared_values
from goldens import RecordedDraws, Run, compare, handles
from torch import Tensor, nn

from transfer1.diffusion.condition import (
    BooleanFlag,
    Condition,
    Conditioner,
    DataType,
    ReMapkey,
    TextAttr,
)
from transfer1.diffusion.denoise import denoise
from transfer1.diffusion.edm import EDMScaling, NoiseDistribution, draw_noise
from transfer1.diffusion.frame_condition import (
    FrameConditioning,
    augment_frames,
    condition_on_frames,
    crop_latent,
    frame_indicator,
    normalize_frames,
)
from transfer1.model.layers import LogVariance

# Fields of the original's condition -> ours.
FIELDS = {
    "crossattn_emb": "context",
    "crossattn_mask": "context_mask",
    "condition_video_augment_sigma": "augment_sigma",
    "condition_video_indicator": "frame_indicator",
    "condition_video_input_mask": "frame_mask",
    "condition_video_pose": "pose",
    "base_model": None,
}
FLAG = "video_cond_bool"
# Of the released experiments, which the runs of case video_cond start from.
RELEASED_SDE = NoiseDistribution(p_mean=0.0, p_std=1.0, sigma_max=80.0, sigma_min=0.0002)
RELEASED_FRAMES = {
    "condition_location": "first_n",
    "augment_sigma_sample_p_mean": -3.0,
    "augment_sigma_sample_p_std": 2.0,
    "augment_sigma_sample_multiplier": 1.0,
}


def recorded(run: Run, source: str) -> list[Tensor]:
    """Draws of one source ("torch_randn", "numpy_uniform", ...) in call order."""
    values = run.group("value")
    return [values[key] for key in sorted(values) if key.endswith(source)]


# --- conditioner


def build_conditioner(rates: dict[str, float]) -> Conditioner:
    nodes: dict[str, dict[str, Any]] = {}
    for name, rate in rates.items():
        if name == "text":
            keys = {"input_keys": ["t5_text_embeddings", "t5_text_mask"]}
            nodes[name] = {"obj": TextAttr(), "dropout_rate": rate, **keys}
        elif name == FLAG:
            nodes[name] = {"obj": BooleanFlag(name), "dropout_rate": rate, "input_key": "fps"}
        else:
            nodes[name] = {"obj": ReMapkey(name), "dropout_rate": rate, "input_key": name}
    return Conditioner(**nodes)


def dropout_rates(run: Run) -> dict[str, float]:
    """Rates of this run, or of the run with rates whose name has most in common with its own."""
    if "dropout_rates" in run.spec:
        return run.spec["dropout_rates"]
    runs = {name: spec for name, spec in run.file["runs"].items() if "dropout_rates" in spec}
    nearest = max(runs, key=lambda name: len(os.path.commonprefix([name, run.name])))
    return runs[nearest]["dropout_rates"]


def check_condition(condition: Condition, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        actual = getattr(condition, FIELDS.get(name, name))
        if name == FLAG:
            actual = torch.tensor([actual])
        assert actual.dtype == value.dtype, f"{name}: {actual.dtype}, expected {value.dtype}"
        compare(actual, value, name)


@handles(("video_cond", "conditioner"))
def check_conditioner(run: Run) -> None:
    """The original draws once per embedder, in configuration order, at rate 0 too."""
    rates = dropout_rates(run)
    purposes = [name if name == FLAG else f"dropout.{name}" for name in rates]
    draws = RecordedDraws(dict(zip(purposes, recorded(run, "torch_bernoulli"), strict=True)))
    batch = shared_values(run, "t5_text_embeddings")
    condition = build_conditioner(rates)(batch, draws)
    check_condition(condition, run.group("output"))
    assert condition.data_type is DataType[run.spec["literals"]["data_type"]]
    for name in run.spec["none_fields"]:
        assert getattr(condition, FIELDS.get(name, name) or "", None) is None, name


@handles(("video_cond", "cond_uncond"), ("video_cond", "cond_negative"))
def check_condition_pair(run: Run) -> None:
    batch = {**shared_values(run, "t5_text_embeddings"), **run.group("input")}
    conditioner = build_conditioner(dropout_rates(run))
    pair = conditioner.pair(batch, negative_prompt=run.kind == "cond_negative")
    outputs = run.group("output")
    for prefix, condition in zip(("cond/", "uncond/"), pair, strict=True):
        names = [name for name in outputs if name.startswith(prefix)]
        assert names
        check_condition(condition, {name.removeprefix(prefix): outputs[name] for name in names})


# --- given frames


def first_frames(latent: Tensor, count: int, flag: bool, frames: FrameConditioning) -> Condition:
    condition = Condition(torch.zeros(len(latent), 1, 1), video_cond_bool=flag)
    return condition_on_frames(condition, latent, frames, num_condition_t=count)


@handles(("video_cond", "mask"))
def check_frame_mask(run: Run) -> None:
    spec, outputs = run.spec, run.group("output")
    frames = FrameConditioning(condition_location=spec["location"])
    latent = shared_values(run, "gt_latent")["gt_latent"]
    B, _, T, H, W = outputs["input_mask"].shape
    latent = torch.zeros(B, latent.shape[1], T, H, W)
    condition = first_frames(latent, spec["num_condition_t"], spec[FLAG], frames)
    assert condition.frame_indicator is not None and condition.frame_mask is not None
    compare(condition.frame_indicator, outputs["indicator"], "indicator")
    compare(condition.frame_mask, outputs["input_mask"], "input_mask")


@handles(("video_cond", "mask_random"))
def check_drawn_frames(run: Run) -> None:
    """The draws are those of torch's global generator under each seed."""
    spec = run.spec
    frames = FrameConditioning(
        condition_location=spec["location"],
        random_conditon_rate=spec.get("rate", 0.5),
        first_random_n_num_condition_t_min=spec.get("min", 0),
        first_random_n_num_condition_t_max=spec.get("max", 4),
    )
    (expected,) = run.group("output").values()
    num_frames = shared_values(run, "gt_latent")["gt_latent"].shape[2]
    if expected.ndim == 2:
        num_frames = expected.shape[1]
    first, last = spec["seeds"]
    for seed, value in zip(range(first, last + 1), expected, strict=True):
        generator = torch.Generator().manual_seed(seed)
        if spec["location"] == "random":
            given = torch.bernoulli(torch.full((num_frames,), spec["rate"]), generator=generator)
            draws = RecordedDraws({"condition_indicator": 1 - given})  # low: below the rate
        else:
            count = torch.randint(spec["min"], spec["max"] + 1, (1,), generator=generator)
            draws = RecordedDraws({"num_condition_t": count})
        indicator = frame_indicator(num_frames, frames, draws).flatten()
        compare(indicator if value.ndim else indicator.sum(), value, f"seed {seed}")


@handles(("video_cond", "augment"))
def check_augmentation(run: Run) -> None:
    """Drawn: unused noise, level, noise; at inference nothing."""
    spec, outputs = run.spec, run.group("output")
    frames = FrameConditioning(**{**RELEASED_FRAMES, **spec["config"]})
    uniforms, normals = recorded(run, "numpy_uniform"), recorded(run, "torch_randn")
    draws = RecordedDraws({})
    if uniforms:
        draws = RecordedDraws({"augment_sigma": uniforms[0], "augment_noise": normals[-1]})
    else:
        frames = frames.at_inference(spec["inference_sigma"])
    latent = shared_values(run, "gt_latent")["gt_latent"][: spec["batch"]]
    condition = first_frames(latent, spec["num_condition_t"], True, frames)
    before = condition.frame_indicator
    assert before is not None
    before = before.clone()
    sigma = torch.tensor(spec["sigma"])
    augmented = augment_frames(condition, sigma, frames, EDMScaling(spec["sigma_data"]), draws)
    compare(augmented.latent, outputs["augment_latent_cin"], "augment_latent_cin")
    compare(augmented.indicator[:1], outputs["indicator"], "indicator")
    assert torch.equal(condition.frame_indicator, before), "the condition was changed"
    expected = outputs.get("condition_video_augment_sigma")
    if expected is None:
        assert augmented.noise_level is None
    else:
        assert augmented.noise_level is not None
        level = augmented.noise_level[: len(expected)]
        compare(level, expected, "condition_video_augment_sigma")


@handles(("video_cond", "normalize"))
def check_normalize(run: Run) -> None:
    latent = shared_values(run, "gt_latent")["gt_latent"]
    compare(normalize_frames(latent), run.group("output")["out"], "normalized")


def experiment_network(run: Run, node: str) -> nn.Module:
    """A network of the experiment that the `weights_case` of a run shrinks by overrides."""
    source = run.folder / run.spec["weights_case"] / f"{run.spec['weights_case']}.json"
    overrides = [
        item.partition("=") for item in json.loads(source.read_text())["hydra_overrides"][1:]
    ]
    experiment = next(value for key, _, value in overrides if key == "experiment")
    config = json.loads((run.folder / "config" / "config.json").read_text())
    init = dict(config["resolved"][experiment]["model"][node])
    cls = init.pop("_target_")["__callable__"].rpartition(".")[2]
    for key, _, value in overrides:
        if key.startswith(f"model.{node}."):
            init[key.removeprefix(f"model.{node}.")] = yaml.safe_load(value)
    return original.build(cls, init)


@handles(("video_cond", "denoise"))
def check_denoise(run: Run) -> None:
    """The base network alone, with frames that are given, withheld or part of the loss."""
    spec, outputs = run.spec, run.group("output")
    inputs = shared_values(run, "gt_latent", "noise_x", "crossattn_emb")
    # The head of the log-variance is stored once, outside the base that shares it.
    weights = {
        name.removeprefix("base_model."): tensor
        for name, tensor in run.weights().items()
        if name.startswith(("base_model.", "logvar."))
    }
    model = nn.ModuleDict({"net": experiment_network(run, "net"), "logvar": LogVariance()})
    model.load_state_dict(weights)
    frames = FrameConditioning(**{**RELEASED_FRAMES, **spec["config"]})
    (uniform,), (_, noise) = recorded(run, "numpy_uniform"), recorded(run, "torch_randn")
    draws = RecordedDraws({"augment_sigma": uniform, "augment_noise": noise})
    latent = inputs["gt_latent"]
    B, _, _, H, W = latent.shape
    condition = Condition(
        inputs["crossattn_emb"],
        fps=torch.full((B,), 24.0),
        padding_mask=torch.zeros(B, 1, 16 * H, 16 * W),
        video_cond_bool=spec[FLAG],
    )
    condition = condition_on_frames(
        condition, latent, frames, num_condition_t=spec["num_condition_t"]
    )
    seen: list[Tensor] = []

    def network(x: Tensor, noise_level: Tensor, condition: Condition) -> Tensor:
        seen.append(x)
        return model["net"](x, noise_level, condition)

    x_t, sigma = inputs["noise_x"], torch.full((B,), spec["sigma"])
    with torch.no_grad():
        denoised = denoise(
            network, EDMScaling(), x_t, sigma, condition, frames, draws, model["logvar"]
        )
    actual = {
        "x0": denoised.x0,
        "eps": denoised.eps,
        "logvar": denoised.log_variance,
        "net_in": seen[0],
        "net_x0_pred": denoised.x0_network,
        "x0_pred_replaced": denoised.x0_replaced,
        "xt": seen[0] / EDMScaling()(sigma).c_in.reshape(-1, 1, 1, 1, 1),
    }
    for name, expected in outputs.items():
        compare(actual[name], expected, name)


@handles(("video_cond", "draw"))
def check_draws_of_a_step(run: Run) -> None:
    """Noise from torch, then a uniform from numpy, both under the seed of the run."""
    spec, outputs = run.spec, run.group("output")
    shape = outputs["epsilon"].shape
    uniform = np.random.RandomState(spec["seed"]).uniform(size=shape[0])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(spec["seed"]))
    draws = RecordedDraws({"sigma": torch.from_numpy(uniform), "noise": noise})
    sigma, epsilon = draw_noise(RELEASED_SDE, shape, draws, spec["multiplier"])
    compare(sigma, outputs["sigma"], "sigma")
    compare(epsilon, outputs["epsilon"], "epsilon")


@handles(("video_cond", "p_or_i"))
def check_crop(run: Run) -> None:
    latent, expected = run.group("input")["latent"], run.group("output")["out"]
    length = expected.shape[2]
    generator = torch.Generator().manual_seed(run.spec["seed"])
    start = torch.randint(0, latent.shape[2] - length + 1, (1,), generator=generator)
    window = crop_latent(latent, length, RecordedDraws({"frame_start": start}))
    assert torch.equal(window, expected)
