"""Linear layers in float32 on the CPU through oneDNN.

PyTorch multiplies float32 matrices on the CPU by MKL. oneDNN, which PyTorch carries for convolutions and bfloat16, was
nearly twice as fast on an AMD processor with AVX-512: benchmarks/bench_linear.py, docs/performance.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F


def use_onednn(model: nn.Module) -> None:
    """Let every linear layer of `model` run through oneDNN wherever it is float32 on the CPU.

    Parameters stay as they are. Results differ from MKL's by rounding; gradients of any order exist. Where PyTorch has
    no oneDNN, nothing changes.
    """
    if _available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (weight.is_contiguous() or weight.t().is_contiguous()):  # gaps, as between CLS tokens
            weight = weight.contiguous()  # otherwise oneDNN takes its reference kernel, 100 times slower
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])  # apart from `forward`, as torch.func asks

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        to_input = _Product.apply(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        to_weight = _Product.apply(rows.t(), input.flatten(0, -2).t(), None) if ctx.needs_input_grad[1] else None
        return to_input, to_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


@torch.library.custom_op("amc::product", mutates_args=(), schema="(Tensor rows, Tensor matrix, Tensor? bias) -> Tensor")
def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """(R, K) @ (K, N) + (N,) in compiled code, which has no derivatives left to take."""
    return torch.ops.mkldnn._linear_pointwise(rows, matrix.t(), bias, "none", [], "")


@_product.register_fake
def _product_shape(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(len(rows), matrix.shape[1])


def product_pass() -> Callable[[fx.Graph], None] | None:
    """What lets compiled code for the CPU multiply through oneDNN too; None where PyTorch has none."""
    return _compile_products if _available() else None


def _compile_products(graph: fx.Graph) -> None:
    """A pass of inductor, over forward and backward graphs as they are about to become code."""
    aten: Any = torch.ops.aten
    for node in graph.nodes:
        found: Any = node.meta.get("val")
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs or found.dtype != torch.float32:
            continue
        bias, rows, matrix = (None, *node.args)[-3:]
        if bias is None or bias.meta["val"].ndim == 1:
            node.target, node.args = torch.ops.amc.product.default, (rows, matrix, bias)
