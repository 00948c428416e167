"""The loop: precision, skipped updates, interruption, finished runs, validation, refusals."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import At, TinyTrainer, changed, tiny_batch, tiny_config, train

from transfer1.config import ConfigError
from transfer1.training.callback import Callback
from transfer1.training.checkpoint_file import read_checkpoint
from transfer1.training.metrics import read_metrics
from transfer1.training.trainer import Trainer


def poison(trainer: Trainer) -> None:
    """Make one entry of one gradient infinite."""
    gradients = [p.grad for p in trainer.state.model.parameters() if p.grad is not None]
    gradients[0].view(-1)[0] = float("inf")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: v.detach().clone() for name, v in trainer.state.model.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_train_on_the_cpu(tmp_path: Path, precision: str) -> None:
    before: dict[str, torch.Tensor] = {}
    start = At("on_train_start", 0, lambda trainer: before.update(weights(trainer)))
    trainer = train(tmp_path, f"model.precision={precision}", callbacks=(start,))
    model = trainer.state.model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, precision)}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    changed = [name for name, value in weights(trainer).items() if not value.equal(before[name])]
    assert changed
    assert all(name.startswith("net.") for name in changed)
    has_masters = {"master" in state for state in trainer.state.optimizer.state.values()}
    assert has_masters == {precision == "bfloat16"}
    assert (tmp_path / "config.yaml").exists()
    assert "saved" in (tmp_path / "stdout.log").read_text()


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    first, again = (train(tmp_path / name) for name in ("first", "again"))
    other = train(tmp_path / "other", "trainer.seed=1")
    assert all(value.equal(weights(again)[name]) for name, value in weights(first).items())
    assert not all(value.equal(weights(other)[name]) for name, value in weights(first).items())


def test_a_non_finite_update_is_skipped_and_counted(tmp_path: Path) -> None:
    seen: list[Any] = []

    def remember(trainer: Trainer) -> None:
        state = trainer.state
        assert state.ema is not None
        seen.append(
            (
                weights(trainer),
                {name: shadow.clone() for name, shadow in state.ema.shadows.items()},
                state.ema.num_updates.item(),
                state.schedule.state_dict(),
                state.optimizer.group["step"].item(),
            )
        )

    trainer = train(
        tmp_path,
        "trainer.max_iter=4",
        callbacks=(
            At("on_after_backward", 2, poison),
            At("on_training_step_end", 2, remember),
            At("on_training_step_end", 3, remember),
        ),
    )
    (model, ema, *counts), (model_after, ema_after, *counts_after) = seen
    assert all(value.equal(model_after[name]) for name, value in model.items())
    assert all(value.equal(ema_after[name]) for name, value in ema.items())
    assert counts == counts_after
    state = trainer.state
    assert (state.iteration, state.skipped, state.skipped_in_a_row) == (4, 1, 0)
    assert state.optimizer.group["step"].item() == 3
    assert "update 3 was skipped" in (tmp_path / "stdout.log").read_text()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 0, 1, 0]
    assert records[2]["grad_norm"] is None
    assert records[2]["lr"] == records[3]["lr"]


def test_a_run_that_only_skips_is_aborted(tmp_path: Path) -> None:
    poisoned = tuple(At("on_after_backward", iteration, poison) for iteration in range(9))
    config = tiny_config(tmp_path, "trainer.max_iter=9", "trainer.max_skipped=3")
    trainer = TinyTrainer(config, *poisoned)
    with pytest.raises(RuntimeError, match="3 updates in a row .* trainer.max_skipped=3"):
        trainer.run()


@pytest.mark.parametrize(
    "override", ["trainer.non_finite=zero", "trainer.callbacks.grad_clip.force_finite=true"]
)
def test_non_finite_entries_can_be_zeroed_instead(tmp_path: Path, override: str) -> None:
    trainer = train(tmp_path, override, callbacks=(At("on_after_backward", 1, poison),))
    assert trainer.state.skipped == 0
    assert trainer.state.optimizer.group["step"].item() == 2
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_clipping_leaves_gradients_unscaled_for_later_hooks(tmp_path: Path) -> None:
    norms: list[float] = []

    class Norm(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            gradients = [p.grad for p in args[0].parameters() if p.grad is not None]
            total = torch.stack([gradient.norm() for gradient in gradients]).norm()
            norms.append((total / self.trainer.gradients.norm).item())
            assert self.trainer.gradients.clip_coef.item() < 1

    train(tmp_path, "trainer.callbacks.grad_clip.clip_norm=1e-3", callbacks=(Norm(),))
    assert norms == pytest.approx([1.0, 1.0])


def test_iterations_count_updates_when_gradients_accumulate(tmp_path: Path) -> None:
    overrides = ("trainer.grad_accum_iter=3", "trainer.max_iter=2", "checkpoint.save_iter=1")
    trainer = train(tmp_path, *overrides)
    assert trainer.state.iteration == 2
    assert trainer.state.samples_seen == 2 * 3 * 2
    assert trainer.state.optimizer.group["step"].item() == 2
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert names == ["iter_000000001.pt", "iter_000000002.pt"]
    assert [r["iteration"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_micro_steps_of_one_update_draw_different_noise(tmp_path: Path) -> None:
    drawn: list[torch.Tensor] = []

    class Watch(Callback):
        def on_training_step_end(self, *args: Any) -> None:
            loss = args[2]
            drawn.append(loss.noisy - loss.latent)

    class SameBatch(TinyTrainer):
        def build_dataloaders(self) -> tuple[Any, Any]:
            return [tiny_batch()], None

    config = tiny_config(tmp_path, "trainer.grad_accum_iter=2", "trainer.max_iter=2")
    assert SameBatch(config, Watch()).run() == 0
    assert len(drawn) == 4
    pairs = itertools.combinations(drawn, 2)
    assert not any(torch.allclose(first, second) for first, second in pairs)


def test_ctrl_c_saves_and_the_same_command_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(trainer: Trainer) -> None:
        if trainer.interrupt.signal is None:  # in the first of two micro-steps
            signal.raise_signal(signal.SIGINT)

    ended: list[str] = []
    end = At("on_train_end", 4, lambda trainer: ended.append("end"))
    config = tiny_config(tmp_path, "trainer.max_iter=4", "trainer.grad_accum_iter=2")
    before = signal.getsignal(signal.SIGINT)
    trainer = TinyTrainer(config, At("on_after_backward", 1, interrupt), end)
    assert trainer.run() == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert "stopping after this update" in capfd.readouterr().err
    assert trainer.checkpointer.latest_iteration() == 2
    assert ended == []
    assert "run the same command again" in (tmp_path / "stdout.log").read_text()

    trainer = TinyTrainer(config, end)
    assert trainer.run() == 0
    assert trainer.state.iteration == 4
    assert ended == ["end"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt_twice(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = TinyTrainer(tiny_config(tmp_path), At("on_after_backward", 0, interrupt_twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.checkpointer.latest() is None


def test_a_run_that_hangs_is_ended(tmp_path: Path) -> None:
    def hang(trainer: Trainer) -> None:
        signal.pause()

    config = tiny_config(tmp_path, "trainer.timeout_period=1")
    trainer = TinyTrainer(config, At("on_training_step_start", 0, hang))
    with pytest.raises(TimeoutError, match="trainer.timeout_period=1"):
        trainer.run()


def test_a_finished_run_prints_its_summary_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(trainer: Trainer) -> None:
        trainer.summary.append("held-out loss 0.5")
        trainer.exit_code = 1

    trainer = TinyTrainer(tiny_config(tmp_path), At("on_train_end", 2, judge))
    assert trainer.run() == 1
    first = capsys.readouterr().out
    assert "held-out loss 0.5" in first
    assert "iter_000000002.pt" in first

    rerun = TinyTrainer(tiny_config(tmp_path))
    assert rerun.run() == 1
    assert not hasattr(rerun, "state")
    second = capsys.readouterr().out
    assert first.strip() in second
    assert "to start afresh, delete" in second

    longer = TinyTrainer(tiny_config(tmp_path, "trainer.max_iter=3"))
    assert longer.run() == 0
    assert longer.state.iteration == 3


def test_a_run_whose_last_callbacks_failed_is_not_finished(tmp_path: Path) -> None:
    def fail(trainer: Trainer) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        TinyTrainer(tiny_config(tmp_path), At("on_train_end", 2, fail)).run()
    ended: list[int] = []
    end = At("on_train_end", 2, lambda trainer: ended.append(trainer.state.iteration))
    train(tmp_path, callbacks=(end,))
    assert ended == [2]


def test_a_timestamp_seed_is_drawn_once(tmp_path: Path) -> None:
    overrides = ("trainer.timestamp_seed=true", "trainer.seed=5")
    seed = train(tmp_path / "a", *overrides).state.seed
    assert seed != 5
    assert read_checkpoint(tmp_path / "a" / "checkpoints" / "iter_000000002.pt")["seed"] == seed
    assert train(tmp_path / "a", *overrides, "trainer.max_iter=3").state.seed == seed
    assert train(tmp_path / "b", *overrides).state.seed != seed


def test_a_name_with_a_timestamp_says_that_it_never_resumes(tmp_path: Path) -> None:
    train(tmp_path / "now", "job.name=run_${now:%Y-%m-%d}_${now:%H-%M-%S}")
    assert "does not resume" in (tmp_path / "now" / "stdout.log").read_text()
    train(tmp_path / "fixed", "job.name=run_7b_2x2")
    assert "does not resume" not in (tmp_path / "fixed" / "stdout.log").read_text()


def test_validation_uses_averaged_weights_and_the_same_draws(tmp_path: Path) -> None:
    class Watch(Callback):
        weights: list[bool]

        def on_validation_start(self, model: Any, loader: Any, iteration: int = 0) -> None:
            shadows = self.trainer.state.ema.shadows
            named = model.named_parameters()
            averaged = [p.equal(shadows[n.replace(".", "-")]) for n, p in named if p.requires_grad]
            self.weights = averaged
            assert not model.training

        def on_validation_end(self, model: Any, iteration: int = 0) -> None:
            assert self.weights
            assert all(self.weights)

    overrides = ("trainer.run_validation=true", "trainer.validation_iter=1", "optimizer.lr=0")
    trainer = train(tmp_path, *overrides, callbacks=(Watch(),))
    assert trainer.state.model.training
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = [record["val_edm_loss"] for record in records if "val_edm_loss" in record]
    assert len(losses) == 3
    assert len(set(losses)) == 1
    only_first = train(tmp_path / "short", *overrides, "trainer.max_val_iter=1")
    records = read_metrics(only_first.job.metrics)
    assert [r["val_edm_loss"] for r in records if "val_edm_loss" in r][0] != losses[0]


def test_the_seed_stays_when_a_job_is_resumed_with_another(tmp_path: Path) -> None:
    train(tmp_path, "trainer.seed=3")
    trainer = train(tmp_path, "trainer.seed=4", "trainer.max_iter=3")
    assert trainer.state.seed == 3
    assert "the seed stays 3" in (tmp_path / "stdout.log").read_text()


def test_other_kernels_on_resume_are_named(tmp_path: Path) -> None:
    def rename(trainer: Trainer) -> None:
        trainer.state.kernels["attention"] = "triton"

    train(tmp_path, callbacks=(At("on_training_step_end", 1, rename),))
    log = tmp_path / "stdout.log"
    assert "attention=reference" in log.read_text()
    train(tmp_path, "trainer.max_iter=3")
    assert "other kernels (attention: triton -> reference)" in log.read_text()


def test_a_loader_without_batches_is_named(tmp_path: Path) -> None:
    class Empty(TinyTrainer):
        def build_dataloaders(self) -> tuple[Any, Any]:
            return [], None

    with pytest.raises(ValueError, match="dataloader_train gives no batch"):
        Empty(tiny_config(tmp_path)).run()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.device=tpu", "choose auto, cuda or cpu"),
        ("checkpoint.save_iter=0", "checkpoint.save_iter=0: give 1 or more"),
        ("trainer.grad_accum_iter=0", "trainer.grad_accum_iter=0: give 1 or more"),
        ("checkpoint.type=null", "ckpt_klass=multi_rank"),
        ("model.precision=float16", "choose float32 or bfloat16"),
        ("model_parallel.tensor_model_parallel_size=2", "2 processes share .* but 1 were started"),
        ("model_parallel.tensor_model_parallel_size=2", "_size=2: .*=ddp .* set fsdp=full"),
        ("model_parallel.context_parallel_size=2", "context_parallel_size=2: .* multiple of 2"),
        ("model_parallel.sequence_parallel=true", "sequence_parallel=True: not built yet"),
        ("model.fsdp_enabled=true", "fsdp_enabled=True: trainer.distributed_parallelism=ddp"),
        ("model.fsdp.policy=size", "policy=size: give block"),
        ("model.fsdp.checkpoint=true", "checkpoint=True: set model.net.activation_checkpoint"),
        ("model.fsdp.sharding_strategy=half", "strategy=half: choose full or hybrid"),
        ("checkpoint.keys_not_to_resume=[weights]", "unknown weights"),
        ("trainer.callbacks.grad_clip.clip_norm=0", "must be positive"),
        ("trainer.callbacks.grad_clip.model_key=net", "model_key='net'"),
        ("trainer.callbacks.low_prec.update_iter=2", "update_iter=2"),
    ],
)
def test_what_this_trainer_cannot_do_is_refused(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_config(tmp_path, override))
    assert not tmp_path.joinpath("stdout.log").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_named(tmp_path: Path) -> None:
    assert Trainer(tiny_config(tmp_path, "trainer.device=auto")).device.type == "cpu"
    with pytest.raises(ConfigError, match="PyTorch finds no CUDA device"):
        Trainer(tiny_config(tmp_path, "trainer.device=cuda"))


class Foreign(Callback):
    """A callback of somebody else: between the optimizer's update and the averages."""

    def __init__(self) -> None:
        self.averages_moved: list[bool] = []

    def on_before_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.trainer.state.ema.num_updates.item()

    def on_before_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self.averages_moved.append(self.trainer.state.ema.num_updates.item() > self.before)


