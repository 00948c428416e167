"""Golden checkers of the optimizer, the schedules and the moving averages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from goldens import Run, compare, handles
from torch import Tensor, nn

from kernels import Ops, select
from kernels.launch import interpreting
from transfer1.training.ema import EMA, ConstantEMA, PowerEMA, power_exponent
from transfer1.training.optimizer import FusedAdamW
from transfer1.training.schedule import (
    LambdaLinear,
    LambdaWarmUpCosine,
    Schedule,
    TeroPoly,
)

CYCLES = {
    "LambdaLinearScheduler": LambdaLinear,
    "LambdaWarmUpCosineScheduler": LambdaWarmUpCosine,
}


def backends() -> list[Ops]:
    """The references, and Triton's kernels where they can run."""
    chosen = [select("reference")]
    if interpreting() or torch.cuda.is_available():
        names = ("adamw_step", "ema_update", "grad_norm")
        chosen.append(select("reference", **dict.fromkeys(names, "triton")))
    return chosen


def module_of(tensors: Mapping[str, Tensor], trainable: Iterable[str]) -> nn.Module:
    """A module tree whose parameters have the given dotted names and values."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(leaf, nn.Parameter(tensor.clone(), name in trainable))
    return root


def set_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, param in module.named_parameters():
            param.copy_(values[name])


# --- adamw


@handles(("adamw", "adam"), ("adamw", "adam_derived"))
def check_adamw(run: Run) -> None:
    """Every step of every parameter, the final moments, masters and layout of the state."""
    for ops in backends():
        check_adamw_steps(run, ops)


def check_adamw_steps(run: Run, ops: Ops) -> None:
    spec, inputs, outputs = run.spec, run.group("input"), run.group("output")
    hyper = dict(spec["hyper"], betas=tuple(spec["hyper"]["betas"]))
    hyper["weight_decay"] = spec.get("wd", hyper["weight_decay"])
    names = [key.removeprefix("param/") for key in inputs if key.startswith("param/")]
    params = {name: nn.Parameter(inputs[f"param/{name}"]) for name in names}
    optimizer = FusedAdamW(
        params.items(),
        bias_correction=spec.get("bias_correction", True),
        adam_w_mode=bool(spec.get("mode", 1)),
        ops=ops,
        **hyper,
    )
    for step, lr in enumerate(spec["lrs"]):
        optimizer.group["lr"].fill_(lr)
        for name, param in params.items():
            param.grad = inputs[f"grad/{name}"][step].clone()
        optimizer.step()
        for name, param in params.items():
            expected = outputs[f"float64_trajectory/{name}"][step]
            compare(optimizer.master(param), expected, f"{name} after step {step + 1}", 1e-6)

    for name, param in params.items():
        moments = optimizer.state[param]
        actual = {
            "float64_exp_avg": moments["exp_avg"],
            "float64_exp_avg_sq": moments["exp_avg_sq"],
            "fusedadam_exp_avg": moments["exp_avg"],
            "fusedadam_exp_avg_sq": moments["exp_avg_sq"],
            "fusedadam_master": optimizer.master(param),
        }
        for group, tensor in actual.items():
            if f"{group}/{name}" in outputs:
                compare(tensor, outputs[f"{group}/{name}"], f"{group}/{name}")
        for group in ("fusedadam_param", "bf16_param_after"):
            if f"{group}/{name}" in outputs:
                # One rounding of the parameter's own precision.
                tolerance = max(1e-6, torch.finfo(param.dtype).eps)
                compare(param, outputs[f"{group}/{name}"], f"{group}/{name}", tolerance)

    layout = run.file.get(f"{run.name}_optimizer_state_dict")
    if layout:
        state = optimizer.state_dict()
        for index, keys in layout["state_keys"].items():
            assert set(keys) == set(state["state"][int(index)]) - {"master", "step"}
        for expected, group in zip(layout["param_groups"], state["param_groups"], strict=True):
            for key, value in expected.items():
                found = group[key]
                if isinstance(found, Tensor):
                    found = f"{found.dtype}{list(found.shape)}"
                assert found == (tuple(value) if key == "betas" else value), key


# --- schedulers


@handles(("schedulers", "sched"))
def check_multiplier(run: Run) -> None:
    """The multiplier at every recorded n, from plain numbers and from tensors."""
    multiplier = CYCLES[run.spec["cls"]](**run.spec["cfg"])
    expected = run.group("output")["factor_float64"]
    numbers = run.group("input")["n"]
    for convert in (int, torch.as_tensor):
        compare(torch.stack([multiplier(convert(n)) for n in numbers]), expected, "factor", 1e-6)


@handles(("schedulers", "sched_tero"))
def check_tero(run: Run) -> None:
    multiplier = TeroPoly(**run.spec["cfg"])
    samples = run.group("input")["sample_counter"]
    factors = torch.stack([multiplier.at_samples(count) for count in samples])
    compare(factors, run.group("output")["factor_float64"], "factor", 1e-6)


@handles(("schedulers", "sched_lr"))
def check_schedule(run: Run) -> None:
    """The learning rate that is in force during each update."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = FusedAdamW([parameter], lr=run.spec["base_lr"])
    schedule = Schedule(optimizer, LambdaLinear(**run.spec["cfg"]))
    expected = run.group("output")["lr_float64"]
    rates = []
    for _ in expected:
        rates.append(optimizer.group["lr"].double())
        parameter.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    compare(torch.stack(rates), expected, "lr", 1e-6)


