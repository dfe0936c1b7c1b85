"""Parameter groups, and the learning rate as the training loop drives it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from config import ConfigError, OptimizerConfig, PretrainConfig, ScheduleConfig, load_config
from optim import create_optimizer, parameter_groups
from scheduler import create_scheduler, epoch_time, iteration_time

GOLDEN = Path(__file__).parents[1] / "golden"
ROOT = Path(__file__).parents[2]


class Small(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.table = nn.ParameterDict({"bias": torch.ones(2, 2)})


def test_parameter_groups() -> None:
    model = Small()
    no_decay, decay = parameter_groups(model, 0.02)
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.02)
    # One dimension, or named bias; the temperature has no dimension at all, and decays.
    without = [model.linear.bias, model.norm.weight, model.norm.bias, model.table["bias"]]
    assert {id(parameter) for parameter in no_decay["params"]} == {id(parameter) for parameter in without}
    assert {id(parameter) for parameter in decay["params"]} == {id(model.temp), id(model.linear.weight)}
    assert len(no_decay["params"]) + len(decay["params"]) == 6


@pytest.mark.parametrize("name", ["adamW", "ADAMW"])
def test_adamw_by_name(name: str) -> None:
    optimizer = create_optimizer(OptimizerConfig(opt=name, lr=3e-5, weight_decay=0.1), Small())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert [group["lr"] for group in optimizer.param_groups] == [3e-5, 3e-5]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8] * 2


def test_adamw_step_by_hand() -> None:
    model = Small()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    optimizer = create_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), model)
    sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad).backward()
    optimizer.step()
    # The first step of Adam moves by lr whatever the gradient; decay takes lr * 0.5 * 2 first.
    assert model.linear.bias.tolist() == pytest.approx([1.9] * 3)
    assert model.linear.weight.flatten().tolist() == pytest.approx([1.8] * 6)
    assert model.frozen.weight.flatten().tolist() == [2.0] * 4


def test_unknown_optimizer() -> None:
    with pytest.raises(ConfigError, match="no optimizer named 'adamWhatever'"):
        create_optimizer(OptimizerConfig(opt="adamWhatever"), Small())


# ---- learning rate


def drive(config: ScheduleConfig, lr: float, iterations: int) -> list[tuple[str, float]]:
    """The learning rate after each change, as Pretrain.py's loop makes them; it must be one for all groups."""
    optimizer = create_optimizer(OptimizerConfig(lr=lr), Small())
    schedule = create_scheduler(config, optimizer)
    changes: list[tuple[str, float]] = []

    def note(when: str) -> None:
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        changes.append((when, rates.pop()))

    note("start")
    for epoch in range(config.epochs):
        schedule.step(epoch_time(config, epoch))
        if epoch > 0:
            note(f"epoch {epoch}")
        for iteration in range(iterations):
            time = iteration_time(config, epoch, iteration, iterations)
            if time is not None:
                schedule.step(time)
                note(f"epoch {epoch}, after iteration {iteration}")
    return changes


def test_learning_rate_of_the_published_recipe() -> None:
    golden = json.loads((GOLDEN / "lr_sequence.json").read_text(encoding="utf-8"))
    config = load_config(ROOT / "configs" / "Pretrain.yaml", PretrainConfig)
    found = drive(config.schedular, config.optimizer.lr, iterations=2350)  # the warm-up ends at 2000
    assert [when for when, _ in found] == [when for when, _ in golden]
    assert [lr for _, lr in found] == pytest.approx([lr for _, lr in golden], rel=1e-9)


def test_learning_rate_by_hand() -> None:
    config = ScheduleConfig(epochs=4, warmup_epochs=2, warmup_interval=3, warmup_lr=0.1, min_lr=0.1)
    # warm-up 0.1 to 0.5 in two units of three iterations; then half a cosine from 0.5 to 0.1 over four epochs,
    # of which epoch e sees the point e / 4
    expected = [
        ("start", 0.1),
        ("epoch 0, after iteration 0", 0.1),
        ("epoch 0, after iteration 3", 0.3),
        ("epoch 0, after iteration 6", 0.5),
        ("epoch 1", 0.3 + 0.2 * 0.5**0.5),
        ("epoch 2", 0.3),
        ("epoch 3", 0.3 - 0.2 * 0.5**0.5),
    ]
    found = drive(config, 0.5, iterations=20)
    assert [when for when, _ in found] == [when for when, _ in expected]
    assert [lr for _, lr in found] == pytest.approx([lr for _, lr in expected])


def test_learning_rate_that_changes_every_iteration() -> None:
    config = ScheduleConfig(
        epochs=2, warmup_epochs=1, warmup_interval=2, warmup_lr=0.1, min_lr=0.1, interval="iteration"
    )
    # Four iterations an epoch: warm-up until iteration 2 of epoch 0, then eighths of half a cosine from 0.5 to 0.1.
    cosine = {eighth: 0.3 + 0.2 * math.cos(math.pi * eighth / 8) for eighth in range(9)}
    expected = [
        ("start", 0.1),
        ("epoch 0, after iteration 0", 0.1),
        ("epoch 0, after iteration 2", 0.5),
        ("epoch 0, after iteration 3", cosine[4]),
        ("epoch 1", cosine[4]),
        ("epoch 1, after iteration 0", cosine[5]),
        ("epoch 1, after iteration 1", cosine[6]),
        ("epoch 1, after iteration 2", cosine[7]),
        ("epoch 1, after iteration 3", 0.1),
    ]
    found = drive(config, 0.5, iterations=4)
    assert [when for when, _ in found] == [when for when, _ in expected]
    assert [lr for _, lr in found] == pytest.approx([lr for _, lr in expected])


def test_without_warm_up_the_rate_starts_at_its_full_value() -> None:
    config = ScheduleConfig(epochs=2, warmup_epochs=0, min_lr=0.1)
    assert [lr for _, lr in drive(config, 0.5, iterations=5)] == pytest.approx([0.5, 0.5, 0.3])


def test_a_short_first_epoch_stops_warming_up() -> None:
    config = ScheduleConfig(epochs=2, warmup_epochs=2, warmup_interval=3, warmup_lr=0.1, min_lr=0.1)
    assert [lr for _, lr in drive(config, 0.5, iterations=5)] == pytest.approx([0.1, 0.1, 0.3, 0.3])


def test_step_schedule_by_hand() -> None:
    config = ScheduleConfig(sched="STEP", epochs=4, warmup_epochs=1, warmup_interval=2, warmup_lr=0.1, decay_rate=0.5)
    assert [lr for _, lr in drive(config, 0.8, iterations=3)] == pytest.approx([0.1, 0.1, 0.8, 0.4, 0.2, 0.1])


def test_unknown_schedule() -> None:
    optimizer = create_optimizer(OptimizerConfig(), Small())
    with pytest.raises(ConfigError, match=r"schedular\.sched is 'plateau'; known are cosine and step"):
        create_scheduler(ScheduleConfig(sched="plateau"), optimizer)
