"""The same work by what one would use instead: callables on the inputs of an op."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Call = Callable[[], Any]
Peer = Callable[[dict[str, Any]], Call]
Average = tuple[Call, list[Tensor]]  # one update, and the averages that it changes


# Optimizer and averages --------------------------------------------------------------------------


def torch_update(inputs: dict[str, Any], **how: bool) -> Call:
    """clip_grad_norm_, torch.optim.AdamW and an average by `torch._foreach_*`, as scripts do it."""
    params = _trainable(inputs)
    optimizer = torch.optim.AdamW(
        params,
        lr=float(inputs["lr"]),
        betas=inputs["betas"],
        eps=inputs["eps"],
        weight_decay=inputs["weight_decay"],
        **how,
    )
    shadows = [param.detach().clone() for param in params]
    beta = float(inputs["ema_beta"])

    def update() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=how.get("foreach", True))
        optimizer.step()
        _average(shadows, params, beta)

    return update


def torch_norm(inputs: dict[str, Any]) -> Call:
    """The norm as `clip_grad_norm_` computes it."""
    return lambda: nn.utils.get_total_norm(inputs["grads"], foreach=True)


def torch_clip(inputs: dict[str, Any]) -> Call:
    """`clip_grad_norm_`: the norm and, in a second pass over the gradients, the scaling."""
    params = [nn.Parameter(torch.empty_like(grad)) for grad in inputs["grads"]]
    for param, grad in zip(params, inputs["grads"], strict=True):
        param.grad = grad.clone()
    return lambda: nn.utils.clip_grad_norm_(params, 1.0, foreach=True)


def foreach_average(inputs: dict[str, Any]) -> Average:
    """`torch._foreach_mul_` and `torch._foreach_add_`."""
    shadows, params, beta = _averaged(inputs)
    return lambda: _average(shadows, params, beta), shadows


def lerp_average(inputs: dict[str, Any]) -> Average:
    """`torch._foreach_lerp_`."""
    shadows, params, beta = _averaged(inputs)
    return lambda: torch._foreach_lerp_(shadows, params, 1 - beta), shadows


def swa_average(inputs: dict[str, Any]) -> Average:
    """PyTorch's `AveragedModel` with its function for exponential averages."""
    shadows, params, beta = _averaged(inputs)
    model = _model(params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(beta))
    averaged.update_parameters(model)  # the first one copies
    own = _fill(averaged.module, shadows)
    return lambda: averaged.update_parameters(model), own


def ema_pytorch_average(inputs: dict[str, Any], use_foreach: bool) -> Average:
    """`EMA` of the package ema-pytorch."""
    from ema_pytorch import EMA

    shadows, params, beta = _averaged(inputs)
    averaged = EMA(
        _model(params),
        beta=beta,
        min_value=beta,  # no warm-up
        update_after_step=0,
        update_every=1,
        use_foreach=use_foreach,
        include_online_model=False,
    )
    for _ in range(3):  # the first ones copy
        averaged.update()
    assert averaged.ema_model is not None
    return averaged.update, _fill(averaged.ema_model, shadows)


def timm_average(inputs: dict[str, Any]) -> Average:
    """`ModelEmaV3` of timm, whose one file is loaded alone: the package wants torchvision."""
    shadows, params, beta = _averaged(inputs)
    model = _model(params)
    averaged = _timm_model_ema().ModelEmaV3(model, decay=beta)
    return lambda: averaged.update(model), _fill(averaged.module, shadows)


AVERAGES: Mapping[str, Callable[[dict[str, Any]], Average]] = {
    "torch foreach": foreach_average,
    "torch lerp": lerp_average,
    "torch swa_utils": swa_average,
    "ema-pytorch": partial(ema_pytorch_average, use_foreach=False),
    "ema-pytorch foreach": partial(ema_pytorch_average, use_foreach=True),
    "timm ModelEmaV3": timm_average,
}
PACKAGES = {"ema-pytorch": "ema_pytorch", "timm": "timm", "diffusers": "diffusers"}


# Transformer blocks: what a model does without fused ops, in the dtype of its activations --------


def modulated_norm(
    x_BLD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    position_LD: Tensor | None = None,
) -> Any:
    """LayerNorm, then scale and shift; with a position that sum too."""
    if position_LD is not None:
        x_BLD = x_BLD + position_LD
    normed = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    modulated = normed * (1 + scale_BD[:, None]) + shift_BD[:, None]
    return modulated if position_LD is None else (x_BLD, modulated)


def residual_modulated_norm(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float
) -> Any:
    """A gated residual, then `modulated_norm`."""
    total = residual(x_BLD, y_BLD, gate_BD)
    return total, modulated_norm(total, shift_BD, scale_BD, eps)


def residual(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, addend_BLD: Tensor | None = None
) -> Tensor:
    """A gated residual and what is added to it."""
    total = x_BLD + gate_BD[:, None] * y_BLD
    return total if addend_BLD is None else total + addend_BLD


