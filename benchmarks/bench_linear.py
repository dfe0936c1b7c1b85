"""A linear layer in float32 on the CPU: PyTorch's own against `models/kernels/onednn.py`, at the sizes of ALBEF.

python benchmarks/bench_linear.py
"""

import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe_machine, print_table
from models.kernels.onednn import use_onednn

# rows, input width, output width: image tokens of a 384 px image, text tokens of seven phrases; the small model's
LAYER_SHAPES = ((577, 768, 2304), (577, 768, 3072), (577, 3072, 768), (56, 768, 3072), (1040, 128, 512))
LAYER_ROUNDS = 7


def gflops(layer: nn.Module, x: Tensor, backward: bool) -> float:
    """GFLOP a second of the fastest round: forward alone, or with the gradients by input and parameters."""
    gradient = torch.ones_like(layer(x))

    def once() -> None:
        with torch.set_grad_enabled(backward):
            y = layer(x)
        if backward:
            torch.autograd.grad(y, (x, *layer.parameters()), gradient)

    seconds = min(timeit.repeat(once, number=1, repeat=LAYER_ROUNDS))
    return (3 if backward else 1) * 2 * x.numel() * gradient.shape[-1] / seconds / 1e9


def layer_rows() -> Iterator[list[str]]:
    """One row of the table per shape."""
    for rows, width, out in LAYER_SHAPES:
        x = torch.randn(rows, width, requires_grad=True)
        layers = nn.Sequential(nn.Linear(width, out), nn.Sequential(nn.Linear(width, out)))
        use_onednn(layers[1])
        rates = [f"{gflops(layer, x, backward):.0f}" for backward in (False, True) for layer in layers]
        yield [f"{rows} x {width} x {out}", *rates]


if __name__ == "__main__":
    print(describe_machine() + "\n")
    forward, backward = "forward, GFLOP/s: PyTorch", "with backward, GFLOP/s: PyTorch"
    print_table(["rows x in x out", forward, "oneDNN", backward, "oneDNN"], layer_rows())
