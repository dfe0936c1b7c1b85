"""TF32, emulated on the CPU: maps, points and gradients of the scenes' model, within bounds that fewer bits break."""

import statistics
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_precision import Gradients, Maps, Rounded, gradient_error, make_scenes, map_errors, rounded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes"), evaluation=3, train=24)


def test_rounding_is_to_the_nearest_and_ties_to_even() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-42, 3e38])])
    assert torch.equal(rounded(x, 7), x.bfloat16().float())
    one = 1.0
    steps = torch.tensor([one, one + 2**-11, one + 2**-11 + 2**-20, one + 3 * 2**-11, -(one + 2**-10)])
    assert rounded(steps, 10).tolist() == [one, one, one + 2**-10, one + 2**-9, -(one + 2**-10)]
    assert rounded(x[::2], 10).shape == (503,)
    assert rounded(x.double(), 10).dtype == torch.float64


def test_every_derivative_is_rounded() -> None:
    """Forward, backward and second backward of a product equal those of operands rounded by hand."""
    torch.manual_seed(0)
    w, x, up = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with Rounded(10):
        (first,) = torch.autograd.grad((x @ w.t() * up).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * x).sum(), w)
    assert torch.equal(first, rounded(up, 10) @ rounded(w, 10))
    torch.testing.assert_close(second, rounded(x, 10).t().mm(rounded(up, 10)).t(), rtol=0, atol=1e-6)
    assert not torch.equal(first, up @ w)
    a, b, bias = torch.randn(2, 4, 4), torch.randn(2, 4, 4), torch.randn(4)
    with Rounded(10):
        products, linear = torch.bmm(a, b), F.linear(a[0], b[0], bias)
    assert torch.equal(products, torch.bmm(rounded(a, 10), rounded(b, 10)))
    torch.testing.assert_close(linear, F.linear(rounded(a[0], 10), rounded(b[0], 10), bias), rtol=0, atol=1e-6)
    image, kernel = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 2, 2)
    with Rounded(10):
        found = F.conv2d(image, kernel, stride=2)
    assert torch.equal(found, F.conv2d(rounded(image, 10), rounded(kernel, 10), stride=2))


def test_no_product_is_left_out() -> None:
    q = torch.randn(1, 1, 4, 8)
    for left_out in (lambda: torch.mv(q[0, 0], q[0, 0, 0]), lambda: F.scaled_dot_product_attention(q, q, q)):
        with pytest.raises(NotImplementedError, match="multiplies"), Rounded(10):
            left_out()
    with Rounded(10), sdpa_kernel(SDPBackend.MATH):
        assert not torch.equal(F.scaled_dot_product_attention(q, q, q), q)


def test_maps_and_points(scenes: Path) -> None:
    maps = Maps(scenes)
    exact, tf32, seven = maps.of("fp32", None), maps.of("fp32", 10), maps.of("fp32", 7)
    assert len(exact) > 20
    assert 5e-5 < statistics.median(map_errors(exact, tf32)) < 6e-4 < statistics.median(map_errors(exact, seven))
    moved = [a != b for a, b in zip(maps.points(exact), maps.points(tf32), strict=True)]
    assert sum(moved) <= 1
    assert maps.accuracy(exact) > 0.5  # it is the model that ships, and reads its images


def test_gradients(scenes: Path) -> None:
    """Of medians, for a maximum that moves to another patch turns the gradient of a single batch."""
    gradients, errors = Gradients(scenes, batch_size=4), {}
    for batch in gradients.batches(3):
        for losses, bound in {"loss": 6e-3, "loss_cam": 4e-3}.items():
            exact = gradients.of(batch, "fp32", None, losses)
            for bits in (10, 7):
                error = gradient_error(exact, gradients.of(batch, "fp32", bits, losses))
                errors.setdefault((bound, bits), []).append(error)
    for (bound, bits), found in errors.items():
        assert (statistics.median(found) < bound) == (bits == 10), (bound, bits, found)
