"""FusedAdamW in the place of torch.optim.AdamW and apex's FusedAdam: states, groups, hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_cases import needs_interpreter
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import kernels
from transfer1.training.ema import ConstantEMA, update_average
from transfer1.training.optimizer import FusedAdamW
from transfer1.training.torch_optimizer import TorchAdamW, build_adamw

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def steps(model: nn.Module, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()


def assert_close(first: nn.Module, second: nn.Module) -> None:
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-6, msg=name)


# States ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_states_move_from_torch_to_ours_and_back(fused: bool, groups: int) -> None:
    def grouped(model: nn.Module) -> list[dict[str, Any]]:
        params = list(model.parameters())
        return [{"params": params}] if groups == 1 else [
            {"params": params[:2], "lr": 3e-3}, {"params": params[2:], "weight_decay": 0.0}
        ]  # fmt: skip

    straight, moving = network(), network()
    reference = torch.optim.AdamW(grouped(straight), fused=fused, **HYPER)
    steps(straight, reference, range(9))

    first = torch.optim.AdamW(grouped(moving), fused=fused, **HYPER)
    steps(moving, first, range(3))
    ours = FusedAdamW(grouped(moving), lr=0.7)
    ours.load_state_dict(first.state_dict())
    assert [group["step"].item() for group in ours.param_groups] == [3] * groups
    steps(moving, ours, range(3, 6))
    last = torch.optim.AdamW(grouped(moving), lr=0.7, fused=fused)
    last.load_state_dict(copy.deepcopy(ours.state_dict()))
    steps(moving, last, range(6, 9))
    assert_close(moving, straight)


def test_a_state_with_options_that_we_lack_is_refused() -> None:
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    set_gradients(model, 0)
    theirs.step()
    with pytest.raises(ValueError, match=r"optimizer\.amsgrad=True: FusedAdamW only knows"):
        FusedAdamW(model.parameters()).load_state_dict(theirs.state_dict())


def test_steps_that_differ_within_a_group_are_refused() -> None:
    model = network()
    theirs = torch.optim.AdamW(model.parameters())
    set_gradients(model, 0)
    model[0].bias.grad = None
    theirs.step()
    set_gradients(model, 1)
    theirs.step()
    with pytest.raises(ValueError, match=r"counts \[1, 2\] steps for parameters of one group"):
        FusedAdamW(model.parameters()).load_state_dict(theirs.state_dict())


def test_the_number_of_groups_must_fit() -> None:
    model = network()
    state = FusedAdamW(model.parameters()).state_dict()
    params = list(model.parameters())
    two = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}])
    with pytest.raises(ValueError, match="holds 1 groups, this optimizer 2"):
        two.load_state_dict(state)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = network(torch.bfloat16)
    optimizer = FusedAdamW(model.parameters(), master_remainder=True)
    steps(model, optimizer, range(2))
    before = copy.deepcopy((optimizer.state_dict(), dict(model.named_parameters())))
    wrong = copy.deepcopy(before[0])
    wrong["state"][0]["master"] += 1.0
    wrong["state"][5]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match="exp_avg of parameter 5"):
        optimizer.load_state_dict(wrong)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[1][name])
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["master"], before[0]["state"][i]["master"]) for i in after)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_checkpoints_do_not_tell_masters_from_remainders(before: bool, after: bool) -> None:
    """A run saved with float32 masters goes on with remainders, and back, to the same weights."""
    straight, moving = network(torch.bfloat16), network(torch.bfloat16)
    reference = FusedAdamW(straight.parameters(), **HYPER)
    steps(straight, reference, range(8))
    first = FusedAdamW(moving.parameters(), master_remainder=before, **HYPER)
    steps(moving, first, range(4))
    state = copy.deepcopy(first.state_dict())
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq", "master", "step"}
    assert state["state"][0]["master"].dtype == torch.float32
    second = FusedAdamW(moving.parameters(), master_remainder=after, **HYPER)
    second.load_state_dict(state)
    steps(moving, second, range(4, 8))
    for ours, theirs in zip(moving.parameters(), straight.parameters(), strict=True):
        assert torch.equal(second.master(ours), reference.master(theirs))
        assert ("remainder" in second.state[ours]) == after


def test_masters_are_saved_bit_for_bit_whatever_the_parameter_dtype() -> None:
    """torch's own loading would cast them to bfloat16."""
    model = network(torch.bfloat16)
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    steps(model, optimizer, range(3))
    resumed = FusedAdamW(model.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param in model.parameters():
        assert torch.equal(resumed.master(param), optimizer.master(param))
        assert resumed.state[param]["exp_avg"].dtype == torch.float32


# What torch.optim.Optimizer promises -------------------------------------------------------------


def test_groups_have_options_of_their_own() -> None:
    ours, theirs = network(), network()

    def grouped(model: nn.Module) -> list[dict[str, Any]]:
        params = list(model.parameters())
        return [
            {"params": params[:2], "lr": 5e-3, "weight_decay": 0.0},
            {"params": params[2:4], "betas": (0.5, 0.9), "eps": 1e-3},
        ]

    optimizers = [FusedAdamW(grouped(ours), **HYPER), torch.optim.AdamW(grouped(theirs), **HYPER)]
    for optimizer, model in zip(optimizers, (ours, theirs), strict=True):
        optimizer.add_param_group({"params": list(model.parameters())[4:], "lr": 1e-3})
        steps(model, optimizer, range(5))
    assert_close(ours, theirs)


def test_a_wrong_group_is_not_added() -> None:
    model = network()
    optimizer = FusedAdamW(list(model.parameters())[:1])
    with pytest.raises(ValueError, match=r"optimizer\.betas=\(0\.9, 1\.5\)"):
        optimizer.add_param_group({"params": [model[0].bias], "betas": (0.9, 1.5)})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"several devices \(parameter 0 on cpu, parameter 1 on"):
        FusedAdamW([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: LambdaLR(optimizer, lambda n: 0.5**n),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=4),
    ],
)
def test_schedulers_of_torch(schedule: Callable[[Any], Any]) -> None:
    ours, theirs = network(), network()
    optimizers = [
        FusedAdamW(ours.parameters(), **HYPER), torch.optim.AdamW(theirs.parameters(), **HYPER)
    ]  # fmt: skip
    schedules = [schedule(optimizer) for optimizer in optimizers]
    for seed in range(4):
        for model, optimizer, driver in zip((ours, theirs), optimizers, schedules, strict=True):
            steps(model, optimizer, range(seed, seed + 1))
            driver.step()
    assert isinstance(optimizers[0].param_groups[0]["lr"], Tensor), "it stays on the device"
    assert schedules[0].get_last_lr()[0] == pytest.approx(schedules[1].get_last_lr()[0])
    assert_close(ours, theirs)


