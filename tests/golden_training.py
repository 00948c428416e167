"""Checkers of the training step, the training loop and the encoding of hints."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_draws import branch_dropout, count_conditions, named_draws, recorded_values
from goldens import Run, compare, handles
from tiny import changed, composed
from torch import Tensor

from transfer1.config import Config, instantiate
from transfer1.diffusion.edm import NoiseDistribution
from transfer1.sampling.clip import SampleOptions, sample_clip
from transfer1.training.callback import HOOKS, Callback
from transfer1.training.checkpoint import LATEST
from transfer1.training.checkpoint_file import read_checkpoint
from transfer1.training.device import choose_dtype
from transfer1.training.step import (
    HintOptions,
    StepOptions,
    compute_loss,
    encode_hint,
    normalize_pixels,
    read_hints,
)
from transfer1.training.trainer import Trainer

BFLOAT16_TOLERANCE = 0.01


# Configuration of a run -------------------------------------------------------------------------


def compose_run(run: Run, extra: Mapping[str, Any]) -> Config:
    """Our configuration from the original's overrides, which lie with the run or its weights."""
    file = run.file
    if "hydra_overrides" not in file:
        file = run.other("", run.spec["weights_case"]).file
    overrides = [translate(text) for text in file["hydra_overrides"] if text != "--"]
    return changed(composed(tuple(filter(None, overrides))), dict(extra))


def translate(override: str) -> str:
    """An override of the original in our names; empty where the option is gone."""
    key, _, value = override.partition("=")
    if key.endswith(".layer_mask"):
        mask = [word.strip() == "true" for word in value.strip("[]").split(",")]
        return f"{key.removesuffix('layer_mask')}num_control_blocks={mask.index(True)}"
    if key.endswith((".block_x_format", ".use_memory_save", ".use_checkpoint")):
        return ""
    if key == "ckpt_klass":
        return "ckpt_klass=multi_rank"
    return override


def shared_weights(run: Run) -> dict[str, Tensor]:
    """The weights of a run; the log-variance head, stored once, under both of its names."""
    weights = run.weights()
    head = {f"base_model.{name}": v for name, v in weights.items() if name.startswith("logvar.")}
    return {**head, **weights}


# One step ---------------------------------------------------------------------------------------


@handles(("train_step", "train_step"))
def check_train_step(run: Run) -> None:
    """Every intermediate value of a step, the loss and all stored gradients."""
    config = compose_run(run, {"model": {**run.spec["config"], **run.spec["attrs"]}})
    dtype = choose_dtype(config.model.precision)
    model = instantiate(config.model_obj, config=config).train()
    model.load_state_dict(shared_weights(run))
    options = StepOptions.from_config(config.model, dtype)
    batch = run.group("input")
    draws = named_draws(
        recorded_values(run.group("value"), "rng_"),
        model.conditioner,
        options,
        count_conditions(batch, options),
        branch_dropout(config),
        is_clip=options.input_data_key in batch,
    )
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss = compute_loss(model, model.tokenizer, model.conditioner, batch, draws, options)
    loss.total.backward()

    scaling = options.scaling
    c_in = scaling(loss.sigma).c_in.reshape(-1, 1, 1, 1, 1)
    condition, denoised = loss.condition, loss.denoised
    actual = {
        "x0": loss.latent,
        "xt": loss.noisy,
        "sigma": loss.sigma,
        "weights_per_sigma": scaling.loss_weight(loss.sigma),
        "crossattn_emb": condition.context,
        "condition_video_indicator": condition.frame_indicator,
        "condition_video_input_mask": condition.frame_mask,
        "latent_hint": loss.hints[0] if loss.hints else None,
        "net_in": inputs[0],
        "xt_with_condition": inputs[0] / c_in,
        "net_x0_pred": denoised.x0_network,
        "pred_x0": denoised.x0,
        "pred_eps": denoised.eps,
        "logvar": denoised.log_variance,
        "loss": loss.total,
        "edm_loss_mean": loss.terms["edm_loss"],
        "mse_loss": loss.terms["mse_loss"],
    }
    for name, expected in run.group("output").items():
        value = actual[name]
        assert value is not None, f"{name}: there is none"
        compare(value, expected, name)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected_gradients = run.group("grad")
    assert gradients.keys() >= expected_gradients.keys()
    for name, expected in expected_gradients.items():
        compare(gradients[name], expected, f"gradient of {name}")


