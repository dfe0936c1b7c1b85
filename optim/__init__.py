"""Optimisers by the config's names, with ALBEF's two parameter groups."""

from typing import Any

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from config import ConfigError, OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: trainable parameters without decay (one dimension, or named *.bias), and the rest with it."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (no_decay if parameter.ndim == 1 or name.endswith(".bias") else decay).append(parameter)
    return [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def create_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """timm's optimizer of that name, AdamW with its fused kernel; raises `ConfigError` for an unknown one."""
    name = config.opt.lower()
    fused: dict[str, Any] = {"fused": True} if name == "adamw" else {}
    groups = parameter_groups(model, config.weight_decay)
    try:
        return create_optimizer_v2(groups, opt=name, lr=config.lr, weight_decay=config.weight_decay, **fused)
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(f"optimizer.opt: timm has no optimizer named '{config.opt}'") from error
