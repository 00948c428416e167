"""Which recorded draw of the original is which draw of ours."""

from __future__ import annotations

from collections.abc import Mapping

from goldens import RecordedDraws
from torch import Tensor

from transfer1.config import Config
from transfer1.diffusion.condition import BooleanFlag, Conditioner
from transfer1.training.step import StepOptions


def named_draws(
    recorded: list[tuple[str, Tensor]],
    conditioner: Conditioner,
    options: StepOptions,
    conditions: int,
    dropout_ctrl_branch: float | None,
    is_clip: bool = True,
) -> RecordedDraws:
    """Give recorded draws their purposes, by the order in which the original draws.

    Args:
        recorded: source ("torch_randn", ...) and values, in that order.
        conditions: control videos stacked in the hint.
        dropout_ctrl_branch: rate of the coin of the control branch; None where it is not tossed.
        is_clip: the batch holds clips; images have no given frames.
    """
    draws = iter(recorded)
    named: dict[str, Tensor] = {}

    def take(source: str, purpose: str | None) -> Tensor:
        actual, value = next(draws)
        assert actual == source, f"{purpose}: expected a draw of {source}, recorded is {actual}"
        if purpose:
            named[purpose] = value
        return value

    for name, embedder in conditioner.embedders.items():
        flag = isinstance(embedder, BooleanFlag)
        take("torch_bernoulli", name if flag else f"dropout.{name}")
    frames = conditioner.frames if is_clip else None
    if frames and frames.condition_location == "first_random_n":
        take("torch_randint", "num_condition_t")
    if frames and frames.condition_location == "random":
        named["condition_indicator"] = 1 - take("torch_bernoulli", None)  # given where below rate
    rate = options.hint.hint_dropout_rate if options.hint else 0.0
    if conditions > 1 and rate > 0:
        kept = take("torch_rand", "hint_dropout") > rate
        if not kept.any():
            take("torch_randint", "hint_keep")
    take("torch_randn", "noise")
    take("numpy_uniform", "sigma")
    if frames:
        take("torch_randn", None)
        take("numpy_uniform", "augment_sigma")
        take("torch_randn", "augment_noise")
    if dropout_ctrl_branch is not None:
        named["control_branch"] = (take("torch_rand", None) > dropout_ctrl_branch).float()
    rest = [source for source, _ in draws]
    assert not rest, f"draws of the original that have no purpose here: {rest}"
    return RecordedDraws(named)


def recorded_values(values: Mapping[str, Tensor], prefix: str) -> list[tuple[str, Tensor]]:
    """The draws stored as `<prefix>NN_<source>`, in order."""
    names = sorted(name for name in values if name.startswith(prefix))
    return [(name.removeprefix(prefix).split("_", 1)[1], values[name]) for name in names]


def branch_dropout(config: Config) -> float | None:
    return config.model.net_ctrl.dropout_ctrl_branch if config.model.finetune_base_model else None


def count_conditions(batch: Mapping[str, Tensor], options: StepOptions) -> int:
    return batch[options.hint.hint_key].shape[1] // 3 if options.hint else 0