def test_averages_are_part_of_the_step_unless_a_foreign_callback_comes_between(
    tmp_path: Path,
) -> None:
    """Either way the run ends with the same bits, and the log says which way was taken."""
    one = train(tmp_path / "one")
    foreign = Foreign()
    two = train(tmp_path / "two", callbacks=(foreign,))
    assert one.one_pass and not two.one_pass
    assert foreign.averages_moved == [False, False]
    assert "Foreign implements on_before_zero_grad" in two.job.log.read_text()
    for name, shadow in one.state.ema.shadows.items():
        assert torch.equal(shadow, two.state.ema.shadows[name]), name
    assert two.state.ema.num_updates.item() == 2


@pytest.mark.parametrize(
    "options",
    [
        ["model.ema._target_=transfer1.training.ema.build_constant_ema", "model.ema.rate=0.5"],
        ["model.precision=bfloat16", "optimizer.master_remainder=true"],
        [
            "model.precision=bfloat16",
            "optimizer.master_weights=false",
            "optimizer.stochastic_rounding=true",
        ],
    ],
    ids=["constant_ema", "remainder", "stochastic_rounding"],
)
def test_other_ways_to_keep_weights(tmp_path: Path, options: list[str]) -> None:
    """Stopped after one update and resumed, they end where a straight run does."""
    straight = train(tmp_path / "straight", *options)
    train(tmp_path / "parts", *options, "trainer.max_iter=1")
    resumed = train(tmp_path / "parts", *options)
    for name, param in straight.state.model.named_parameters():
        assert torch.equal(param, dict(resumed.state.model.named_parameters())[name]), name
    for name, shadow in straight.state.ema.shadows.items():
        assert torch.equal(shadow, resumed.state.ema.shadows[name]), name


