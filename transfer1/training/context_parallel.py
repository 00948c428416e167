"""Context parallelism: neighbouring processes share a clip, each takes some of its latent frames.

Put on a model from outside. The networks see the frames of their process; queries meet the keys and
values of all frames, which self-attention gathers (the all-gather variant of sequence parallelism;
Liu et al. 2023, "Ring Attention", passes the same tensors around in a ring instead). The prediction
is gathered too, so that every process of a group computes the same, whole loss. Gradients of the
parameters are then averaged over all processes, as without.

Letters: B batch, C channels, T H W latent frames/rows/columns, L tokens of this process, N heads,
K head size, P processes that share a clip.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import Ops
from transfer1.diffusion.condition import Condition
from transfer1.model.backbone import Backbone
from transfer1.model.block import SelfAttention
from transfer1.model.control import resize_weight_map, weights_per_hint
from transfer1.model.layers import Grid
from transfer1.model.transfer import Transfer

FRAMES, TOKENS = 2, 1  # axes of [B, C, T, H, W] and of [B, L, N, K]


def share_frames(model: Transfer, group: dist.ProcessGroup) -> None:
    """Let the processes of a group share the latent frames of every clip, in place.

    Frames come in the order of ranks, as many for each. A latent of a single frame is not shared:
    every process works on the whole of it.
    """
    frames = FrameShard(dist.get_rank(group), dist.get_world_size(group), group)
    for network in (model.base, model.net):
        if network is not None:
            _share(network, frames)
    if model.net is not None:
        model.net.register_forward_pre_hook(frames.cut_inputs, with_kwargs=False)
    model.base.register_forward_pre_hook(frames.cut_inputs, with_kwargs=False)
    model.base.register_forward_hook(frames.gather_output)


def _share(network: Backbone, frames: FrameShard) -> None:
    for embedder in (network.pos_embedder, network.extra_pos_embedder):
        if embedder is not None:
            _cut_positions(embedder, frames)
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.attn.ops = _gathering(module.attn.ops, frames)


def _cut_positions(embedder: nn.Module, frames: FrameShard) -> None:
    """Positions are those of all frames, of which the process takes its own."""
    forward = embedder.forward

    def shard(grid: Grid, fps_B: Tensor | None = None) -> Tensor:
        if not frames.shares:
            return forward(grid, fps_B)
        whole = forward(grid._replace(t=grid.t * frames.size), fps_B)
        return frames.cut(whole, whole.ndim - 2)

    embedder.forward = shard


def _gathering(ops: Ops, frames: FrameShard) -> Ops:
    """The ops with an attention whose keys and values are those of all frames."""
    attention = ops.attention

    def gathered(q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
        if frames.shares:
            k_BLNK, v_BLNK = (GatherTokens.apply(x, frames.group) for x in (k_BLNK, v_BLNK))
        return attention(q_BLNK, k_BLNK, v_BLNK)

    return ops.replaced(attention=gathered)


class FrameShard:
    """The frames of this process.

    Attributes:
        rank: which part.
        size: number P of parts.
        group: the processes that have the others.
        shares: whether the clip that is being computed is cut.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.shares = True

    def cut(self, whole: Tensor, axis: int) -> Tensor:
        """This process's part of a tensor along an axis."""
        length = whole.shape[axis] // self.size
        return whole.narrow(axis, self.rank * length, length)

    def cut_inputs(self, network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of a network with the frames of this process.

        Raises:
            ValueError: the frames cannot be shared out evenly.
        """
        assert isinstance(network, Backbone)
        x_BCTHW, noise_level_B, condition, *rest = inputs
        T = x_BCTHW.shape[FRAMES]
        self.shares = T > 1
        if not self.shares:
            return inputs
        if T % (self.size * network.patch_temporal):
            raise ValueError(
                f"model_parallel.context_parallel_size={self.size}: a latent of {T} frames cannot "
                f"be shared out evenly; give a divisor of {T // network.patch_temporal}"
            )
        if isinstance(rest[0], list):  # of the control branch: hints and their weights
            hints, weights, keep = rest
            grid = network.x_embedder.grid(x_BCTHW)
            rest = [
                [self.cut(hint, FRAMES) for hint in hints],
                [self._cut_weight(w, x_BCTHW, grid) for w in weights_per_hint(weights, len(hints))],
                keep,
            ]
        return self.cut(x_BCTHW, FRAMES), noise_level_B, self._cut_condition(condition), *rest

    def gather_output(self, network: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The prediction of all frames."""
        return GatherFrames.apply(output, self.group) if self.shares else output

    def _cut_condition(self, condition: Condition) -> Condition:
        """What the networks read of a condition frame by frame."""
        framewise = {"frame_mask": condition.frame_mask, "pose": condition.pose}
        cut = {k: self.cut(v, FRAMES) for k, v in framewise.items() if v is not None}
        return dataclasses.replace(condition, **cut)  # type: ignore[arg-type]

    def _cut_weight(self, weight: float | Tensor, x_BCTHW: Tensor, grid: Grid) -> float | Tensor:
        if not isinstance(weight, Tensor) or weight.ndim < 5:
            return weight
        latent = Grid(*x_BCTHW.shape[FRAMES:])
        return self.cut(resize_weight_map(weight.to(x_BCTHW), latent, grid), FRAMES)


def _all_gather(part: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:
    """The parts of all processes one after the other along an axis."""
    size = dist.get_world_size(group)
    parts = part.new_empty(size, *part.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), part.contiguous(), group=group)
    return parts.movedim(0, axis).flatten(axis, axis + 1)


class GatherTokens(torch.autograd.Function):
    """Keys or values [B, L, N, K] of all processes, [B, P*L, N, K].

    What each process does with them is its own: gradients add up.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(part, group, TOKENS)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        by_owner = gradient.unflatten(TOKENS, (size, -1)).movedim(TOKENS, 0).contiguous()
        own = torch.empty_like(by_owner[0])
        dist.reduce_scatter_tensor(own, by_owner.flatten(0, 1), group=ctx.group)
        return own, None


class GatherFrames(torch.autograd.Function):
    """Predictions [B, C, T/P, H, W] of all processes, [B, C, T, H, W].

    Every process computes the same loss of them, so its part of the gradient is already complete.
    It is multiplied by P because parameters then get the mean over P processes where, each having
    its own frames, it is the sum that counts.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(part, group, FRAMES)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return gradient.chunk(size, FRAMES)[rank] * size, None
