"""Linear layers through oneDNN: the same numbers, and only where they are meant."""

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from models.kernels import onednn
from models.kernels.onednn import OneDNNLinear, use_onednn


@pytest.fixture
def calls() -> Iterator[mock.Mock]:
    """Counts the products that oneDNN computes."""
    with mock.patch.object(onednn._Product, "forward", wraps=onednn._Product.forward) as counted:
        yield counted


def fast(module: nn.Module) -> nn.Module:
    converted = copy.deepcopy(module)
    use_onednn(converted)
    return converted


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, first derivatives and second derivatives by input and parameters."""
    inputs = [x.clone().requires_grad_(), *layer.parameters()]
    output = layer(inputs[0])
    first = torch.autograd.grad(output.tanh().square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(torch.stack([grad.pow(3).sum() for grad in first]).sum(), inputs)
    return [output, *first, *second]


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_pytorch_up_to_the_second_derivative(calls: mock.Mock, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 7, bias), torch.randn(shape)
    plain = results(layer, x)
    calls.assert_not_called()
    ours = results(fast(layer), x)
    assert calls.call_count > 3  # forward, and products of both backward passes
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # entries of second derivatives cancel
        assert a.shape == b.shape


class Part(nn.Module):
    """The CLS tokens of (B, T, W), as a view with gaps."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :1]


def test_tokens_with_gaps_between_them_are_closed_up() -> None:
    """As weights of a product they would go to oneDNN's reference kernel, 100 times slower."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(Part(), nn.Linear(5, 7)), torch.randn(3, 4, 5)
    product, seen = torch.ops.mkldnn._linear_pointwise, list[Tensor]()
    spy = mock.patch.object(
        torch.ops.mkldnn, "_linear_pointwise", side_effect=lambda *a: seen.append(a[1]) or product(*a)
    )
    with spy:
        ours = results(fast(plain), x)
    assert len(seen) > 3
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in seen)
    for a, b in zip(ours, results(plain, x), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("shape", [(0, 5), (1, 0, 5), (5,)])
def test_no_rows_and_a_single_vector(shape: tuple[int, ...]) -> None:
    """oneDNN refuses an empty product: a batch without a masked word has one, in the MLM head."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 7), torch.randn(shape, requires_grad=True)
    found = []
    for one in (layer, fast(nn.Sequential(layer))):
        output = one(x)
        found.append([output, *torch.autograd.grad(output.sum(), [x, *one.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_weights_cost_no_product(calls: mock.Mock) -> None:
    layer = fast(nn.Linear(5, 6)).requires_grad_(False)
    x = torch.randn(4, 5, requires_grad=True)
    torch.autograd.grad(layer(x).sum(), x)
    assert calls.call_count == 2


def test_other_precisions_are_left_alone(calls: mock.Mock) -> None:
    layer, x = fast(nn.Linear(5, 6)), torch.randn(4, 5)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        calls.assert_not_called()
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert calls.call_count == 1


def test_a_compiler_is_left_its_own_products(calls: mock.Mock) -> None:
    layer, x = fast(nn.Linear(5, 6)), torch.randn(4, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert calls.call_count == 1


def test_parameters_keep_their_names_and_other_layers_their_class() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Bilinear(6, 6, 2))
    converted = fast(net)
    assert [type(module) for module in converted] == [OneDNNLinear, nn.LayerNorm, nn.Bilinear]
    assert converted.state_dict().keys() == net.state_dict().keys()


def test_nothing_changes_without_onednn() -> None:
    with mock.patch.object(torch.backends.mkldnn, "is_available", return_value=False):
        assert type(fast(nn.Linear(5, 6))) is nn.Linear