def test_the_groups_reach_the_other_optimizer_and_average(tmp_path: Path) -> None:
    """`optimizer=adamw ema=reg` trains, saves and resumes like any other choice."""
    from tiny import OVERRIDES, composed

    from transfer1.training.ema import ConstantEMA
    from transfer1.training.torch_optimizer import TorchAdamW

    config = composed((*OVERRIDES, "optimizer=adamw", "ema=reg", "model.ema.rate=0.5"))

    def run(folder: Path, max_iter: int) -> TinyTrainer:
        values = {"job": {"path_local": str(folder)}, "trainer": {"max_iter": max_iter}}
        trainer = TinyTrainer(changed(config, values))
        assert trainer.run() == 0
        return trainer

    straight = run(tmp_path / "straight", 2)
    run(tmp_path / "parts", 1)
    resumed = run(tmp_path / "parts", 2)
    assert isinstance(straight.state.optimizer, TorchAdamW)
    assert isinstance(straight.state.ema, ConstantEMA) and not straight.one_pass
    for name, param in straight.state.model.named_parameters():
        assert torch.equal(param, dict(resumed.state.model.named_parameters())[name]), name
    ours = train(tmp_path / "ours")
    for name, param in ours.state.model.named_parameters():
        theirs = dict(straight.state.model.named_parameters())[name]
        torch.testing.assert_close(param, theirs, rtol=1e-4, atol=1e-4)
