"""Linear layers in float32 on the CPU through oneDNN.

PyTorch multiplies float32 matrices on the CPU by MKL, which uses AVX2 alone on processors that are not Intel's. oneDNN,
which PyTorch carries for convolutions and bfloat16, uses AVX-512 there too: docs/performance.md has the ratio.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def fast_linears(device: torch.device) -> AbstractContextManager[Any]:
    """What to run a model on `device` in: `OneDNNLinears` on the CPU, nothing special elsewhere."""
    return OneDNNLinears() if device.type == "cpu" else nullcontext()


class OneDNNLinears(TorchFunctionMode):
    """While it is entered, `F.linear` of float32 tensors on the CPU runs through oneDNN; all else is left alone.

    Enter it around the backward pass as well: activation checkpointing computes forward passes there. Results differ
    from MKL's by rounding. Gradients of any order exist. Where PyTorch has no oneDNN, nothing changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def __torch_function__(
        self, function: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.nn.functional.linear and self.available:
            return _linear(*args, **kwargs)
        return function(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.device.type == "cpu" and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(input, weight, bias)
    return torch.nn.functional.linear(input, weight, bias)


class _Linear(torch.autograd.Function):
    """input (..., K), weight (N, K), bias (N,) or None -> (..., N)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        to_input = _Linear.apply(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        to_weight = _Linear.apply(rows.t(), input.flatten(0, -2).t(), None) if ctx.needs_input_grad[1] else None
        return to_input, to_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None
