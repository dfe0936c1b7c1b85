"""GradCAM of an attention map, and the AMC loss on it: pure functions of tensors.

GradCAM: Selvaraju et al., ICCV 2017; on ALBEF's cross-attention: Li et al., NeurIPS 2021, section 3.4.
AMC: Yang et al., CVPR 2023, arXiv 2206.15462, section 3.2.

Shapes: B samples, H heads, T tokens, S = P + h * w image tokens, of which the first P (the CLS token) are no patches.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def gradcam(
    attention: Tensor, gradient: Tensor, token_mask: Tensor, grid: tuple[int, int], prefix_tokens: int = 1
) -> Tensor:
    """Token-averaged GradCAM of attention over image patches.

    Args:
        attention: (B, H, T, S) probabilities A.
        gradient: (B, H, T, S) d(score)/dA; negative entries are clamped to 0.
        token_mask: (B, T), 1 for a word and 0 for padding. The mean runs over all T, padding included.
        grid: (h, w) of the patches.
        prefix_tokens: P, which are left out.

    Returns:
        (B, h, w) float32, at least 0; meaningful up to a positive factor.
    """
    product = _attention_times_gradient(attention, gradient, token_mask, prefix_tokens)
    return product.mean(dim=(1, 2)).unflatten(-1, grid)


def token_gradcam(
    attention: Tensor, gradient: Tensor, token_mask: Tensor, grid: tuple[int, int], prefix_tokens: int = 1
) -> Tensor:
    """The map of each token, before `gradcam` averages over them.

    Arguments as in `gradcam`.

    Returns:
        (B, T, h, w) float32, at least 0, and 0 for padding; the mean over T is `gradcam`'s map (in float32 up to the
        order of the sums).
    """
    return _attention_times_gradient(attention, gradient, token_mask, prefix_tokens).mean(dim=1).unflatten(-1, grid)


def _attention_times_gradient(attention: Tensor, gradient: Tensor, token_mask: Tensor, prefix_tokens: int) -> Tensor:
    """A * max(G, 0) over patches (B, H, T, h * w); prefix tokens are left out, padding is 0."""
    mask = token_mask[:, None, :, None].float()
    patches_attention = attention[..., prefix_tokens:].float() * mask
    patches_gradient = gradient[..., prefix_tokens:].float().clamp(min=0) * mask
    return patches_attention * patches_gradient


def normalise(cam: Tensor) -> Tensor:
    """Scale each map (B, h, w) to [0, 1): ReLU, minus its minimum, over (its maximum + 1e-7), differentiably."""
    cam = cam.relu()
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / (cam.amax(dim=(1, 2), keepdim=True) + 1e-7)


def resize(cam: Tensor, size: int) -> Tensor:
    """(B, h, w) -> (B, size, size), bilinear, align_corners False."""
    return F.interpolate(cam[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def mean_margin_loss(
    cam: Tensor, mask: Tensor, has_box: Tensor, margin: float, over: Literal["batch", "sample"] = "batch"
) -> Tensor:
    """max(0, mean outside the mask - mean inside it + margin): AMC, the mean term.

    Args:
        cam: (B, s, s), normalised and resized.
        mask: (B, s, s) in [0, 1].
        has_box: (B,) of 1 and 0; samples at 0 are left out.
        over: "batch" (release): the two means run over the pixels of all samples, one hinge; "sample": a hinge per
            sample, averaged.

    Returns:
        a scalar; 0, with a gradient of 0, when no sample has a box.
    """
    keep = has_box.to(cam.dtype)[:, None, None]
    inside, outside = mask * keep, (1 - mask) * keep
    if over == "batch":
        hinge = (_weighted_mean(cam, outside, (0, 1, 2)) - _weighted_mean(cam, inside, (0, 1, 2)) + margin).relu()
        return hinge * has_box.any()
    hinge = (_weighted_mean(cam, outside, (1, 2)) - _weighted_mean(cam, inside, (1, 2)) + margin).relu()
    return _mean_where(hinge, has_box)


def max_margin_loss(cam: Tensor, mask: Tensor, has_box: Tensor, margin: float) -> Tensor:
    """max(0, max outside the mask - max inside it + margin), averaged over the samples with a box: AMC, the max term.

    Arguments and result as in `mean_margin_loss`.
    """
    hinge = ((cam * (1 - mask)).amax(dim=(1, 2)) - (cam * mask).amax(dim=(1, 2)) + margin).relu()
    return _mean_where(hinge, has_box)


def _weighted_mean(values: Tensor, weights: Tensor, dim: tuple[int, ...]) -> Tensor:
    # A mask that covers nothing, or everything, has no mean on one side: 0 there instead of 0 / 0.
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=torch.finfo(values.dtype).tiny)


def _mean_where(values: Tensor, keep: Tensor) -> Tensor:
    keep = keep.to(values.dtype)
    return (values * keep).sum() / keep.sum().clamp(min=1)
