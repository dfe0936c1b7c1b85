"""GradCAM and the AMC terms on maps small enough to work out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import amc

# Two maps and masks: a mask of one pixel where the map is highest, and one of three pixels that leaves the highest out.
CAM = torch.tensor([[[1.0, 0.5], [0.0, 0.25]], [[0.2, 0.4], [0.6, 0.8]]])
MASK = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]])
BOTH, FIRST, SECOND, NONE = (torch.tensor(keep) for keep in ([1, 1], [1, 0], [0, 1], [0, 0]))

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


def batch_mean(cam: Tensor, mask: Tensor, has_box: Tensor, margin: float) -> Tensor:
    return amc.mean_margin_loss(cam, mask, has_box, margin, over="batch")


def sample_mean(cam: Tensor, mask: Tensor, has_box: Tensor, margin: float) -> Tensor:
    return amc.mean_margin_loss(cam, mask, has_box, margin, over="sample")


LOSSES = pytest.mark.parametrize("loss", [batch_mean, sample_mean, amc.max_margin_loss])


# ---- GradCAM

# Two heads, two tokens, four patches.
ATTENTION = torch.tensor(
    [
        [
            [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]],
            [[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]],
        ]
    ]
)
GRADIENT = torch.tensor(
    [
        [
            [[1.0, -1.0, 2.0, 0.0], [4.0, 0.0, 0.0, -8.0]],
            [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0]],
        ]
    ]
)


@pytest.mark.parametrize(
    ("mask", "total"),
    [
        ([1, 1], [[1.1, 0.3], [0.8, 0.6]]),  # (0.1, 0, 0.6, 0) + (0, 0.3, 0.2, 0.1), and (1, 0, 0, 0) + (0, 0, 0, 0.5)
        ([1, 0], [[0.1, 0.3], [0.8, 0.1]]),  # padding is left out, and counts in the mean
    ],
)
def test_gradcam_is_the_mean_of_attention_times_positive_gradient(mask: list[int], total: list[list[float]]) -> None:
    cam = amc.gradcam(ATTENTION, GRADIENT, torch.tensor([mask]), (2, 2))
    torch.testing.assert_close(cam, torch.tensor([total]) / 4)


def test_gradcam_computes_in_float32() -> None:
    cam = amc.gradcam(ATTENTION.bfloat16(), GRADIENT.bfloat16(), torch.tensor([[1, 1]]), (2, 2))
    assert cam.dtype == torch.float32
    torch.testing.assert_close(cam, torch.tensor([[[1.1, 0.3], [0.8, 0.6]]]) / 4, rtol=1e-2, atol=1e-3)


def test_token_maps_are_those_before_the_mean() -> None:
    cams = amc.token_gradcam(ATTENTION, GRADIENT, torch.tensor([[1, 1]]), (2, 2))
    expected = [[[0.1, 0.3], [0.8, 0.1]], [[1.0, 0.0], [0.0, 0.5]]]
    torch.testing.assert_close(cams, torch.tensor([expected]) / 2)
    padded = amc.token_gradcam(ATTENTION, GRADIENT, torch.tensor([[1, 0]]), (2, 2))
    torch.testing.assert_close(padded, torch.tensor([[expected[0], [[0.0, 0.0], [0.0, 0.0]]]]) / 2)


def test_the_mean_of_token_maps_is_gradcam_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    # multiples of 1/8: no sum of them is rounded, so that the order of summing cannot show
    attention, gradient = (torch.randint(-8, 9, (3, 4, 8, 6), generator=generator) / 8 for _ in range(2))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    cams = amc.token_gradcam(attention, gradient, mask, (2, 3))
    assert cams.shape == (3, 8, 2, 3)
    assert torch.equal(cams.mean(dim=1), amc.gradcam(attention, gradient, mask, (2, 3)))
    assert (cams[1, 5:] == 0).all()


# ---- normalise and resize


def test_normalise_by_hand() -> None:
    cam = torch.tensor([[[-1.0, 1.0], [3.0, 5.0]], [[2.0, 3.0], [4.0, 6.0]]])
    before = cam.clone()
    expected = torch.tensor([[[0.0, 0.2], [0.6, 1.0]], [[0.0, 0.25], [0.5, 1.0]]])
    torch.testing.assert_close(amc.normalise_map(cam), expected)
    assert torch.equal(cam, before)


def test_normalise_adds_the_constant_to_the_maximum() -> None:
    # A highest value of 1e-7 is divided by twice itself.
    assert amc.normalise_map(torch.tensor([[[0.0, 1e-7]]]))[0, 0].tolist() == pytest.approx([0, 0.5])


def test_normalise_of_a_flat_map_is_zero_with_finite_gradients() -> None:
    cam = torch.full((1, 2, 2), 3.0, requires_grad=True)
    out = amc.normalise_map(cam)
    assert not out.any()
    out.sum().backward()
    assert cam.grad is not None
    assert cam.grad.isfinite().all()


def random_maps() -> Tensor:
    """Positive maps in float64 whose entries lie well apart, so that a small step changes no minimum or maximum."""
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    return (order.double() + 1).view(2, 3, 3).requires_grad_()


def test_resize_is_bilinear_on_pixel_centres() -> None:
    # Keep the edge, interpolate at a quarter and three quarters between the centres.
    cam = torch.tensor([[[0.0, 1.0], [4.0, 5.0]]])
    column, row = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([0.0, 0.25, 0.75, 1.0])
    assert torch.equal(amc.resize(cam, 4), (column[:, None] + row)[None])


# ---- the mean term


@pytest.mark.parametrize(
    ("has_box", "margin", "batch", "sample"),
    [
        # all pixels: outside (0.5 + 0 + 0.25 + 0.8) / 4, inside (1 + 0.2 + 0.4 + 0.6) / 4
        # per sample: 0.25 - 1, and 0.8 - 0.4
        (BOTH, 0.5, 0.3875 - 0.55 + 0.5, (0 + 0.9) / 2),
        (BOTH, 0.1, 0.0, (0 + 0.5) / 2),
        (FIRST, 1.0, 0.25, 0.25),
        (FIRST, 0.5, 0.0, 0.0),
        (SECOND, 0.5, 0.9, 0.9),
    ],
)
def test_mean_term_by_hand(has_box: Tensor, margin: float, batch: float, sample: float) -> None:
    assert batch_mean(CAM, MASK, has_box, margin).item() == pytest.approx(batch)
    assert sample_mean(CAM, MASK, has_box, margin).item() == pytest.approx(sample)
    assert amc.mean_margin_loss(CAM, MASK, has_box, margin).item() == pytest.approx(batch)  # the default


# ---- the max term


@pytest.mark.parametrize(
    ("has_box", "margin", "expected"),
    [
        (BOTH, 0.5, (0 + 0.7) / 2),  # 0.5 - 1 and 0.8 - 0.6
        (BOTH, 0.75, (0.25 + 0.95) / 2),
        (FIRST, 0.75, 0.25),
        (SECOND, 0.75, 0.95),
        (FIRST, 0.25, 0.0),
        (BOTH, 0.25, (0 + 0.45) / 2),
    ],
)
def test_max_term_by_hand(has_box: Tensor, margin: float, expected: float) -> None:
    assert amc.max_margin_loss(CAM, MASK, has_box, margin).item() == pytest.approx(expected)


def test_pixels_weigh_by_a_soft_mask() -> None:
    mask, some = torch.tensor([[[0.5, 1.0], [0.0, 0.0]]]), torch.tensor([True])
    # inside (0.5 * 1 + 1 * 0.5) / 1.5, outside (0.5 * 1 + 0 + 0.25) / 2.5
    for mean in (batch_mean, sample_mean):
        assert mean(CAM[:1], mask, some, 1.0).item() == pytest.approx(0.75 / 2.5 - 1 / 1.5 + 1)
    # outside max(0.5 * 1, 0 * 0.5, 0, 0.25), inside max(0.5 * 1, 1 * 0.5, 0, 0)
    assert amc.max_margin_loss(CAM[:1], mask, some, 0.125).item() == pytest.approx(0.125)


# ---- all terms


@LOSSES
def test_batch_without_boxes_gives_exactly_zero(loss: Loss) -> None:
    cam = CAM.clone().requires_grad_()
    value = loss(cam, MASK, NONE, 2.0)
    value.backward()
    assert value.shape == ()
    assert value.item() == 0
    assert cam.grad is not None
    assert not cam.grad.any()


@LOSSES
def test_samples_without_a_box_do_not_count(loss: Loss) -> None:
    other_cam, other_mask = torch.stack([CAM[0], 1 - CAM[1]]), torch.stack([MASK[0], 1 - MASK[1]])
    cam = other_cam.clone().requires_grad_()
    value = loss(cam, other_mask, FIRST.bool(), 2.0)
    assert value.item() == pytest.approx(loss(CAM, MASK, FIRST, 2.0).item())
    assert value.item() == pytest.approx(loss(CAM[:1], MASK[:1], BOTH[:1], 2.0).item())
    value.backward()
    assert cam.grad is not None
    assert cam.grad[0].any()
    assert not cam.grad[1].any()


@pytest.mark.parametrize(
    ("loss", "everything", "nothing"),
    [  # the side that has no pixels counts as 0; the other has mean 0.5, maximum 0.8
        (batch_mean, -0.5, 0.5),
        (sample_mean, -0.5, 0.5),
        (amc.max_margin_loss, -0.8, 0.8),
    ],
)
def test_mask_of_everything_or_nothing_is_finite(loss: Loss, everything: float, nothing: float) -> None:
    for mask, difference in ((torch.ones(1, 2, 2), everything), (torch.zeros(1, 2, 2), nothing)):
        cam = CAM[1:].clone().requires_grad_()
        value = loss(cam, mask, BOTH[1:], 1.0)
        assert value.item() == pytest.approx(1 + difference)
        value.backward()
        assert cam.grad is not None
        assert cam.grad.isfinite().all()
        assert cam.grad.any()


@LOSSES
def test_derivatives_through_the_whole_chain(loss: Loss) -> None:
    mask = torch.zeros(2, 6, 6, dtype=torch.float64)
    mask[0, 1:3, 2:6] = mask[1, 3:6, 0:2] = 1

    def chain(cam: Tensor) -> Tensor:
        return loss(amc.resize(amc.normalise_map(cam), 6), mask, BOTH, 2.0)

    assert torch.autograd.gradcheck(chain, random_maps())
    assert torch.autograd.gradgradcheck(chain, random_maps())