# --- moving averages


def trajectory(run: Run) -> dict[str, Tensor]:
    """Source parameters over time, [updates + 1, ...] each."""
    (name,) = [name for name, spec in run.file["runs"].items() if spec["kind"] == "ema_traj"]
    return run.other(name).group("input")


def row(values: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in values.items()}


def check_updates(run: Run, ema: EMA, model: nn.Module, source: Mapping[str, Tensor]) -> None:
    outputs = run.group("output")
    recorded = {int(key.split("/")[0].removeprefix("after")) for key in outputs}
    for update in range(1, max(recorded) + 1):
        set_parameters(model, row(source, update))
        ema.update()
        if update in recorded:
            for name, shadow in ema.state_dict().items():
                compare(shadow, outputs[f"after{update}/{name}"], f"{name} after {update}", 1e-6)


@handles(("ema", "ema_beta"))
def check_beta(run: Run) -> None:
    values = run.group("value")
    exponent = torch.tensor([power_exponent(run.spec["s"])], dtype=torch.float64)
    compare(exponent, values["exp_float64"], "exponent", 1e-6)
    ema = PowerEMA(module_of({"w": torch.zeros(1)}, ["w"]), run.spec["s"], num=1)
    betas = []
    for iteration in values["iterations"]:
        ema.num_updates.fill_(int(iteration))
        betas.append(ema.beta())
    compare(torch.stack(betas), values["beta_float64"], "beta", 1e-6)


@handles(("ema", "ema_track"))
def check_tracker(run: Run) -> None:
    for ops in backends():
        check_tracker_updates(run, ops)


def check_tracker_updates(run: Run, ops: Ops) -> None:
    source = trajectory(run)
    trainable = [key.replace("-", ".") for key in run.spec["state_keys"]]
    model = module_of(row(source, 0), trainable)
    kind, _, rate = run.spec["tracker"].partition("_")
    if kind == "power":
        ema: EMA = PowerEMA(model, float(rate.removeprefix("s")), ops=ops)
    else:
        ema = ConstantEMA(model, 0.9999 if rate == "default" else float(rate), ops=ops)
    assert sorted(ema.state_dict()) == sorted(run.spec["state_keys"])
    check_updates(run, ema, model, source)


@handles(("ema", "ema_track_resume"))
def check_resumed_tracker(run: Run) -> None:
    """The name of the run ends in the iteration at which it starts."""
    source = trajectory(run)
    trainable = {key.split("/")[1].replace("-", ".") for key in run.group("output")}
    model = module_of(row(source, 0), trainable)
    ema = PowerEMA(model, run.spec["s"])
    (start,) = re.findall(r"from(\d+)$", run.name)
    ema.load_state_dict(ema.state_dict(), int(start))
    check_updates(run, ema, model, source)


@handles(("ema", "ema_fast"), ("ema", "ema_fast_bf16"))
def check_ema_update(run: Run) -> None:
    """All parameters pairwise with a given beta, over the whole trajectory or up to `src_last`."""
    source, inputs, outputs = trajectory(run), run.group("input"), run.group("output")
    shadows = {name: tensor[0].clone() for name, tensor in source.items()}
    last = {key.removeprefix("src_last/"): tensor for key, tensor in inputs.items()}
    updates = len(next(iter(source.values()))) - 1
    if last:
        source = {name: tensor.to(last[name].dtype) for name, tensor in source.items()}
        updates = next(
            index
            for index in range(updates + 1)
            if all(torch.equal(source[name][index], last[name]) for name in last)
        )
    for ops in backends():
        averages = {name: shadow.clone() for name, shadow in shadows.items()}
        for update in range(1, updates + 1):
            params = [source[name][update] for name in averages]
            ops.ema_update(list(averages.values()), params, run.spec["beta"])
        for name, expected in outputs.items():
            compare(averages[name], expected, name, 1e-6)


@handles(("ema", "ema_cache"))
def check_swap(run: Run) -> None:
    """Averages in the model inside the block, the exact old values after it, the rest untouched."""
    states: dict[str, dict[str, Tensor]] = {"before": {}, "mid": {}}
    for key, tensor in run.group("value").items():
        moment, _, name = key.partition("/")
        states.setdefault(moment, {})[name] = tensor
    before, mid = states["before"], states["mid"]
    trainable = [name for name in before if not torch.equal(before[name], mid[name])]
    model = module_of(mid, trainable)
    ema = PowerEMA(model)
    set_parameters(model, before)
    with ema.ema_scope():
        for name, param in model.named_parameters():
            assert torch.equal(param, mid[name]), name
    for name, param in model.named_parameters():
        assert torch.equal(param, states.get("after", before)[name]), name