@handles(("train_step", "sample"))
def check_sample(run: Run) -> None:
    """A whole clip from noise, with guidance, with and without a given frame."""
    spec, inputs = run.spec, run.group("input")
    config = compose_run(run, {})
    model = instantiate(config.model_obj, config=config)
    model.load_state_dict(shared_weights(run))
    options = StepOptions.from_config(config.model, torch.float32)
    batch = run.other(spec["batch"].split()[0]).group("input")
    hints, _ = read_hints(batch, batch[options.hint.hint_key], model.tokenizer, options, draws=None)
    compare(hints[0], inputs["latent_hint"], "hint")
    extra = spec["extra"]
    sampling = SampleOptions(
        num_steps=spec["num_steps"],
        guidance=spec["guidance"],
        seed=spec["seed"],
        augment_sigma=extra.get("condition_video_augment_sigma_in_inference", 0.001),
    )
    given = extra.get("num_condition_t", 0)
    for batched in (True, False):
        latent = sample_clip(
            model,
            batch,
            options,
            dataclasses.replace(sampling, batched=batched),
            inputs["x0"].shape,
            given_latent=inputs["x0"] if given else None,
            num_given=given,
        )
        compare(latent, run.group("output")["samples"], f"samples, batched={batched}")


@handles(("video_cond", "encode_latent"))
def check_encode_latent(run: Run) -> None:
    """Hint pixels to latents, in colour and in grey."""
    inputs = run.group("input")
    if not inputs:  # runs of one batch store it once
        seed = run.spec["batch_seed"]
        same = [name for name, spec in run.file["runs"].items() if spec.get("batch_seed") == seed]
        inputs = next(filter(None, (run.other(name).group("input") for name in same)))
    (name, hint), *others = inputs.items()
    assert not others, f"one hint expected, got {list(inputs)}"
    config = composed(("tokenizer=debug_tokenizer",))
    tokenizer = instantiate(config.model.tokenizer)
    hint_options = HintOptions(name, grayscale=run.spec["grayscale"])
    options = StepOptions(hint_options, NoiseDistribution())
    latent = encode_hint(normalize_pixels(hint, name), tokenizer, options)
    (expected,) = run.group("output").values()
    compare(latent, expected, "latent")


# The loop ---------------------------------------------------------------------------------------


class Recorder(Callback):
    """Writes down every hook with its iteration, and the numbers of every step."""

    def __init__(self) -> None:
        self.hooks: list[tuple[str, int | None]] = []
        self.losses: list[float] = []
        self.edm_losses: list[float] = []
        self.updates: list[tuple[float, float]] = []  # gradient norm, learning rate

    def __getattribute__(self, name: str) -> Any:
        hook = super().__getattribute__(name)
        if name not in HOOKS:
            return hook

        def call(*args: Any) -> None:
            integers = [arg for arg in args if isinstance(arg, int)]
            self.hooks.append((name, integers[-1] if integers else None))
            hook(*args)

        return call

    def on_before_zero_grad(self, *args: Any) -> None:
        gradients = self.trainer.gradients
        self.updates.append((gradients.norm.item(), gradients.lr.item()))

    def on_training_step_end(
        self, model: Any, data: Any, output: Any, loss: Any, i: int = 0
    ) -> None:
        self.losses.append(loss.item())
        self.edm_losses.append(output.terms["edm_loss"].item())


