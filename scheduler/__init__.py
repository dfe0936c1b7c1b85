"""Learning-rate schedules by the config's names, and the release's way of counting time."""

from typing import Any

from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from config import ConfigError, ScheduleConfig


def create_scheduler(config: ScheduleConfig, optimizer: Optimizer) -> Scheduler:
    """A schedule over time t: linear warm-up for t < warmup_epochs, then `sched` at t - warmup_epochs.

    `.step(t)` sets the learning rate; at t = 0 it is `warmup_lr`. Raises `ConfigError` for an unknown `sched`.
    """
    warmup: dict[str, Any] = {
        "warmup_t": config.warmup_epochs,
        "warmup_lr_init": config.warmup_lr,
        "warmup_prefix": True,
    }
    name = config.sched.lower()
    if name == "cosine":
        return CosineLRScheduler(optimizer, t_initial=config.epochs, lr_min=config.min_lr, **warmup)
    if name == "step":
        return StepLRScheduler(optimizer, decay_t=1, decay_rate=config.decay_rate, **warmup)
    raise ConfigError(f"schedular.sched is '{config.sched}'; known are cosine and step")


def epoch_time(config: ScheduleConfig, epoch: int) -> int:
    """The schedule's time at the start of an epoch: 0 in epoch 0, from then on the epoch plus `warmup_epochs`."""
    return epoch + config.warmup_epochs if epoch > 0 else 0


def iteration_time(config: ScheduleConfig, epoch: int, iteration: int, iterations: int) -> float | None:
    """The schedule's time after an iteration of an epoch that has `iterations`; None where it does not change.

    The release warms up by iterations of epoch 0, every `warmup_interval` (100) of them one unit of time, and then
    changes the rate between epochs alone. With `interval: iteration` time also runs on within an epoch.
    """
    last = config.warmup_epochs * config.warmup_interval
    if epoch == 0 and iteration <= last:
        return iteration // config.warmup_interval if iteration % config.warmup_interval == 0 else None
    if config.interval == "iteration":
        return config.warmup_epochs + epoch + (iteration + 1) / iterations
    return None
