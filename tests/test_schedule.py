"""Learning-rate schedules and their driver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from transfer1.training.optimizer import FusedAdamW
from transfer1.training.schedule import (
    LambdaLinear,
    LambdaWarmUpCosine,
    Schedule,
    TeroPoly,
)

ONE_CYCLE: dict[str, Any] = {
    "warm_up_steps": [4],
    "cycle_lengths": [12],
    "f_start": [0.0],
    "f_max": [1.0],
    "f_min": [0.5],
}


def optimizer(lr: float = 0.1) -> FusedAdamW:
    return FusedAdamW([nn.Parameter(torch.zeros(1))], lr=lr)


def test_warm_up_then_decay() -> None:
    linear, cosine = LambdaLinear(**ONE_CYCLE), LambdaWarmUpCosine(**ONE_CYCLE)
    for multiplier in (linear, cosine):
        assert [float(multiplier(n)) for n in (0, 1, 4, 8, 12)] == [0, 0.25, 1, 0.75, 0.5]
    assert float(linear(6)) == 0.875
    assert float(cosine(6)) > 0.875


def test_cycles_follow_each_other() -> None:
    multiplier = LambdaLinear([0, 1], [4, 4], [0.0, 0.2], [1.0, 0.5], [0.0, 0.1])
    # The end of a cycle still belongs to it.
    assert [float(multiplier(n)) for n in (0, 4, 5, 8)] == pytest.approx([1.0, 0.0, 0.5, 0.1])


def test_tensors_and_numbers_give_the_same() -> None:
    multiplier = LambdaLinear(**ONE_CYCLE)
    for n in range(13):
        assert multiplier(torch.tensor(n)) == multiplier(n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f_min": [0.1, 0.2]}, r"one entry per cycle each, got \[1, 1, 1, 1, 2\]"),
        ({"warm_up_steps": [12]}, r"scheduler\.warm_up_steps\[0\]=12"),
    ],
)
def test_wrong_cycles_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LambdaLinear(**{**ONE_CYCLE, **change})


def test_driver_sets_the_rate_of_the_next_update() -> None:
    driven = optimizer()
    schedule = Schedule(driven, LambdaLinear(**ONE_CYCLE))
    rates = []
    for _ in range(6):
        rates.append(driven.group["lr"].item())
        schedule.step()
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.09375])


def test_a_skipped_update_keeps_the_rate() -> None:
    driven = optimizer()
    schedule = Schedule(driven, LambdaLinear(**ONE_CYCLE))
    schedule.step(found_inf=torch.zeros(1))
    rate = driven.group["lr"].clone()
    schedule.step(found_inf=torch.ones(1))
    assert torch.equal(driven.group["lr"], rate)
    assert schedule.state_dict()["last_epoch"] == 1


def test_the_end_is_reported_and_skipped_updates_do_not_count() -> None:
    schedule = Schedule(optimizer(), LambdaLinear(**ONE_CYCLE))
    for _ in range(3):
        schedule.step(found_inf=torch.ones(()))
    for _ in range(12):
        schedule.step(found_inf=torch.zeros(()))
    with pytest.raises(ValueError, match="ends after update 12, update 13 .*cycle_lengths"):
        schedule.step()


def test_resuming_continues_the_rates() -> None:
    straight, resumed = optimizer(), optimizer(lr=0.7)
    schedule = Schedule(straight, LambdaWarmUpCosine(**ONE_CYCLE))
    for _ in range(5):
        schedule.step()
    other = Schedule(resumed, LambdaWarmUpCosine(**ONE_CYCLE))
    other.load_state_dict(schedule.state_dict())
    for _ in range(3):
        assert torch.equal(straight.group["lr"], resumed.group["lr"])
        schedule.step()
        other.step()


def test_state_of_the_original_needs_only_its_position() -> None:
    driven = optimizer()
    schedule = Schedule(driven, LambdaLinear(**ONE_CYCLE))
    schedule.load_state_dict({"last_epoch": 2, "verbose": False, "lr_lambdas": [None]})
    assert driven.group["lr"].item() == pytest.approx(0.05)


def test_inverse_square_root_of_the_samples() -> None:
    multiplier = TeroPoly(total_Mimg=10, batch_size=100, ref_Mimg=0.01)
    assert float(multiplier(100)) == 1.0
    assert float(multiplier(400)) == pytest.approx(0.5)
    assert float(multiplier.at_samples(40_000)) == pytest.approx(0.5)
    assert float(TeroPoly(10, 100, ref_batches=50)(200)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"scheduler\.formula=cubic"):
        TeroPoly(10, 100, formula="cubic")
