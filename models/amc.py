"""GradCAM of an attention map, and the losses on it: pure functions of tensors.

GradCAM: Selvaraju et al., ICCV 2017; on ALBEF's cross-attention: Li et al., NeurIPS 2021, section 3.4.
AMC: Yang et al., CVPR 2023, arXiv 2206.15462, section 3.2.

To add a loss on the map, add a function to `MAP_LOSSES`, at the end of this file, and its weight to the config.

Shapes: B samples, H heads, T tokens, a grid of h x w image patches.
"""

import difflib
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from config import AMCConfig, ConfigError


def gradcam(attention: Tensor, gradient: Tensor, token_mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Token-averaged GradCAM of attention over image patches.

    Args:
        attention: (B, H, T, h * w) probabilities A, without those of the CLS token.
        gradient: (B, H, T, h * w) d(score)/dA; negative entries are clamped to 0.
        token_mask: (B, T), 1 for a word and 0 for padding. The mean runs over all T, padding included.
        grid: (h, w).

    Returns:
        (B, h, w) float32, at least 0; meaningful up to a positive factor.
    """
    return _attention_times_gradient(attention, gradient, token_mask).mean(dim=(1, 2)).unflatten(-1, grid)


def token_gradcam(attention: Tensor, gradient: Tensor, token_mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map of each token, before `gradcam` averages over them; arguments as there.

    Returns:
        (B, T, h, w) float32, at least 0, and 0 for padding; the mean over T is `gradcam`'s map (in float32 up to the
        order of the sums).
    """
    return _attention_times_gradient(attention, gradient, token_mask).mean(dim=1).unflatten(-1, grid)


def _attention_times_gradient(attention: Tensor, gradient: Tensor, token_mask: Tensor) -> Tensor:
    """A * max(G, 0), (B, H, T, h * w); padding is 0."""
    mask = token_mask[:, None, :, None].float()
    return (attention.float() * mask) * (gradient.float().clamp(min=0) * mask)


def normalise_map(cam: Tensor) -> Tensor:
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
    """L_mean of AMC: max(0, mean outside the mask - mean inside it + margin).

    Args:
        cam: (B, s, s) float, normalised and resized.
        mask: (B, s, s) float in [0, 1], 1 inside the box.
        has_box: (B,) of 1 and 0; samples at 0 are left out.
        over: "batch" (release): the two means run over the pixels of all samples, with one hinge; "sample" (the paper):
            one hinge per sample, then their mean.

    Returns:
        a scalar; 0, with a gradient of 0, when no sample has a box.
    """
    keep = has_box.to(cam.dtype)[:, None, None]
    inside, outside = mask * keep, (1 - mask) * keep
    if over == "batch":
        hinge = (_weighted_mean(cam, outside, (0, 1, 2)) - _weighted_mean(cam, inside, (0, 1, 2)) + margin).relu()
        return hinge * has_box.any()
    hinge = (_weighted_mean(cam, outside, (1, 2)) - _weighted_mean(cam, inside, (1, 2)) + margin).relu()
    return mean_where(hinge, has_box)


def max_margin_loss(cam: Tensor, mask: Tensor, has_box: Tensor, margin: float) -> Tensor:
    """L_max of AMC: max(0, max outside the mask - max inside it + margin), averaged over the samples with a box.

    Arguments and result as in `mean_margin_loss`.
    """
    hinge = ((cam * (1 - mask)).amax(dim=(1, 2)) - (cam * mask).amax(dim=(1, 2)) + margin).relu()
    return mean_where(hinge, has_box)


def _weighted_mean(values: Tensor, weights: Tensor, dim: tuple[int, ...]) -> Tensor:
    # A mask that covers nothing, or everything, has no mean on one side: 0 there instead of 0 / 0.
    return (values * weights).sum(dim) / weights.sum(dim).clamp(min=torch.finfo(values.dtype).tiny)


def mean_where(values: Tensor, keep: Tensor) -> Tensor:
    """The mean of values (B,) where `keep` (B,) is 1; 0 where it never is."""
    keep = keep.to(values.dtype)
    return (values * keep).sum() / keep.sum().clamp(min=1)


# ---- the losses of a training step

MapLoss = Callable[[Tensor, Tensor, Tensor, AMCConfig], Tensor]


def _mean_term(cam: Tensor, mask: Tensor, has_box: Tensor, options: AMCConfig) -> Tensor:
    """AMC, mean term: `mean_margin_loss` as the config has it."""
    return mean_margin_loss(cam, mask, has_box, options.margin_mean, options.mean_over)


def _max_term(cam: Tensor, mask: Tensor, has_box: Tensor, options: AMCConfig) -> Tensor:
    """AMC, max term: `max_margin_loss` as the config has it."""
    return max_margin_loss(cam, mask, has_box, options.margin_max)


# Name -> loss(cam, mask, has_box, options), with the arguments of `mean_margin_loss`. The loss is logged as loss_<name>
# and trained with the weight that the config gives it, `amc: {weights: {<name>: 0.3}}`. Its curve has the docstring as
# title, as far as the first colon or line's end. An option such as a margin is a typed key of `AMCConfig`.
MAP_LOSSES: dict[str, MapLoss] = {"cam1": _mean_term, "cam2": _max_term}


def map_losses(cam: Tensor, mask: Tensor, has_box: Tensor, options: AMCConfig) -> dict[str, Tensor]:
    """All losses on the map, by the names of the log.

    Args:
        cam: (B, h, w), from `gradcam`.
        mask: (B, s, s) in [0, 1]; the map is normalised and resized to it.
        has_box: (B,) of 1 and 0.
    """
    cam, mask = resize(normalise_map(cam), mask.shape[-1]), mask.float()
    return {f"loss_{name}": loss(cam, mask, has_box, options) for name, loss in MAP_LOSSES.items()}


def map_loss_weights(options: AMCConfig) -> dict[str, float]:
    """The weight of each loss on the map, by the names of the log.

    Raises:
        ConfigError: a loss has no weight, or a weight no loss.
    """
    published = {"cam1": "weight_mean", "cam2": "weight_max"}
    weights = {name: getattr(options, key) for name, key in published.items()} | options.weights
    for name in options.weights:
        if name in published:
            raise ConfigError(f"amc.weights.{name}: the weight of this loss is amc.{published[name]}")
        if name not in MAP_LOSSES:
            hint = "".join(f"; did you mean '{near}'?" for near in difflib.get_close_matches(name, MAP_LOSSES, n=1))
            raise ConfigError(f"amc.weights.{name}: there is no such loss in models.amc.MAP_LOSSES{hint}")
    if lacking := [name for name in MAP_LOSSES if name not in weights]:
        loss = lacking[0]
        raise ConfigError(f"amc.weights lacks '{loss}', a loss on the map: add its weight, or 0 to only log the loss")
    return {f"loss_{name}": weights[name] for name in MAP_LOSSES}
