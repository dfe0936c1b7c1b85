"""SelfEQ's losses on the maps of a caption and of its paraphrase: pure functions of tensors.

SelfEQ: He et al., CVPR 2024, arXiv 2312.04554, section 3.

Shapes: B samples, a grid of h x w image patches. `keep` (B,) is 1 for the samples that have a paraphrase.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from config import SelfEQConfig
from models.amc import mean_where, normalise_map


def similarity_loss(caption: Tensor, paraphrase: Tensor, keep: Tensor) -> Tensor:
    """L_sim: smooth L1 (beta 1) of two maps (B, h, w) in [0, 1), the mean over patches and kept samples; a scalar."""
    return mean_where(F.smooth_l1_loss(paraphrase, caption, reduction="none").mean(dim=(1, 2)), keep)


def region(caption: Tensor, paraphrase: Tensor, keep: Tensor, threshold: float) -> Tensor:
    """Where both maps (B, h, w) sum up to `threshold` or more, in kept samples: (B, h, w) of 1 and 0, a constant."""
    return (caption + paraphrase >= threshold) * keep.to(caption.dtype)[:, None, None]


def consistency_loss(caption: Tensor, paraphrase: Tensor, keep: Tensor, options: SelfEQConfig) -> Tensor:
    """L_cst: in their region, two maps (B, h, w) in [0, 1) shall vary little, and be above `options.floor` on average.

    std(map) + max(0, floor - mean(map)) of both maps, inside `region`.

    Returns:
        a scalar; 0, with a gradient of 0, where the region is empty.
    """
    inside = region(caption, paraphrase, keep, options.threshold)
    counted = inside if options.std_over == "region" else keep.to(caption.dtype)[:, None, None].expand_as(inside)
    dim = (0, 1, 2) if options.over == "batch" else (1, 2)
    count, parts = inside.sum(dim), torch.zeros((), device=caption.device)
    for cam in (paraphrase * inside, caption * inside):
        parts = parts + _deviation(cam, counted, dim) + (options.floor - cam.sum(dim) / count.clamp(min=1)).relu()
    parts = parts * (count > 0)
    return parts if options.over == "batch" else mean_where(parts, keep)


def named_losses(caption: Tensor, paraphrase: Tensor, keep: Tensor, options: SelfEQConfig) -> dict[str, Tensor]:
    """Both losses of two raw maps (B, h, w), of `amc.gradcam`, by the names of the log."""
    maps = normalise_map(caption), normalise_map(paraphrase)
    return {
        "loss_similarity": similarity_loss(*maps, keep),
        "loss_consistency": consistency_loss(*maps, keep, options),
    }


def loss_weights(options: SelfEQConfig) -> dict[str, float]:
    """Their weights, by the names of the log."""
    return {"loss_similarity": options.weight_similarity, "loss_consistency": options.weight_consistency}


def _deviation(values: Tensor, counted: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The sample's deviation (n - 1) of the values where `counted` is 1; of equal ones 0, with a gradient of 0."""
    count = counted.sum(dim, keepdim=True)
    apart = (values - (values * counted).sum(dim, keepdim=True) / count.clamp(min=1)) * counted
    variance = apart.square().sum(dim) / (count.sum(dim) - 1).clamp(min=1)
    return variance.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
