"""Moving averages of parameters, on their own and inside the optimizer's pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfer1.training.ema import (
    ConstantEMA,
    PowerEMA,
    build_power_ema,
    power_exponent,
)
from transfer1.training.optimizer import build_optimizer


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None


def test_first_update_copies_and_a_constant_stays() -> None:
    model = network()
    ema = PowerEMA(model)
    with torch.no_grad():
        model[1].weight.fill_(3.0)
    for _ in range(4):
        ema.update()
        assert torch.equal(ema.shadows["1-weight"], model[1].weight)
    assert ema.num_updates.item() == 4


def test_width_of_the_profile_is_the_rate() -> None:
    """The weights that n updates give to past values have the standard deviation rate * n."""
    updates = 400
    model = nn.ParameterList([nn.Parameter(torch.zeros(updates))])
    ema = PowerEMA(model, rate=0.1)
    for step in range(updates):
        model[0].data = torch.eye(updates)[step]
        ema.update()
    profile = ema.shadows["0"].double()
    times = torch.arange(updates, dtype=torch.float64) / updates
    mean = (profile * times).sum()
    deviation = (profile * (times - mean) ** 2).sum().sqrt()
    assert profile.sum().item() == pytest.approx(1.0)
    assert deviation.item() == pytest.approx(0.1, rel=0.01)


def test_only_trainable_parameters_under_their_dashed_names() -> None:
    ema = PowerEMA(network(torch.bfloat16))
    assert sorted(ema.state_dict()) == ["0-weight", "1-bias", "1-weight"]
    assert {shadow.dtype for shadow in ema.shadows.values()} == {torch.float32}
    with pytest.raises(ValueError, match="no trainable parameter"):
        PowerEMA(network().requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_update_equals_the_separate_one(dtype: torch.dtype) -> None:
    """Also for parameters without a gradient, and always from the masters."""
    models = network(dtype), network(dtype)
    optimizers = [build_optimizer(model, lr=1e-3) for model in models]
    fused, separate = (PowerEMA(model) for model in models)
    for seed in range(5):
        for model in models:
            set_gradients(model, seed)
            model[1].bias.grad = None
        optimizers[0].step(ema=fused, found_inf=torch.zeros(1))
        optimizers[1].step()
        separate.update(optimizers[1])
    for name, shadow in fused.shadows.items():
        assert torch.equal(shadow, separate.shadows[name]), name
    assert torch.equal(fused.num_updates, separate.num_updates)
    if dtype == torch.bfloat16:
        rounded = PowerEMA(models[1])
        rounded.load_state_dict(separate.state_dict(), separate.num_updates)
        rounded.update()
        separate.update(optimizers[1])
        assert not torch.equal(rounded.shadows["1-weight"], separate.shadows["1-weight"])


def test_a_skipped_update_leaves_averages_and_counter() -> None:
    model = network()
    optimizer, ema = build_optimizer(model), PowerEMA(model)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step(ema=ema)
    before = {name: shadow.clone() for name, shadow in ema.shadows.items()}
    model[1].bias.grad = None
    model[1].weight.grad.fill_(float("inf"))
    optimizer.step(ema=ema, found_inf=torch.ones(1))
    assert all(torch.equal(ema.shadows[name], before[name]) for name in before)
    assert ema.num_updates.item() == optimizer.group["step"].item() == 2


def test_averages_are_ema_scope_and_out_exactly() -> None:
    model = network(torch.bfloat16)
    ema = PowerEMA(model)
    for shadow in ema.shadows.values():
        shadow.fill_(0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.ema_scope():
        assert torch.equal(model[1].weight, torch.full_like(model[1].weight, 0.3))
        assert torch.equal(model[0].bias, before["0.bias"])
        raise RuntimeError("inside")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_resuming_continues_the_average() -> None:
    model = network()
    optimizer, ema = build_optimizer(model), PowerEMA(model)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step(ema=ema)
    saved = {name: shadow.clone() for name, shadow in ema.state_dict().items()}
    resumed = PowerEMA(model)
    resumed.load_state_dict(saved, ema.num_updates)
    set_gradients(model, 3)
    optimizer.step(ema=ema)
    resumed.update(optimizer)
    for name, shadow in ema.shadows.items():
        assert torch.equal(shadow, resumed.shadows[name]), name
    assert resumed.num_updates.item() == 4


def test_state_of_another_model_is_refused() -> None:
    ema = PowerEMA(network())
    state = ema.state_dict()
    with pytest.raises(ValueError, match=r"missing \['1-bias'\], unexpected \['x'\]"):
        ema.load_state_dict({**{k: v for k, v in state.items() if k != "1-bias"}, "x": state}, 0)
    with pytest.raises(ValueError, match=r"1-bias has shape \(7,\), the parameter \(2,\)"):
        ema.load_state_dict({**state, "1-bias": torch.zeros(7)}, 0)


def test_ranks_have_widths_of_their_own() -> None:
    exponents = [PowerEMA(network(), rate=0.2, num=2, rank=rank).exponent for rank in range(3)]
    assert exponents == [power_exponent(0.2), power_exponent(0.1), power_exponent(0.2)]
    rates = [ConstantEMA(network(), [0.9, 0.99], num=2, rank=rank).rate for rank in range(3)]
    assert rates == [0.9, 0.99, 0.9]


def test_constant_average() -> None:
    model = network()
    ema = ConstantEMA(model, 0.75)
    start = ema.shadows["1-bias"].clone()
    with torch.no_grad():
        model[1].bias.add_(4.0)
    ema.update()
    torch.testing.assert_close(ema.shadows["1-bias"], start + 1.0)


def test_wrong_rates_are_named() -> None:
    for rate in (0.0, -0.1, 1.0):
        with pytest.raises(ValueError, match=r"model\.ema\.rate="):
            PowerEMA(network(), rate)
    with pytest.raises(ValueError, match=r"model\.ema\.rate=1\.0"):
        ConstantEMA(network(), 1.0)


def test_switched_off() -> None:
    assert build_power_ema(network(), enabled=False) is None
    ema = build_power_ema(network(), rate=0.05)
    assert ema is not None and ema.exponent == power_exponent(0.05)
