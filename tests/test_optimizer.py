"""The fused AdamW: arithmetic, skipped updates, masters and its state."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.adamw import adamw_step, grad_norm
from transfer1.training.optimizer import FusedAdamW, build_optimizer, clip_coefficient

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-10, "weight_decay": 0.1}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def set_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def everything(model: nn.Module, optimizer: FusedAdamW) -> list[Tensor]:
    """Copies of all tensors that a step may change, parameters first."""
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors = [*model.parameters(), *states, optimizer.group["step"], optimizer.group["lr"]]
    return [tensor.detach().clone() for tensor in tensors]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
def test_a_hundred_steps_equal_those_of_torch(decoupled: bool) -> None:
    ours, theirs = network(), network()
    optimizer = FusedAdamW(ours.parameters(), adam_w_mode=decoupled, **HYPER)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs.parameters(), **HYPER)
    for seed in range(100):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
    assert optimizer.group["step"].item() == 100


def test_scale_and_clipping_multiply_the_gradients_and_leave_them() -> None:
    ours, theirs = network(), network()
    optimizer = FusedAdamW(ours.parameters(), **HYPER)
    reference = FusedAdamW(theirs.parameters(), **HYPER)
    for seed in range(3):
        set_gradients(ours, seed, scale=8.0)
        set_gradients(theirs, seed, scale=8.0 * 0.25 * 0.5)
        before = [param.grad.clone() for param in ours.parameters()]
        optimizer.step(grad_scale=torch.tensor([0.25]), clip_coef=torch.tensor(0.5))
        reference.step()
        assert equal([param.grad for param in ours.parameters()], before)
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_nothing(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    set_gradients(model, 0)
    optimizer.step(found_inf=torch.zeros(1))
    before = everything(model, optimizer)
    set_gradients(model, 1)
    next(model.parameters()).grad.fill_(float("nan"))
    optimizer.step(found_inf=torch.ones(1))
    assert equal(everything(model, optimizer), before)
    set_gradients(model, 1)
    optimizer.step(found_inf=torch.zeros((), dtype=torch.int32))
    assert not equal(everything(model, optimizer), before)
    assert optimizer.group["step"].item() == 2


def test_masters_collect_updates_below_the_precision_of_the_parameter() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = FusedAdamW([param], lr=1e-4, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.0)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        optimizer.step()
    torch.testing.assert_close(optimizer.master(param), torch.full((4,), 0.99))
    assert torch.equal(param, optimizer.master(param).bfloat16())
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


def test_low_precision_without_masters_is_refused() -> None:
    model = network(torch.bfloat16)
    optimizer = FusedAdamW(model.parameters(), master_weights=False)
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=r"params\[0\] .*bfloat16.*optimizer\.master_weights=True"):
        optimizer.step()


def test_only_parameters_with_gradients_have_state() -> None:
    model = network()
    optimizer = build_optimizer(model)
    set_gradients(model, 0)
    last = model[2].weight
    last.grad = None
    before = last.detach().clone()
    optimizer.step()
    assert last not in optimizer.state
    assert torch.equal(last, before)
    assert optimizer.master(last) is last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = build_optimizer(model, **HYPER)
    optimizer.group["lr"].fill_(0.02)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = network(dtype)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer = build_optimizer(resumed, lr=0.5, weight_decay=0.0)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        for instance, its_optimizer in ((model, optimizer), (resumed, resumed_optimizer)):
            set_gradients(instance, seed)
            its_optimizer.step()
    assert equal(everything(resumed, resumed_optimizer), everything(model, optimizer))


def test_state_of_the_original_has_no_masters() -> None:
    """They are taken from the parameters; betas may be any sequence."""
    model = network(torch.bfloat16)
    optimizer = build_optimizer(model, **HYPER)
    set_gradients(model, 0)
    optimizer.step()
    state: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["param_names"]
    state["param_groups"][0]["betas"] = [0.9, 0.99]
    for tensors in state["state"].values():
        del tensors["master"]
    other = copy.deepcopy(model)
    resumed = build_optimizer(other)
    resumed.load_state_dict(state)
    for param in other.parameters():
        assert torch.equal(resumed.master(param), param.float())
        assert resumed.master(param).dtype == torch.float32
    assert resumed.group["betas"] == (0.9, 0.99)
    assert resumed.group["step"].item() == 1


def test_loading_copies() -> None:
    model = network()
    optimizer = build_optimizer(model)
    set_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    saved = copy.deepcopy(state)
    other = network()
    resumed = build_optimizer(other)
    resumed.load_state_dict(state)
    set_gradients(other, 1)
    resumed.step()
    assert torch.equal(state["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


def test_state_of_another_model_is_refused() -> None:
    model = network()
    optimizer = build_optimizer(model)
    set_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    larger = nn.Sequential(*network(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="holds 6 parameters, the model trains 8"):
        build_optimizer(larger).load_state_dict(state)
    renamed = nn.ModuleDict(dict(zip("abc", network(), strict=True)))
    with pytest.raises(ValueError, match=r"number 0 is '0\.weight' there and 'a\.weight' here"):
        build_optimizer(renamed).load_state_dict(state)
    state["state"][1]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 has shape \(2,\)"):
        build_optimizer(network()).load_state_dict(state)


def test_matrices_come_first_and_all_decay() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = build_optimizer(model, **HYPER)
    names = ["0.weight", "2.weight", "1.weight", "1.bias", "2.bias"]
    assert optimizer.group["param_names"] == names
    for param in model.parameters():
        param.data.fill_(1.0)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        expected = torch.full_like(param, 1 - 1e-2 * 0.1 if name in names else 1.0)
        torch.testing.assert_close(param.detach(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"optimizer\.lr=-1"),
        ({"weight_decay": -0.1}, r"optimizer\.weight_decay"),
        ({"eps": 0.0}, r"optimizer\.eps=0\.0: must be positive"),
        ({"betas": (0.9, 1.0)}, r"optimizer\.betas"),
        ({"capturable": False}, r"optimizer\.capturable"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(network(), **options)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build_optimizer(network().requires_grad_(False))


def test_no_bias_correction() -> None:
    param, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
    options = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 0.0, "weight_decay": 0.0, "step": 1}
    adamw_step([param], [torch.ones(1)], [m], [v], [None], None, bias_correction=False, **options)
    torch.testing.assert_close(param, torch.tensor([1 - 0.1 * 0.5 / 0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_clip_coefficient(dtype: torch.dtype) -> None:
    gradients = [torch.randn(shape).to(dtype) for shape in ((300, 7), (5,), ())]
    norm = grad_norm(gradients)
    flat = torch.cat([gradient.double().flatten() for gradient in gradients])
    torch.testing.assert_close(norm, flat.norm().float())
    torch.testing.assert_close(clip_coefficient(norm, 1.0), 1 / (norm + 1e-6))
    assert clip_coefficient(norm, 1e4) == 1.0
    gradients[1][2] = float("inf")
    assert not grad_norm(gradients).isfinite()
    assert grad_norm([]) == 0
