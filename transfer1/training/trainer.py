"""The training loop.

`Trainer(config).run()` reads as a run goes: build, load, loop over updates, save, report. What an
update computes is in `step.py`, what resume needs in `state.py`, the files are in `job.py` and
`checkpoint.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from kernels import Ops
from transfer1.config import Config, ConfigError, check_values, instantiate, to_yaml
from transfer1.diffusion.draws import Draws
from transfer1.model.transfer import Transfer

from .callback import Batch, CallBackGroup, build_callbacks, implements
from .device import (
    choose_device,
    choose_dtype,
    refuse_parallelism,
    set_backend_flags,
    sharing_sample,
    to_device,
)
from .gradients import Gradients, SkipCounter
from .interrupt import Interrupt
from .job import JobFolder
from .metrics import Metrics
from .parallel import average_terms, distribute, parallel_loss
from .processes import Processes
from .profiling import profiling_callbacks
from .schedule import Schedule
from .state import TrainState
from .step import Loss, StepOptions, compute_loss

VALIDATION = -1  # "iteration" of the draws of a validation, so that each one uses the same


class Trainer:
    """One run, from configuration to exit code.

    Attributes that callbacks may use, all set before `on_train_start`:
        config, job (`JobFolder`), device, dtype, max_iter, ops (the chosen kernels), options
        (`StepOptions`), dataloader_train, dataloader_val, metrics (`Metrics`);
        state (`TrainState`: model, optimizer, schedule, ema, iteration, seed, ...);
        gradients (`Gradients` of the current update);
        summary (lines to print at the end) and exit_code, which callbacks may change.

    Args:
        config: what `compose` returns.

    Raises:
        ConfigError: the configuration asks for a device that is not here, for several processes, or
            for a value that no run can have.
    """

    state: TrainState
    options: StepOptions
    gradients: Gradients
    dataloader_train: Any
    dataloader_val: Any

    def __init__(self, config: Config):
        check_values(config)
        refuse_parallelism(config)
        if config.checkpoint.type is None:
            raise ConfigError("checkpoint.type is not set: choose ckpt_klass=multi_rank")
        self.config = config
        self.processes = Processes.from_environment(sharing_sample(config))
        writes = self.processes.is_main
        self.job = JobFolder(config.job.path_local, config.job.name, writes)
        self.device = choose_device(config.trainer.device)
        self.dtype = choose_dtype(config.model.precision)
        self.max_iter = config.trainer.max_iter
        self.metrics = Metrics(self.job.metrics, config.trainer.logging_iter, writes)
        callbacks = build_callbacks(config.trainer.callbacks)
        callbacks += [self.metrics, *profiling_callbacks(config, self._profile_folder())]
        self.callbacks = CallBackGroup(callbacks, self)
        self.checkpointer = instantiate(
            config.checkpoint.type,
            config=config.checkpoint,
            folder=self.job.checkpoints,
            callbacks=self.callbacks,
            processes=self.processes,
        )
        self.summary: list[str] = []
        self.exit_code = 0

    def run(self) -> int:
        """Train to `trainer.max_iter`, going on where an earlier start of the same job stopped.

        Returns:
            0, or what a callback set as `exit_code`. After Ctrl-C 130 and after SIGTERM 143: the
            run is saved and the same command resumes it. A finished run prints its summary and
            returns its code again.
        """
        sharded = self.config.trainer.distributed_parallelism == "fsdp"
        with self.processes.connected(self.device, alone=sharded):
            return self._run()

    def _run(self) -> int:
        summary = self.processes.from_main(self.job.read_summary())
        if summary and summary["iteration"] >= self.max_iter:
            return self._report(summary, finished_before=True)
        with self.job.logging(), Interrupt(self.config.trainer.timeout_period) as self.interrupt:
            try:
                self.build()
                self.load()
                finished = self.train()
            finally:
                self.callbacks.on_app_end()
            if not finished:
                logger.warning(
                    f"interrupted after iteration {self.state.iteration}, everything is saved: run "
                    "the same command again to go on"
                )
                return self.interrupt.exit_code
        summary = self._summarize()
        self.job.write_summary(summary)
        return self._report(summary)

    def build(self) -> None:
        """Build the model (under the seed of the job), loaders, optimizer, schedule and EMA."""
        config = self.config
        set_backend_flags(config, self.device)
        self.job.create(to_yaml(config))
        seed = self.config.trainer.seed
        if self.processes.is_main:
            seed = self.job.first_seed(seed, config.trainer.timestamp_seed)
        seed = self.processes.from_main(seed)
        logger.info(f"job {self.job.path}, {self.device}, {config.model.precision}, seed {seed}")
        if self.processes.size > 1:
            logger.info(
                f"{self.processes.size} processes, {config.trainer.distributed_parallelism}"
            )
        self.ops: Ops = instantiate(config.kernels, device=self.device.type)
        table = ", ".join(f"{op}={backend}" for op, backend in self.ops.table.items())
        logger.info(f"kernels: {table}")

        torch.manual_seed(seed)
        model = self.build_model()
        distribute(config, self.processes, model)
        self.options = StepOptions.from_config(config.model, self.dtype)
        self.dataloader_train, self.dataloader_val = self.build_dataloaders()
        self.callbacks.on_optimizer_init_start()
        optimizer = instantiate(config.optimizer, model=model, ops=self.ops)
        self.state = TrainState(
            model=model,
            optimizer=optimizer,
            schedule=Schedule(optimizer, instantiate(config.scheduler)),
            ema=instantiate(config.model.ema, model=model, rank=0, ops=self.ops),
            seed=seed,
            kernels={op: str(backend) for op, backend in self.ops.table.items()},
        )
        self.gradients = Gradients(optimizer, self.ops)
        self.parallel_loss = parallel_loss(
            config, self.processes, model, lambda *args: self.compute_loss(*args)
        )
        self.one_pass = self._takes_one_pass()
        self.skips = SkipCounter(self.state, config.trainer.max_skipped)
        self.callbacks.on_optimizer_init_end()

    def build_model(self) -> Transfer:
        """Build the model on the device, its parameters in the precision of the run.

        Buffers (rotary positions, frequencies) stay in float32 whatever the precision.
        """
        model = instantiate(self.config.model_obj, config=self.config, ops=self.ops)
        if self.config.model.lora is not None:
            instantiate(self.config.model.lora, model=model)
        memory_format = getattr(torch, self.config.trainer.memory_format.removeprefix("torch."))
        model.to(device=self.device, memory_format=memory_format)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return model.train()

    def build_dataloaders(self) -> tuple[Any, Any]:
        """Build the loaders of the training and, where it is configured, the validation data."""
        config = self.config
        return instantiate(config.dataloader_train), instantiate(config.dataloader_val)

    def load(self) -> None:
        """Resume the job, or start from `checkpoint.load_path`, or from scratch."""
        started_with = self.state.seed
        if self.checkpointer.load(self.state) is None:
            logger.info(f"starting from scratch in {self.job.path}")
            if self.job.has_timestamp:
                logger.warning(
                    f"job.name={self.job.name} holds a timestamp: another start of this command "
                    "gets a folder of its own and does not resume; set a fixed job.name to resume"
                )
        elif self.state.seed != started_with:
            logger.warning(
                f"the seed stays {self.state.seed}, as saved; {started_with} is for new jobs"
            )

    def train(self) -> bool:
        """Loop until `max_iter` updates are done or a signal asks to stop; save.

        Returns:
            whether the run is finished.
        """
        state, options = self.state, self.config.trainer
        self.callbacks.on_train_start(state.model, state.iteration)
        if options.run_validation and state.iteration == 0:
            self.validate()
        self._saved_at = state.iteration
        micro_step = 0
        batches = self.batches()
        while micro_step or not self._stops():
            batch = next(batches)
            if state.iteration >= self.max_iter:
                break
            self.training_step(batch, micro_step)
            micro_step = (micro_step + 1) % options.grad_accum_iter
            if micro_step:
                continue
            if options.run_validation and state.iteration % options.validation_iter == 0:
                self.validate()
            self.checkpointer.poll()
            self.interrupt.alive()
        finished = state.iteration >= self.max_iter
        self.skips.settle()
        if self._saved_at != state.iteration:
            self.save()
        if finished:
            self.callbacks.on_train_end(state.model, state.iteration)
        self.checkpointer.wait()
        return finished

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end, from the sample at which the state stands.

        Raises:
            ValueError: the loader gives nothing.
        """
        loader, state = self.dataloader_train, self.state
        starts = self.processes.start_stream(loader, state.seed, state.samples_seen)
        if state.samples_seen and not starts:
            logger.warning("the sampler of dataloader_train has no start(): the data starts over")
        iterator = iter(loader)
        while True:
            self.callbacks.on_before_dataloading(state.iteration)
            batch = next(iterator, None)
            if batch is None:  # a finite loader starts over
                iterator = iter(loader)
                self.callbacks.on_before_dataloading(state.iteration)
                batch = next(iterator, None)
            if batch is None:
                raise ValueError(
                    "dataloader_train gives no batch: the data set holds too few clips"
                )
            self.callbacks.on_after_dataloading(state.iteration)
            yield batch

    def training_step(self, batch: Batch, micro_step: int) -> None:
        """Differentiate the loss of one batch; the last micro-step of an update applies it."""
        state, iteration, callbacks = self.state, self.state.iteration, self.callbacks
        micro_steps = self.config.trainer.grad_accum_iter
        data = to_device(batch, self.device)
        callbacks.on_training_step_start(state.model, data, iteration)
        with self.parallel_loss.last_backward(micro_step == micro_steps - 1):
            loss = self.parallel_loss(data, self.draws(iteration, micro_step))
            callbacks.on_before_backward(state.model, loss.total, iteration)
            (loss.total / micro_steps).backward()
        callbacks.on_after_backward(state.model, iteration)
        samples = len(loss.latent) * self.processes.replicas
        state.count_samples(samples, loss.condition.data_type)
        loss = average_terms(loss, self.processes)
        if micro_step == micro_steps - 1:
            self.update()
            if state.iteration % self.config.checkpoint.save_iter == 0:
                self.skips.settle()
                self.save()
        total = loss.total.detach()
        callbacks.on_training_step_end(state.model, data, loss, total, state.iteration)

    def update(self) -> None:
        """Apply the accumulated gradients, or skip the update if one of them is not finite."""
        state, gradients = self.state, self.gradients
        gradients.measure()
        if self.config.trainer.non_finite == "zero":
            gradients.make_finite()
        arguments = (state.model, state.optimizer, state.schedule, state.iteration)
        self.callbacks.on_before_optimizer_step(*arguments)
        state.optimizer.step(
            found_inf=gradients.found_inf,
            clip_coef=gradients.clip_coef,
            ema=state.ema if self.one_pass else None,
        )
        state.schedule.step(gradients.found_inf)
        self.callbacks.on_before_zero_grad(*arguments)
        if state.ema and not self.one_pass:
            state.ema.update(state.optimizer, gradients.found_inf)
        state.optimizer.zero_grad(set_to_none=True)
        state.iteration += 1
        self.skips.note(gradients.found_inf, state.iteration)

    def compute_loss(self, batch: Batch, draws: Draws) -> Loss:
        """The loss of one batch on the device, with the model as it is."""
        model: Any = self.state.model
        return compute_loss(model, model.tokenizer, model.conditioner, batch, draws, self.options)

    def draws(self, iteration: int, micro_step: int) -> Draws:
        """The random draws of one micro-step; those of a validation are for a whole batch."""
        batch_size = getattr(self.dataloader_train, "batch_size", None)
        samples = None if iteration == VALIDATION else self.processes.samples(batch_size)
        return Draws(self.state.seed, iteration, micro_step, samples)

    def save(self) -> None:
        """Save a checkpoint of this iteration."""
        self.checkpointer.save(self.state)
        self._saved_at = self.state.iteration

    @torch.no_grad()
    def validate(self) -> None:
        """Mean losses over the validation data, with EMA weights and the same draws each time."""
        if self.dataloader_val is None:
            return
        state, model, callbacks = self.state, self.state.model, self.callbacks
        sums: dict[str, torch.Tensor] = {}
        count = 0
        model.eval()
        with state.ema.ema_scope() if state.ema else nullcontext():
            callbacks.on_validation_start(model, self.dataloader_val, state.iteration)
            for count, batch in enumerate(self.dataloader_val, start=1):
                data = to_device(batch, self.device)
                callbacks.on_validation_step_start(model, data, state.iteration)
                loss = self.compute_loss(data, self.draws(VALIDATION, count))
                sums = {name: value + sums.get(name, 0) for name, value in loss.terms.items()}
                callbacks.on_validation_step_end(model, data, loss, loss.total, state.iteration)
                if count == self.config.trainer.max_val_iter:
                    break
            callbacks.on_validation_end(model, state.iteration)
        model.train()
        means = {f"val_{name}": (value / count).item() for name, value in sums.items()}
        self.metrics.write(state.iteration, means)
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        logger.info(f"validation after iteration {state.iteration}: {numbers}")

    def _stops(self) -> bool:
        """Whether a signal asked any of the processes to stop."""
        self.interrupt.signal = self.processes.largest(self.interrupt.signal or 0) or None
        return self.interrupt.signal is not None

    def _profile_folder(self) -> Path:
        folder = self.job.profile
        return folder if self.processes.is_main else folder / f"rank_{self.processes.rank}"

    def _takes_one_pass(self) -> bool:
        """Whether the optimizer updates the averages too; callbacks of others may need them apart.

        A hook `on_before_zero_grad` may change parameters, and the original averages after it.
        """
        if self.state.ema is None or not self.state.optimizer.fuses_ema:
            return False
        foreign = [
            type(callback).__qualname__
            for callback in self.callbacks.callbacks
            if implements(callback, "on_before_zero_grad")
            and not type(callback).__module__.startswith("transfer1.")
        ]
        if foreign:
            logger.info(
                f"averages take a pass of their own: {', '.join(foreign)} implements "
                "on_before_zero_grad, which comes between optimizer and EMA"
            )
        return not foreign

    def _summarize(self) -> dict[str, Any]:
        state = self.state
        loss = self.metrics.latest.get("loss")
        lines = [
            f"trained {state.iteration} iterations, {state.samples_seen} samples"
            + (f", last loss {loss:.4f}" if loss is not None else "")
            + (f", {state.skipped} updates skipped" if state.skipped else ""),
            f"checkpoint  {self.checkpointer.latest()}",
            f"metrics     {self.job.metrics}",
            *self.summary,
        ]
        return {"iteration": state.iteration, "exit_code": self.exit_code, "lines": lines}

    def _report(self, summary: dict[str, Any], finished_before: bool = False) -> int:
        if self.processes.is_main:
            if finished_before:
                print(f"{self.job.path} is finished; its summary:")
            print("\n".join(summary["lines"]))
            if finished_before:
                print(
                    f"to start afresh, delete {self.job.path} or give the run another job.name; "
                    f"to train on, set trainer.max_iter above {summary['iteration']}"
                )
            sys.stdout.flush()
        # Nobody leaves before that is printed: torchrun ends all when one exits with an error.
        return self.processes.from_main(summary["exit_code"])
