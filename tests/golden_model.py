"""Checkers of the golden runs of networks, blocks, embeddings and heads.

The original has two layouts of tokens, "THWBD" and "BTHWD"; ours has one, [B, L, D]. Runs of either
are checked by transposing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import original
import torch
import torch.nn.functional as F
from goldens import Run, compare, handles
from torch import Tensor, nn

from kernels import select
from transfer1.diffusion.condition import Condition, DataType
from transfer1.model.layers import EPS, Grid, LogVariance
from transfer1.model.position import Rotary, rotary_table

REFERENCE = select("reference")

# Keyword arguments of the original's networks -> fields of the condition.
CONDITION = {
    "crossattn_emb": "context",
    "crossattn_mask": "context_mask",
    "fps": "fps",
    "num_frames": "num_frames",
    "image_size": "image_size",
    "padding_mask": "padding_mask",
    "data_type": "data_type",
    "condition_video_input_mask": "frame_mask",
    "condition_video_augment_sigma": "augment_sigma",
    "condition_video_pose": "pose",
}


class Call:
    """Inputs of a run as leaves, its arguments, and the comparison of outputs and gradients."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inputs = run.group("input")
        for name in run.spec.get("grad_inputs", ()):
            self.inputs[name].requires_grad_()

    def resolve(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("@"):
            return self.inputs[value[1:]]
        if isinstance(value, str) and value.startswith("DataType."):
            return DataType[value.removeprefix("DataType.")]
        if isinstance(value, Mapping):
            return {name: self.resolve(item) for name, item in value.items()}
        return value

    @property
    def args(self) -> list[Any]:
        return [self.resolve(value) for value in self.run.spec.get("args", ())]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.resolve(self.run.spec.get("kwargs_call", {}))

    def gradients(self) -> torch.no_grad | nullcontext[None]:
        return nullcontext() if self.run.spec.get("grad_enabled", True) else torch.no_grad()

    def check(self, outputs: Mapping[str, Tensor], **modules: nn.Module) -> None:
        """Compare outputs, then gradients of inputs and of `<prefix>` modules' parameters."""
        expected = self.run.group("output")
        assert expected.keys() <= outputs.keys(), f"missing {expected.keys() - outputs.keys()}"
        for name, value in expected.items():
            compare(outputs[name], value, name)
        gradients = self.run.group("grad")
        if not gradients:
            return
        parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        leaves = parameters | {f"input.{name}": value for name, value in self.inputs.items()}
        loss = sum(
            (outputs[name] * self.inputs[f"loss_weight.{name}"]).sum()
            for name in self.run.spec.get("loss_outputs", expected)
        )
        loss.backward()
        for name, value in gradients.items():
            gradient = leaves[name].grad
            assert gradient is not None or not value.any(), f"{name} has no gradient"
            compare(
                torch.zeros_like(value) if gradient is None else gradient, value, f"grad {name}"
            )


def load(module: nn.Module, weights: Mapping[str, Tensor], prefix: str = "") -> None:
    """Load strictly, so that names and shapes of both sides are the same."""
    if weights:
        module.load_state_dict({prefix + name: value for name, value in weights.items()})


def build(run: Run, **extra: Any) -> Any:
    spec = run.spec
    module = original.build(spec["cls"], spec["init"], **extra)
    load(module, run.weights() if "weights_from" in spec else run.group("weight"))
    return module


def to_tokens(x: Tensor, layout: str) -> Tensor:
    """[t, h, w, B, D] or [B, t, h, w, D] -> [B, L, D]."""
    assert layout in ("THWBD", "BTHWD"), layout
    return (x.movedim(3, 0) if layout == "THWBD" else x).flatten(1, 3)


def from_tokens(x_BLD: Tensor, shape: Iterable[int], layout: str) -> Tensor:
    """[B, L, D] -> a layout of the original, of the given shape."""
    x = x_BLD.unflatten(1, tuple(shape)[:3] if layout == "THWBD" else tuple(shape)[1:4])
    return x.movedim(0, 3) if layout == "THWBD" else x


@handles("DITBuildingBlock", "GeneralDITTransformerBlock")
def check_block(run: Run) -> None:
    spec, call = run.spec, Call(run)
    layout = spec["init"].get("x_format", "BTHWD")
    block = original.build(spec["cls"], spec["init"])
    prefix = "blocks.0." if spec["cls"] == "DITBuildingBlock" else ""
    load(block, run.weights(), prefix)
    x, emb, context = call.args
    kwargs = call.kwargs
    rope, extra = kwargs.get("rope_emb_L_1_1_D"), kwargs.get("extra_per_block_pos_emb")
    out = block(
        to_tokens(x, layout),
        F.silu(emb),
        context.transpose(0, 1) if layout == "THWBD" else context,
        None if rope is None else table_of(rope),
        kwargs.get("adaln_lora_B_3D"),
        None if extra is None else to_tokens(extra, layout),
    )
    target = block.blocks[0] if prefix else block
    call.check({"out": from_tokens(out, x.shape, layout)}, param=target)


def table_of(angles: Tensor) -> Tensor:
    """Rotary table of the original's angles [L, 1, 1, d], whose halves are equal."""
    first, second = angles.flatten(1).chunk(2, dim=-1)
    assert torch.equal(first, second), "a head's halves turn by the same angles"
    return rotary_table(first)


def condition_of(kwargs: Mapping[str, Any]) -> Condition:
    known = {ours: kwargs[name] for name, ours in CONDITION.items() if name in kwargs}
    return Condition(**{name: value for name, value in known.items() if value is not None})


@handles("GeneralDIT", "VideoExtendGeneralDIT")
def check_network(run: Run) -> None:
    call = Call(run)
    network = build(run)
    if run.kind == "features":
        check_features(run, call, network)
        return
    kwargs = call.kwargs
    unknown = kwargs.keys() - CONDITION.keys() - {"x", "timesteps", "x_ctrl"}
    assert not unknown, f"arguments without a counterpart: {unknown}"
    layout = run.spec["init"].get("block_x_format", "BTHWD")
    residuals = {
        int(name.removeprefix("block")): to_tokens(value, layout)
        for name, value in (kwargs.get("x_ctrl") or {}).items()
    }
    with call.gradients():
        out = network(kwargs["x"], kwargs["timesteps"], condition_of(kwargs), residuals)
        call.check({"out": out}, param=network)


def check_features(run: Run, call: Call, network: nn.Module) -> None:
    inputs, indices = call.inputs, run.spec["feature_indices"]
    out, features = network(
        inputs["x"], inputs["timesteps"], condition_of(inputs), feature_indices=indices
    )
    named = {f"feat{index}": feature for index, feature in zip(indices, features, strict=True)}
    call.check({"out": out, **named})


@handles("GeneralDITEncoder")
def check_control(run: Run) -> None:
    spec, call = run.spec, Call(run)
    encoder = build(run)
    if run.kind == "encode_hint":
        check_encode_hint(run, encoder)
        return
    base_spec = spec["base"]
    base = original.build(base_spec["cls"], base_spec["init"])
    load(base, run.other(base_spec["weights_from"]).weights())
    base.requires_grad_(base_spec.get("trainable", False))

    kwargs = call.kwargs
    hint = kwargs.pop(kwargs["hint_key"])
    unknown = kwargs.keys() - CONDITION.keys() - {"x", "timesteps", "hint_key", "control_weight"}
    assert not unknown, f"arguments without a counterpart: {unknown}"
    x, noise_level, condition = kwargs["x"], kwargs["timesteps"], condition_of(kwargs)
    with call.gradients():
        residuals = None
        if hint is not None:
            weight = kwargs.get("control_weight", 1.0)
            hints = hint.split(len(x))  # several hints are stacked on the batch axis
            keep = run.group("value").get("coin")
            residuals = encoder(x, noise_level, condition, hints, weight, keep)
        out = base(x, noise_level, condition, residuals)
        call.check({"out": out}, param=encoder, base_param=base)


def check_encode_hint(run: Run, encoder: Any) -> None:
    source = Call(run.other(run.spec["inputs_from"]))
    kwargs = source.kwargs
    hint, condition = kwargs[kwargs["hint_key"]], condition_of(kwargs)
    tokens = encoder.encode_hint(hint, condition)
    for name, expected in run.group("output").items():
        assert name.endswith("T_H_W_B_D"), name
        compare(from_tokens(tokens, expected.shape, "THWBD"), expected, name)


@handles(
    "VideoRopePosition3DEmb",
    "VideoRopePositionEmb",
    "LearnablePosEmbAxis",
    "SinCosPosEmbAxis",
    "LearnableEmb3D",
    "SinCosPosEmb",
    "LearnableEmb3D_FPS_Aware",
    "SinCosPosEmb_FPS_Aware",
)
def check_position(run: Run) -> None:
    spec, call = run.spec, Call(run)
    embedder = build(run)
    for name, expected in run.group("value").items():
        compare(getattr(embedder, name), expected, name)
    grid = Grid(*spec["shape"][1:4])
    fps = None if spec["fps"] is None else torch.tensor(spec["fps"])
    out = embedder(grid, fps)
    if isinstance(embedder, Rotary):
        out = torch.cat([out, out], dim=-1)[:, None, None]
    else:
        out = out.unflatten(-2, grid).expand(run.group("output")["out"].shape)
    call.check({"out": out}, param=embedder)


@handles("SDXLTimesteps", "SDXLTimestepEmbedding")
def check_time(run: Run) -> None:
    call = Call(run)
    module = build(run)
    result = module(*call.args)
    if isinstance(result, Tensor):
        outputs = {"out": result}
    else:
        outputs = {f"out{i}": value for i, value in enumerate(result) if value is not None}
    call.check(outputs, param=module)


@handles("PatchEmbed")
def check_patch_embed(run: Run) -> None:
    call = Call(run)
    module = build(run)
    (x,) = call.args
    call.check({"out": module(x).unflatten(1, module.grid(x))}, param=module)


@handles("FinalLayer")
def check_final_layer(run: Run) -> None:
    call = Call(run)
    module = build(run)
    x, emb = call.args  # x is [B * t, h * w, D]
    tokens = x.reshape(len(emb), -1, x.shape[-1])
    out = module(tokens, F.silu(emb), call.kwargs.get("adaln_lora_B_3D"))
    call.check({"out": out.reshape(*x.shape[:2], -1)}, param=module)


@handles(("embed_final", "logvar"))
def check_log_variance(run: Run) -> None:
    call = Call(run)
    weights = run.weights()
    head = LogVariance(weights["1.weight"].shape[1])
    load(head, weights)
    noise_level = call.inputs["c_noise"]
    call.check({"out": head(noise_level), "features": head[0](noise_level)}, param=head)


@handles(("embed_final", "rmsnorm"))
def check_rms_norm(run: Run) -> None:
    call = Call(run)
    x, weight = call.inputs["x"], run.weights()["weight"]
    by_op, _ = REFERENCE.qk_norm_rope(x, x, weight, weight, None, EPS)
    call.check({"out": by_op})
    norm = nn.RMSNorm(x.shape[-1], eps=EPS)  # as on the conditioning vector
    load(norm, run.weights())
    call.check({"out": norm(x)})


@handles(("embed_final", "rope_apply"))
def check_rotation(run: Run) -> None:
    """The op normalises before it rotates; that is multiplied back, rotations keep the norm."""
    call = Call(run)
    x_BLNK = call.inputs["x"].transpose(0, 1)
    ones = torch.ones(x_BLNK.shape[-1])
    table = table_of(call.inputs["freqs"])
    rotated, _ = REFERENCE.qk_norm_rope(x_BLNK, x_BLNK, ones, ones, table, EPS)
    rotated = rotated * (x_BLNK.square().mean(-1, keepdim=True) + EPS).sqrt()
    call.check({"bshd": rotated, "sbhd": rotated.transpose(0, 1)})


@handles(("embed_final", "attention_core"))
def check_attention(run: Run) -> None:
    call = Call(run)
    q, k, v = (call.inputs[name].transpose(0, 1) for name in "qkv")
    call.check({"sbhd": REFERENCE.attention(q, k, v).flatten(2).transpose(0, 1)})