class GoldenTrainer(Trainer):
    """The trainer with recorded batches, weights and draws."""

    def __init__(self, config: Config, run: Run, recorder: Recorder):
        super().__init__(config)
        self.golden = run
        self.callbacks.callbacks.append(recorder)
        recorder.trainer = self
        case, name, group = run.spec["batch"].split("/")
        self.batch = run.other(name, case).group(group)
        self.steps = recorded_steps(run)

    def build_model(self) -> Any:
        model = super().build_model()
        model.load_state_dict(shared_weights(self.golden))
        return model

    def build_dataloaders(self) -> tuple[Any, Any]:
        return [self.batch] * loader_length(self.golden), None

    def draws(self, iteration: int, micro_step: int) -> Any:
        step = iteration * self.config.trainer.grad_accum_iter + micro_step
        return named_draws(
            recorded_values(self.steps, f"step{step}_rng_"),
            self.state.model.conditioner,
            self.options,
            count_conditions(self.batch, self.options),
            branch_dropout(self.config),
        )


def recorded_steps(run: Run) -> dict[str, Tensor]:
    """The draws of a run, or of another one with the same seed and at least as many steps."""
    needed, seed = run.spec["steps"], run.spec["seed"]
    candidates = [run] + [
        run.other(name) for name, spec in run.file["runs"].items() if spec.get("seed") == seed
    ]
    for candidate in candidates:
        values = candidate.group("value")
        if any(name.startswith(f"step{needed - 1}_rng_") for name in values):
            return values
    raise AssertionError(f"{run}: no run of seed {seed} stores the draws of {needed} steps")


def loader_length(run: Run) -> int:
    """Batches after which the loader started over: it was asked twice in a row."""
    taken = 0
    for hook, following in itertools.pairwise(run.spec["hooks"]):
        taken += hook == "on_after_dataloading"
        if hook == following == "on_before_dataloading":
            return taken
    return taken + 1


def is_bfloat16(run: Run) -> bool:
    """Whether all parameters that the run ended with are bfloat16 numbers."""
    parameters = outputs(run, "param").values()
    return all(torch.equal(value.bfloat16().to(value.dtype), value) for value in parameters)


def outputs(run: Run, group: str) -> dict[str, Tensor]:
    prefix = f"{group}/"
    return {
        name.removeprefix(prefix): value
        for name, value in run.group("output").items()
        if name.startswith(prefix)
    }


def save_distance(run: Run) -> int:
    """Micro-steps between periodic saves: those before a step ends; a last save follows anyway."""
    ends = ("on_save_checkpoint", "on_training_step_end")
    hooks = [hook.partition("(")[0] for hook in run.spec["hooks"]]
    pairs = itertools.pairwise(hook for hook in hooks if hook in ends)
    return saved_iterations(run)[0] if ends in pairs else 2**31


def saved_iterations(run: Run) -> list[int]:
    stems = {Path(name).stem for name in run.spec["checkpoint_files"] if name.startswith("iter_")}
    return sorted({int(stem.split("_")[1]) for stem in stems})


