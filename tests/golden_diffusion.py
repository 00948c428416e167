"""Golden checkers of the diffusion process, the loss and the sampler."""

from __future__ import annotations

import original
import torch
from goldens import RecordedDraws, Run, compare, handles
from torch import Tensor, nn

from transfer1.diffusion.condition import Condition
from transfer1.diffusion.denoise import denoise
from transfer1.diffusion.edm import EDMScaling, NoiseDistribution, add_noise, seeded_normal
from transfer1.diffusion.loss import edm_loss, loss_mask, sample_weight
from transfer1.diffusion.sampler import noise_levels, sample
from transfer1.model.layers import LogVariance


def shared_values(run: Run, *names: str) -> dict[str, Tensor]:
    """Inputs of the smallest run of kind "values" that holds all of `names`."""
    runs = [name for name, spec in run.file["runs"].items() if spec["kind"] == "values"]
    groups = [run.other(name).group("input") for name in runs]
    return min((group for group in groups if {*names} <= {*group}), key=len)


@handles(("edm", "scaling"))
def check_scaling(run: Run) -> None:
    scaling = EDMScaling(run.spec["sigma_data"])
    sigma = run.group("input")["sigma"]
    actual = {**scaling(sigma)._asdict(), "loss_weight": scaling.loss_weight(sigma)}
    for name, expected in run.group("output").items():
        # Element by element: the coefficients span eight orders of magnitude.
        for index, value in enumerate(expected):
            compare(actual[name][index], value, f"{name}[{index}]", 1e-6)


@handles(("edm", "sde"))
def check_noise_distribution(run: Run) -> None:
    distribution = NoiseDistribution(run.spec["p_mean"], run.spec["p_std"])
    values = run.group("value")
    compare(distribution.sigma(values["u_float64"]), values["sigma"], "sigma", 1e-6)


@handles(("edm", "loss"))
def check_loss(run: Run) -> None:
    """Noising, preconditioning, loss and gradients through a whole network."""
    spec = run.spec
    inputs, weights = run.other(spec["inputs_from"]).group("input"), run.weights()
    model = nn.ModuleDict({"net": original.build("GeneralDIT", spec["init"])})
    model["logvar"] = LogVariance()
    model.load_state_dict(weights)
    scaling = EDMScaling(spec["sigma_data"])
    condition = Condition(
        inputs["crossattn_emb"],
        inputs["crossattn_mask"],
        fps=inputs["fps"],
        padding_mask=inputs["padding_mask"],
    )
    x_t = add_noise(inputs["x0"], inputs["sigma"], inputs["epsilon"])
    denoised = denoise(
        model["net"], scaling, x_t, inputs["sigma"], condition, log_variance=model["logvar"]
    )
    loss = edm_loss(
        inputs["x0"],
        denoised.x0,
        inputs["sigma"],
        scaling=scaling,
        log_variance=denoised.log_variance if spec["loss_add_logvar"] else None,
        reduce=spec["loss_reduce"],
        scale=spec["loss_scale"],
    )
    loss.total.backward()
    assert denoised.log_variance is not None
    actual = {
        "total_loss": loss.total,
        "edm_loss_mean": loss.edm,
        "mse_loss": loss.mse,
        "edm_loss_full": loss.edm_elements,
        "kendall_loss_full": loss.elements,
        "logvar": denoised.log_variance,
        "pred_x0": denoised.x0,
        "pred_eps": denoised.eps,
        "weights_per_sigma": scaling.loss_weight(inputs["sigma"]),
        "weights_per_sample": torch.ones_like(inputs["sigma"]),
        "xt": x_t,
    }
    for name, expected in run.group("output").items():
        compare(actual[name], expected, name)
    parameters = dict(model.named_parameters())
    for name, expected in run.group("grad").items():
        gradient = parameters[name].grad
        assert gradient is not None, f"{name} has no gradient"
        compare(gradient, expected, f"gradient of {name}")


@handles(("edm", "per_sample_weight"))
def check_sample_weight(run: Run) -> None:
    weight = sample_weight(run.group("input"), True, run.spec["camera_weight"])
    assert weight is not None
    compare(weight, run.group("output")["out"], "weight")


@handles(("edm", "loss_mask"))
def check_loss_mask(run: Run) -> None:
    expected = run.group("output")["out"]
    weights = {name: run.spec["cfg"][name] for name in run.spec["order"]}
    mask = loss_mask(run.group("input"), weights, tuple(expected.shape[-2:]))
    compare(mask.squeeze(2), expected, "mask")


@handles(("edm", "rev_ts"))
def check_noise_levels(run: Run) -> None:
    spec = run.spec
    levels = noise_levels(spec["n"], spec["sigma_min"], spec["sigma_max"], spec["rho"])
    expected = run.group("output")["ts_float64"]
    for index, (level, value) in enumerate(zip(levels, expected, strict=True)):
        compare(torch.tensor(level), value, f"level {index}", 1e-6)


@handles(
    ("edm", "sampler"), ("edm", "sampler64"), ("edm", "sampler_trace"), ("edm", "sampler_churn")
)
def check_sampler(run: Run) -> None:
    """Every call of the denoiser (that of Gaussian data), the states and the result."""
    spec, outputs = run.spec, run.group("output")
    shared = shared_values(run, "mu", "noise")
    (expected,) = (outputs[name] for name in outputs if not name.startswith("states"))
    x_t = shared["noise"][: len(expected)].to(expected.dtype) * spec["sigma_max"]
    (variance,) = {
        other["data_std"] ** 2 for other in run.file["runs"].values() if "data_std" in other
    }
    states: list[Tensor] = []
    levels: list[float] = []

    def denoiser(x: Tensor, sigma_B: Tensor) -> Tensor:
        states.append(x)
        levels.append(sigma_B[0].item())
        noise_variance = sigma_B.to(x).reshape(-1, 1, 1, 1, 1) ** 2
        return (variance * x + noise_variance * shared["mu"].to(x)) / (variance + noise_variance)

    noise = run.group("value").get("randn_float64", torch.zeros(0))
    result = sample(
        denoiser,
        x_t,
        num_steps=spec["num_steps"],
        sigma_max=spec["sigma_max"],
        solver=spec["solver"],
        s_churn=spec.get("S_churn", 0.0),
        s_noise=spec.get("S_noise", 1.0),
        draws=RecordedDraws({f"sampler_noise.{step}": draw for step, draw in enumerate(noise)}),
    )
    compare(result, expected, "sample", 1e-6)
    assert len(levels) == spec.get("x0_calls", spec["num_steps"] + 1)
    for index, level in enumerate(spec.get("x0_sigmas", ())):
        compare(torch.tensor(levels[index]), torch.tensor(level), f"sigma {index}", 1e-6)
    for name in outputs:
        if name.startswith("states"):
            compare(torch.stack(states[1:]), outputs[name], "states", 1e-6)


@handles(("edm", "arch_rand"))
def check_seeded_normal(run: Run) -> None:
    expected = run.group("output")["out"]
    assert torch.equal(seeded_normal(run.spec["shape"], run.spec["seed"]), expected)
