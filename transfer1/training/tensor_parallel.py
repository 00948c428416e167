"""Tensor parallelism: neighbouring processes share the heads and hidden units of every layer.

Put on a model from outside. Queries, keys, values and the first layer of an MLP are cut by outputs,
what follows them by inputs, so that one sum over the processes ends each sublayer (Shoeybi et al.
2019, "Megatron-LM", section 3). Everything else is computed by all of them alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from kernels import Ops
from transfer1.model.attention import Attention
from transfer1.model.block import MLP


def share_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let the processes of a mesh of one axis share attentions and MLPs, in place."""
    group = mesh.get_group()
    for module in list(model.modules()):
        if isinstance(module, Attention):
            inputs = {f"to_{name}.0": ColwiseParallel() for name in "qkv"}
            parallelize_module(module, mesh, {**inputs, "to_out.0": RowwiseParallel()})
            module.num_heads //= mesh.size()
            module.ops = _with_whole_norms(module.ops, group)
        elif isinstance(module, MLP):
            plan = {"layer1": ColwiseParallel(), "layer2": RowwiseParallel()}
            parallelize_module(module, mesh, plan)


def _with_whole_norms(ops: Ops, group: dist.ProcessGroup) -> Ops:
    """The ops with a norm of queries and keys whose weights learn from the heads of all."""
    qk_norm_rope = ops.qk_norm_rope

    def whole(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> Any:
        q_weight, k_weight = (SumGradients.apply(w, group) for w in (q_weight, k_weight))
        return qk_norm_rope(q, k, q_weight, k_weight, *rest)

    return ops.replaced(qk_norm_rope=whole)


class SumGradients(torch.autograd.Function):
    """A tensor that all processes have, and of which each gives a part of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