@handles(("trainer", "trainer"))
def check_trainer(run: Run) -> None:
    """Losses, learning rates, gradient norms, final parameters and EMA, hooks and checkpoints.

    Iterations of the original are micro-steps, ours are updates.
    """
    spec = run.spec
    micro_steps = spec["grad_accum_iter"]
    low_precision = is_bfloat16(run)
    optimizer = dict(spec["optimizer"])
    clip_norm = optimizer.pop("clip_norm")
    with tempfile.TemporaryDirectory() as folder:
        extra = {
            "model": {
                "precision": "bfloat16" if low_precision else "float32",
                "ema": {"rate": spec["ema_rate"]},
            },
            "optimizer": optimizer,
            "scheduler": spec["scheduler"],
            "checkpoint": {"save_iter": save_distance(run) // micro_steps},
            "job": {"path_local": folder},
            "trainer": {
                "device": "cpu",
                "max_iter": spec["steps"] // micro_steps,
                "grad_accum_iter": micro_steps,
                "run_validation": False,
                "callbacks": {"grad_clip": {"clip_norm": clip_norm}},
            },
        }
        recorder = Recorder()
        trainer = GoldenTrainer(compose_run(run, extra), run, recorder)
        assert trainer.run() == 0
        check_numbers(run, recorder, BFLOAT16_TOLERANCE if low_precision else 2e-5)
        check_weights(run, trainer, BFLOAT16_TOLERANCE if low_precision else 2e-5)
        check_hooks(run, recorder)
        if has_our_layout(run):
            check_files(run, Path(folder) / "checkpoints", micro_steps)


def check_numbers(run: Run, recorder: Recorder, tolerance: float) -> None:
    spec = run.spec

    def numbers(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    norms, rates = numbers(spec["grad_norm_before_clip_and_lr"]).T
    actual_norms, actual_rates = numbers(recorder.updates).T
    compare(numbers(recorder.losses), numbers(spec["losses"]), "losses", tolerance)
    compare(numbers(recorder.edm_losses), numbers(spec["edm_losses"]), "edm losses", tolerance)
    compare(actual_norms, norms, "gradient norms", tolerance)
    compare(actual_rates, rates, "learning rates", 1e-6)


def check_weights(run: Run, trainer: Trainer, tolerance: float) -> None:
    parameters = dict(trainer.state.model.named_parameters())
    for name, expected in outputs(run, "param").items():
        compare(parameters[name], expected, name, tolerance)
    if run.spec["grad_accum_iter"] > 1:
        return  # the original counts micro-steps in the EMA, we count updates
    assert trainer.state.ema is not None
    for name, expected in outputs(run, "ema").items():
        compare(trainer.state.ema.shadows[name], expected, f"EMA of {name}", tolerance)


def check_hooks(run: Run, recorder: Recorder) -> None:
    """The same hooks in the same order; those of checkpoints where the layout is ours.

    When a write succeeds is up to its thread: after its save and before the next one.
    """
    micro_steps = run.spec["grad_accum_iter"]
    expected: list[tuple[str, int | None]] = []
    for hook in run.spec["hooks"]:
        name, _, rest = hook.partition("(")
        expected.append((name, int(rest.rstrip(")")) // micro_steps if rest else None))
    with_iteration = {name for name, iteration in expected if iteration is not None}
    actual = [(name, i if name in with_iteration else None) for name, i in recorder.hooks]

    def keep(name: str) -> bool:
        if name == "on_save_checkpoint_success":
            return False
        return has_our_layout(run) or "checkpoint" not in name

    assert [hook for hook in actual if keep(hook[0])] == [h for h in expected if keep(h[0])]
    saving = [name for name, _ in recorder.hooks if name.startswith("on_save_checkpoint")]
    pairs = ["on_save_checkpoint", "on_save_checkpoint_success"]
    assert saving == pairs * (len(saving) // 2)


def has_our_layout(run: Run) -> bool:
    return not any("_mp_" in name for name in run.spec["checkpoint_files"])


def check_files(run: Run, folder: Path, micro_steps: int) -> None:
    expected = {f"iter_{iteration // micro_steps:09d}.pt" for iteration in saved_iterations(run)}
    assert {path.name for path in folder.iterdir()} == expected | {LATEST}
    contents = run.file.get(f"checkpoint_contents_{run.name}", {})
    for name, content in contents.items():
        if name == LATEST:
            continue
        iteration = content["iteration"] // micro_steps
        actual = read_checkpoint(folder / f"iter_{iteration:09d}.pt")
        assert actual["iteration"] == iteration
        assert actual.keys() >= content.keys()
        assert actual["model"].keys() == content["model"].keys()
        for part in ("model", "ema"):
            names = list(actual["model"][part])
            assert len(names) == content["model"][part]["n_keys"]
            assert set(names) >= set(content["model"][part]["first_keys"])
        record, seen = (
            actual["model"]["trained_data_record"],
            content["model"]["trained_data_record"],
        )
        assert {**record, "iteration": iteration} == {**seen, "iteration": iteration}
        optimizer, reference = actual["optimizer"], content["optimizer"]
        assert len(optimizer["state"]) == reference["state"]["n_keys"]
        group, known = optimizer["param_groups"][0], reference["param_groups"][0]
        assert group.keys() >= known.keys()
        assert actual["scheduler"]["last_epoch"] == content["scheduler"]["last_epoch"]