def test_a_learning_rate_may_be_assigned() -> None:
    model = network()
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    before = model[0].weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    steps(model, optimizer, range(1))
    assert torch.equal(model[0].weight, before)


def test_a_closure_is_evaluated_with_gradients() -> None:
    model = network()
    optimizer = FusedAdamW(model.parameters(), **HYPER)
    x = torch.ones(2, 7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_hooks_are_called() -> None:
    model = network()
    optimizer = FusedAdamW(model.parameters())
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    steps(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before step", "after step", "before save", "before load", "after load"]


def test_a_hook_may_replace_the_loaded_state() -> None:
    model = network()
    optimizer = FusedAdamW(model.parameters())
    steps(model, optimizer, range(1))
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(
        lambda _, loaded: {**loaded, "state": {0: loaded["state"][0]}}
    )
    optimizer.load_state_dict(state)
    assert len(optimizer.state) == 1


def test_gradients_may_be_kept_as_zeros() -> None:
    """As apex's `set_grad_none=False`; captured graphs need addresses that stay."""
    model = network()
    for set_grad_none in (True, False):
        optimizer = FusedAdamW(model.parameters(), set_grad_none=set_grad_none)
        set_gradients(model, 0)
        optimizer.zero_grad()
        assert (model[0].weight.grad is None) == set_grad_none
    optimizer.zero_grad(set_to_none=True)
    assert model[0].weight.grad is None


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = FusedAdamW(table.parameters(), **HYPER)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"grads\[0\] has layout torch.sparse_coo.*SparseAdam"):
        optimizer.step()
    assert optimizer.group["step"].item() == 0 and not optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_options_that_we_lack_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{name}=True: FusedAdamW only knows"):
        FusedAdamW(network().parameters(), **{name: True})


def test_arguments_of_both_originals_are_taken() -> None:
    params = list(network().parameters())
    FusedAdamW(
        params, 1e-3, (0.9, 0.99), 1e-8, 0.01, False, maximize=False, foreach=True, fused=None
    )
    FusedAdamW(params, lr=1e-3, bias_correction=True, betas=(0.9, 0.99), eps=1e-8,
               adam_w_mode=True, weight_decay=0.0, amsgrad=False, set_grad_none=True,
               capturable=True, master_weights=True)  # fmt: skip


def test_a_copy_goes_on_alone() -> None:
    model = network()
    optimizer = FusedAdamW(model.parameters(), adam_w_mode=False, **HYPER)
    steps(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    steps(model, optimizer, range(2, 4))
    steps(twin, twin_optimizer, range(2, 4))
    assert_close(model, twin)
    assert twin_optimizer.adam_w_mode is False and twin_optimizer.ops is optimizer.ops


def test_the_scaler_of_torch_skips_and_scales() -> None:
    """`found_inf` counts even where there is no scale left to undo."""
    ours, theirs = network(), network()
    optimizers = [
        FusedAdamW(ours.parameters(), **HYPER),
        torch.optim.AdamW(theirs.parameters(), fused=True, **HYPER),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for seed in range(4):
            optimizer.zero_grad()
            x = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
            scaler.scale(model(x).square().mean()).backward()
            if seed == 1:
                model[0].weight.grad[0, 0] = float("inf")
            if seed == 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_close(ours, theirs)
    assert optimizers[0].group["step"].item() == 3


# Precision options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stochastic_rounding": True},
            "works without masters: set optimizer.master_weights=False",
        ),
        ({"master_remainder": True, "master_weights": False}, "master_weights=False"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedAdamW(network().parameters(), **options)


def test_half_precision_without_masters_names_no_way_that_it_lacks() -> None:
    model = network(torch.float16)
    optimizer = FusedAdamW(model.parameters(), master_weights=False, stochastic_rounding=True)
    set_gradients(model, 0)
    with pytest.raises(ValueError, match=r"float16 .*set optimizer\.master_weights=True$"):
        optimizer.step()


def test_stochastic_rounding_moves_weights_that_nearest_would_keep() -> None:
    """An update of a tenth of the spacing of bfloat16 is lost by rounding to nearest."""
    param = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = FusedAdamW(
        [param], lr=2**-8 / 10, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0,
        master_weights=False, stochastic_rounding=True,
    )  # fmt: skip
    for _ in range(10):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.double().mean().item() == pytest.approx(1 - 2**-8, abs=2e-4)
    assert optimizer.master(param) is param


def test_stochastic_rounding_is_the_same_after_a_resume() -> None:
    straight, moving = network(torch.bfloat16), network(torch.bfloat16)
    options = {"master_weights": False, "stochastic_rounding": True, "rounding_seed": 5, **HYPER}
    steps(straight, FusedAdamW(straight.parameters(), **options), range(6))
    first = FusedAdamW(moving.parameters(), **options)
    steps(moving, first, range(3))
    second = FusedAdamW(moving.parameters(), **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(moving, second, range(3, 6))
    for ours, theirs in zip(moving.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@needs_interpreter
@pytest.mark.parametrize("options", [{}, {"master_remainder": True}])
def test_a_training_with_triton_kernels_ends_where_the_reference_does(
    options: dict[str, bool],
) -> None:
    finals = []
    for backend in ("reference", "triton"):
        ops = kernels.select("reference", adamw_step=backend, ema_update=backend)
        model = network(torch.bfloat16)
        optimizer = FusedAdamW(model.parameters(), ops=ops, **options, **HYPER)
        ema = ConstantEMA(model, 0.9, ops=ops)
        for seed in range(10):
            set_gradients(model, seed)
            model[1].bias.grad = None
            optimizer.step(ema=ema, found_inf=torch.tensor(seed == 4), clip_coef=torch.tensor(0.5))
        finals.append([*map(optimizer.master, model.parameters()), *ema.shadows.values()])
        assert optimizer.group["step"].item() == ema.num_updates.item() == 9
    for ours, theirs in zip(*finals, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# Shards ------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    """A group of one process: shards, placements and redistribution are real, neighbours absent."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_are_updated_and_averaged_in_place(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    plain, sharded = network(), network()
    for module in sharded:
        for name, param in list(module.named_parameters()):
            shard = distribute_tensor(param.detach(), mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(shard))
    optimizers = [FusedAdamW(model.parameters(), **HYPER) for model in (plain, sharded)]
    averages = [ConstantEMA(model, 0.5) for model in (plain, sharded)]
    for seed in range(3):
        set_gradients(plain, seed)
        for param, grad in zip(sharded.parameters(), plain.parameters(), strict=True):
            placement = [Replicate()] if seed == 1 else [Shard(0)]
            param.grad = distribute_tensor(grad.grad, mesh, placement)
        for optimizer, ema in zip(optimizers, averages, strict=True):
            optimizer.step(ema=ema)
    for one, two in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert isinstance(two, DTensor)
        assert isinstance(optimizers[1].state[two]["exp_avg"], DTensor)
        assert torch.equal(two.full_tensor(), one)
    for name, shadow in averages[0].shadows.items():
        assert torch.equal(averages[1].shadows[name].full_tensor(), shadow)
    saved = optimizers[1].state_dict()
    optimizers[1].load_state_dict(saved)
    target = copy.deepcopy(sharded)
    update_average(sharded, target, 0.25)
    assert torch.equal(target[0].weight.full_tensor(), plain[0].weight)


def test_the_average_of_two_models() -> None:
    source, target = network(), network()
    with torch.no_grad():
        source[0].bias.add_(1.0)
    expected = target[0].bias + 0.75
    update_average(source, target, 0.25)
    torch.testing.assert_close(target[0].bias, expected)
    with pytest.raises(ValueError, match=r"only one of them has \['2.bias', '2.weight'\]"):
        update_average(source, target[:2], 0.25)
    with pytest.raises(ValueError, match=r"shadows\[0\] .*bfloat16"):
        update_average(source, network(torch.bfloat16), 0.25)


# PyTorch's own -----------------------------------------------------------------------------------


def test_torch_s_optimizer_behind_our_interface() -> None:
    ours, theirs = network(), network()
    optimizers = [FusedAdamW(ours.named_parameters(), **HYPER), build_adamw(theirs, **HYPER)]
    averages = [ConstantEMA(model, 0.9) for model in (ours, theirs)]
    assert isinstance(optimizers[1], TorchAdamW) and not optimizers[1].fuses_ema
    for seed in range(5):
        found_inf = torch.tensor(int(seed == 2), dtype=torch.int32)
        for model, optimizer, ema in zip((ours, theirs), optimizers, averages, strict=True):
            set_gradients(model, seed)
            optimizer.step(
                grad_scale=torch.tensor(0.5), clip_coef=torch.tensor([0.3]), found_inf=found_inf,
                ema=ema,
            )  # fmt: skip
    assert_close(ours, theirs)
    for name, shadow in averages[0].shadows.items():
        torch.testing.assert_close(averages[1].shadows[name], shadow, rtol=1e-5, atol=2e-6)
    assert averages[1].num_updates.item() == 4
    assert optimizers[1].master(theirs[0].weight) is theirs[0].weight


def test_torch_s_optimizer_keeps_no_masters() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is torch.bfloat16.*optimizer=fusedadamw"):
        build_adamw(network(torch.bfloat16))


def test_one_pass_needs_both_ops_on_one_backend() -> None:
    params = list(network().parameters())
    assert FusedAdamW(params, ops=kernels.select("reference")).fuses_ema
    assert not FusedAdamW(params, ops=kernels.select("reference", ema_update="compile")).fuses_ema