def diffusers_norm_rope(inputs: dict[str, Any]) -> Call:
    """RMSNorm of PyTorch and the rotary embedding of diffusers, as its Cosmos networks have it."""
    from diffusers.models.embeddings import apply_rotary_emb

    rope = inputs["rope_2LR"]
    table: Any = None if rope is None else tuple(torch.cat([half, half], dim=-1) for half in rope)

    def norm_rope(x_BLNK: Tensor, weight_K: Tensor) -> Any:
        normed = F.rms_norm(x_BLNK, x_BLNK.shape[-1:], weight_K, inputs["eps"])
        if table is None:
            return normed
        return apply_rotary_emb(normed, table, use_real_unbind_dim=-2, sequence_dim=1)

    return lambda: (
        norm_rope(inputs["q_BLNK"], inputs["q_weight_K"]),
        norm_rope(inputs["k_BMNK"], inputs["k_weight_K"]),
    )


def sdpa(backend: SDPBackend, inputs: dict[str, Any]) -> Call:
    """One of the attention kernels behind `scaled_dot_product_attention`."""

    def attend() -> Tensor:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q_BLNK", "k_BMNK", "v_BMNK"))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def _plain(function: Callable[..., Any], inputs: dict[str, Any]) -> Call:
    return partial(function, **inputs)


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "adamw_step": {
        "torch fused": partial(torch_update, fused=True),
        "torch foreach": partial(torch_update, foreach=True),
        "torch for-loop": partial(torch_update, foreach=False),
    },
    "grad_norm": {"torch foreach": torch_norm, "torch clip_grad_norm_": torch_clip},
    "ema_update": {
        name: lambda inputs, average=average: average(inputs)[0]  # type: ignore[misc]
        for name, average in AVERAGES.items()
    },
    "adaln_modulate": {"torch eager": partial(_plain, modulated_norm)},
    "residual_adaln_modulate": {"torch eager": partial(_plain, residual_modulated_norm)},
    "gated_residual": {"torch eager": partial(_plain, residual)},
    "qk_norm_rope": {"diffusers": diffusers_norm_rope},
    "attention": {
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    },
}
MULTI_TENSOR = ("adamw_step", "grad_norm", "ema_update")


def peers_of(op: str, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Call]:
    """The peers of an op that do the same work on these inputs, ready to be called.

    Left out are packages that are not installed; optimizers and averages in lower precision, for
    which peers keep no float32 numbers; and attention kernels that exist only on a GPU (on a CPU
    the reference is the library's kernel).
    """
    device = next(t.device.type for t in _tensors(inputs))
    chosen = {}
    for name, make in PEERS.get(op, {}).items():
        package = PACKAGES.get(name.split()[0])
        if package and importlib.util.find_spec(package) is None:
            print(f"{op}: the peer {name} is not installed", flush=True)
        elif op in MULTI_TENSOR and dtype != torch.float32:
            continue
        elif op != "attention" or (device == "cuda" and _runs(make(inputs))):
            chosen[name] = make(inputs)
    return chosen


def _runs(call: Call) -> bool:
    """Whether an attention kernel takes these inputs; PyTorch says no with a RuntimeError."""
    try:
        call()
    except RuntimeError as error:
        print(f"attention: a peer refuses: {error}".splitlines()[0], flush=True)
        return False
    return True


def _tensors(inputs: dict[str, Any]) -> list[Tensor]:
    values = (item for v in inputs.values() for item in (v if isinstance(v, list) else [v]))
    return [value for value in values if isinstance(value, Tensor)]


def _trainable(inputs: dict[str, Any]) -> list[nn.Parameter]:
    params = [nn.Parameter(param.clone()) for param in inputs["params"]]
    for param, grad in zip(params, inputs["grads"], strict=True):
        param.grad = grad.clone()
    return params


def _averaged(inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], float]:
    """Own copies of the averages, the parameters, and the weight of the old averages."""
    return copy.deepcopy(inputs["shadows"]), inputs["params"], float(inputs["beta"])


def _average(shadows: list[Tensor], params: list[Any], beta: float) -> None:
    torch._foreach_mul_(shadows, beta)
    torch._foreach_add_(shadows, [param.detach() for param in params], alpha=1 - beta)


def _model(params: list[Tensor]) -> nn.Module:
    """A module whose parameters are these tensors."""
    return nn.ParameterList(nn.Parameter(param, requires_grad=False) for param in params)


def _fill(module: Any, values: list[Tensor]) -> list[Tensor]:
    """Write these values into the parameters of a module, and return those."""
    own = [param.data for param in module.parameters()]
    torch._foreach_copy_(own, values)
    return own


def _timm_model_ema() -> Any:
    package = importlib.util.find_spec("timm")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
