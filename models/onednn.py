"""Linear layers in float32 on the CPU through oneDNN.

PyTorch multiplies float32 matrices on the CPU by MKL. oneDNN, which PyTorch carries for convolutions and bfloat16, was
nearly twice as fast on an AMD processor with AVX-512: benchmarks/bench_linear.py, docs/performance.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def use_onednn(model: nn.Module) -> None:
    """Let every linear layer of `model` run through oneDNN wherever it is float32 on the CPU.

    Parameters stay as they are. Results differ from MKL's by rounding; gradients of any order exist. Where PyTorch has
    no oneDNN, nothing changes.
    """
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """`nn.Linear` that multiplies by oneDNN what is float32 on the CPU and not autocast to something else."""

    def forward(self, input: Tensor) -> Tensor:
        plain = input.device.type == "cpu" and input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        some = input.ndim > 1 and input.numel() > 0  # oneDNN refuses an empty product
        if plain and some and not torch.compiler.is_compiling():  # a compiler has products of its own
            return _Product.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """input (..., K) of at least one row, weight (N, K), bias (N,) or None -> (..., N)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        if not (weight.is_contiguous() or weight.t().is_contiguous()):  # gaps, as between CLS tokens
            weight = weight.contiguous()  # otherwise oneDNN takes its reference kernel, 100 times slower
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        to_input = _Product.apply(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        to_weight = _Product.apply(rows.t(), input.flatten(0, -2).t(), None) if ctx.needs_input_grad[1] else None
        return to_input, to_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None
