"""Optimisers by the config's names, with ALBEF's two parameter groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from config import ConfigError, OptimizerConfig
from utils import UserError, log


class OptimizerStateError(UserError):
    """A stored optimizer state that is not of this optimizer or this model."""


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


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps of its parameters, each under a name for messages."""
    return {
        f"{name} of parameter {number} of the optimizer": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: Optimizer, saved: Any, config: OptimizerConfig, path: str | Path) -> None:
    """Put moments and step counts back; rates, decay and all other options stay those of `config`.

    Args:
        saved: an optimizer's state dict, as the checkpoint `path` has it; nothing of it is kept, all is copied.

    Raises:
        OptimizerStateError: it is of another kind of optimizer, or of other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    try:
        groups = [list(group["params"]) for group in saved["param_groups"]]
        states = [saved["state"].get(number) for ids in groups for number in ids]
    except (AttributeError, KeyError, TypeError):  # it is no optimizer's state dict
        groups, states = [], []
    sizes, wanted = [len(ids) for ids in groups], [len(group["params"]) for group in own]
    if sizes != wanted:
        raise OptimizerStateError(
            f"{path}: its optimizer has parameter groups of {sizes or 'no'} parameters, this model's are of {wanted}; "
            "drop --resume to start from the weights alone"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = _usual_state(config)
    for parameter, state in zip(parameters, states, strict=True):
        if state and (problem := _misfit(parameter, state, known[parameter.ndim > 1])):
            raise OptimizerStateError(
                f"{path}: its optimizer state does not fit {config.opt} and this model: {problem}; set optimizer.opt "
                "to what the run began with, or drop --resume to start from the weights alone"
            )
    if (fresh := sum(not state for state in states)) and known[True]:
        log(f"{path}: {fresh} of {len(states)} parameters have no optimizer state there, theirs starts afresh")
    # What a new optimizer's groups lack is a counter, such as the steps of timm's LAMB.
    merged = [
        {**group, **theirs, **group, "params": theirs["params"]}
        for group, theirs in zip(own, saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": merged})
    for state in optimizer.state.values():  # what was loaded may lie in the file, which another run can overwrite
        state |= {name: value.clone() for name, value in state.items() if isinstance(value, Tensor) and value.is_cpu}


def _usual_state(config: OptimizerConfig) -> dict[bool, dict[str, bool]]:
    """What an optimizer keeps of a matrix (True) and of a vector: each name, and whether it has the parameter's shape.

    Found by a step of it.
    """
    model = nn.Linear(2, 3)
    optimizer = create_optimizer(config, model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        parameter.ndim > 1: {
            name: isinstance(value, Tensor) and value.shape == parameter.shape
            for name, value in optimizer.state[parameter].items()
        }
        for parameter in model.parameters()
    }


def _misfit(parameter: nn.Parameter, state: Any, known: dict[str, bool]) -> str | None:
    """What of a parameter's stored state is not as this optimizer keeps it."""
    if not isinstance(state, Mapping) or state.keys() != known.keys():
        names = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return f"it keeps {names} where {sorted(known)} belongs"
    for name, own_shape in known.items():
        value = state[name]
        if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.is_sparse):
            return f"{name} is no tensor and no number"
        shape = list(value.shape) if isinstance(value, Tensor) else []
        if own_shape and shape != list(parameter.shape):
            return f"{name} is of shape {shape}, its parameter of {list(parameter.shape)}"
    return None
